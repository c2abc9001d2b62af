"""Text as ids in files that are written once, of sources of any size.

folders.py    what tells such a folder from others
sources.py    what is named → sources, cut into parts
reading.py    a part → its documents, one after the other
work.py       parts worked on in several processes, that can be killed at any moment and gone on with
packing.py    a part → files of ids, and what there is to know of them
packed.py     the folder of all of them, checked, as the text of a run
joined.py     many files as one stream, by memory map
"""
