"""The operations: each a definition in plain PyTorch, its backends beneath it, and its gradient.

    attention.py               softmax(q kᵀ + everything positional) v; attention_backends.py: who computes it;
                               attention_cuda.py: in CUDA C++; attention_twice.py: its second derivatives
                               distances.py: matrices by distance
    rotary.py                  turn pairs of channels by their position
    norm.py                    layer norm and RMS norm, of a sum with a residual too
    gate.py                    activations, gated or not
    embedding.py               rows of a table by token
    linear.py                  a linear layer of few rows
    linear_cross_entropy.py    the loss of a linear layer's logits that are never there as a whole
    logits.py                  its products, in chunks of rows
    ranks.py                   what ranks that hold parts of a tensor make together
    optim/                     one update of many tensors

Tensors and numbers go in, checked by whoever calls (fastlm/nn, fastlm/optim, fastlm/amp); tensors come out. To add one,
write a definition under `@op`, and backends under `@its_name.backend(...)`. Importing the package registers all.
"""

from importlib import import_module
from pkgutil import walk_packages

for _module in walk_packages(__path__, f"{__name__}."):
    import_module(_module.name)
