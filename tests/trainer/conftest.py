"""What most of a tiny run's time would go into, though no test of the trainer looks at it."""

from pathlib import Path

import pytest
from runs import SAMPLE

from fastlm.trainer import budget, memory


@pytest.fixture(scope="module", autouse=True)
def in_little_time():
    """Samples are short; figures are laid out and not drawn, which is left to runs in processes of their own; and what
    runs take that differ in nothing but their folders is reckoned once.
    """
    figure = pytest.importorskip("matplotlib.figure", reason="pip install '.[train]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "SAMPLE", SAMPLE)
        patch.setattr(figure.Figure, "savefig", lambda figure, path, **options: Path(path).write_bytes(b"drawn"))
        patch.setattr(memory, "reckon", once_a_shape(memory.reckon))
        yield


def once_a_shape(reckon):
    known = {}

    def reckoned(config, vocab_size: int):
        shape = vocab_size, *(f"{name}={value}" for name, value in vars(config).items() if "Path" not in repr(value))
        if shape not in known:
            known[shape] = reckon(config, vocab_size)
        return known[shape]

    return reckoned
