"""From files to numbers: which text is taken and what is held out of it, then its tokens.

corpus.py     files and folders → documents, split into train and held out by their content
tokenizer.py  documents → ids, by byte-level BPE
tokens.py     the cache that keeps both, memory-mapped
"""
