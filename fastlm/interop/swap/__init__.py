"""fastlm inside other people's models: their own modules, whose forward is answered by `fastlm.attention`.

    swap(model)             → Report: what was swapped, what was not, and why
    unswap(model)           everything as it was

    swap.py              the call: what is found in a model, and how it is exchanged and brought back
    served.py            Served, what answers in a module's place
    masks.py             what a pass hides, in the terms of fastlm.attention
    report.py            what a call did, to be printed

A family is a file: the classes of transformers that it answers for, by name, and their forward.

    t5.py                T5, mT5, UMT5
    bloom.py, mpt.py     ALiBi
    deberta.py           DeBERTa v1, v2 and v3
    xlnet.py             XLNet
    bert.py              BERT and its like with rows by distance, which transformers has before 5
    torch_attention.py   torch.nn.MultiheadAttention
    norms.py             RMS norms of any class
    rotary.py            rotary embedding, whatever function computes it
    embeddings.py        embeddings whose gradients are large
    linears.py           linear layers, of few rows
    losses.py            the loss of models that predict words
    logits.py            Logits, which are made where they are looked at

Parameters stay the model's own. To add a family, derive from `Served`, name the classes, define forward, and add it to
FAMILIES in swap.py.
"""

from fastlm.interop.swap.report import Report
from fastlm.interop.swap.swap import swap, unswap

__all__ = ["Report", "swap", "unswap"]
