"""The ranks that tests of runs in several processes use."""

from ranks import every_rank, ranks

__all__ = ["every_rank", "ranks"]
