"""The ranks that tests of sharded optimizers run on."""

from ranks import every_rank, ranks

__all__ = ["every_rank", "ranks"]
