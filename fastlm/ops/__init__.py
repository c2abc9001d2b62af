"""The operations: each a definition in plain PyTorch, its backends beneath it, and its gradient.

    attention.py               softmax(q kᵀ + everything positional) v; attention_backends.py: who computes it;
                               attention_cuda.py: in CUDA C++; attention_twice.py: its second derivatives
    rotary.py                  turn pairs of channels by their position
    linear_cross_entropy.py    the loss of a linear layer's logits that are never there as a whole

    sgd.py  adamw.py  lamb.py  adafactor.py    one update of many tensors
    unscale.py                                 norm, clip factor and overflow in one read of the gradients
    update.py  lists.py  sums.py               what updates share: schemas, layouts for launchers, sums over shards
    precision.py                               16-bit parameters: masters, remainders, stochastic rounding

Tensors and numbers go in, checked by whoever calls (fastlm/nn, fastlm/optim, fastlm/amp); tensors come out. To add one,
write a definition under `@op`, and backends under `@its_name.backend(...)`. Importing the package registers all.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
