"""From files to numbers: which text is taken and what is held out of it, then its tokens.

files.py      folders → files → documents, and what of them is not taken
corpus.py     documents → two sides, train and held out, by their content; a fingerprint of them
tokenizer.py  documents → ids, by byte-level BPE
encoding.py   the same, of words that were met before
splitting.py  where words begin in many texts at once
known.py      the words that were met, by their bytes
tokens.py     the cache that keeps both, memory-mapped
text.py       a corpus with its tokens, and what a loss on it is compared with
cleaning/     text made clean: C4's rules, and what repeats
shards/       text that was packed into ids beforehand, of any size
"""
