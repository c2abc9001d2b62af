"""fastlm: any positional scheme, and any optimizer language models are trained with, at the speed of the plain kernel.

Names are imported when they are first used, so that the command line can say something before torch is there.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastlm import amp, masks, nn, optim, positions
    from fastlm.backends.dispatch import BackendError, SlowPathWarning, use_backend
    from fastlm.interop.swap.swap import swap, unswap
    from fastlm.nn.context_parallel import context_parallel_attention
    from fastlm.nn.embedding import embedding
    from fastlm.nn.functional import attention, rotate
    from fastlm.nn.loss import linear_cross_entropy

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "SlowPathWarning",
    "amp",
    "attention",
    "context_parallel_attention",
    "embedding",
    "linear_cross_entropy",
    "masks",
    "nn",
    "optim",
    "positions",
    "rotate",
    "swap",
    "unswap",
    "use_backend",
]
_HOMES = {
    "interop.swap.swap": ("swap", "unswap"),
    "backends.dispatch": ("BackendError", "SlowPathWarning", "use_backend"),
    "nn.context_parallel": ("context_parallel_attention",),
    "nn.embedding": ("embedding",),
    "nn.functional": ("attention", "rotate"),
    "nn.loss": ("linear_cross_entropy",),
}


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'fastlm' has no attribute {name!r}")
    import_module("fastlm.ops")  # all of them, for use_backend to know
    home = next((home for home, names in _HOMES.items() if name in names), None)
    globals()[name] = getattr(import_module(f"fastlm.{home}"), name) if home else import_module(f"fastlm.{name}")
    return globals()[name]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
