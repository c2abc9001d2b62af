"""Text made clean: which lines and documents of web pages are worth learning from, and which repeat others.

rules.py      C4's rules, each of which can be left out
sketches.py   what tells that documents are alike: hashes of texts and of spans, and MinHash
passes.py     a part → its clean documents; what repeats an earlier one; what is kept

A document is judged by itself first, in parts; then by the keys of all documents, in their order, of which the first
stays; then what is left is written, in parts.
"""
