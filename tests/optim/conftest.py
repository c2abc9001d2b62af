"""The ranks that tests of sharded optimizers run on."""

from ranks import ranks

__all__ = ["ranks"]
