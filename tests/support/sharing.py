"""How the workers of `pytest -n` share the suite: a file's tests stay together, so that what they share is made once,
and so do those of all files that ask for ranks; in the order in which they are collected, the longest first.
"""

from xdist.scheduler import LoadScopeScheduling

RANKS = ("tests/optim/test_sharded", "tests/trainer/test_distributed")


class Files(LoadScopeScheduling):
    def __init__(self, config, log):
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return "ranks" if nodeid.startswith(RANKS) else nodeid.partition("::")[0]
