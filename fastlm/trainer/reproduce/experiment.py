"""What an experiment is, and what it finds."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from fastlm.trainer.data.tokens import Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPERIMENTS: dict[str, type["Experiment"]] = {}


class Setting(NamedTuple):
    """What an experiment works with.

    Args:
        tokens: the text.
        seeds: of models and batches; each is a row of work.
        effort: what the number of updates is multiplied by. Default 1, minutes on two cores.
        say: is told what is being done, in a line. Default nothing.
    """

    tokens: Tokens
    seeds: tuple[int, ...] = (0, 1, 2)
    effort: float = 1.0
    say: Callable[[str], None] = lambda line: None

    def steps(self, n: int) -> int:
        return max(2, round(self.effort * n))


class Claim(NamedTuple):
    """What a paper says, in a sentence about this experiment, and whether it holds here."""

    words: str
    holds: bool


class Finding(NamedTuple):
    """What an experiment found.

    Args:
        columns: headings of the table.
        rows: its cells, in words.
        claims: what was to be shown, and whether it was.
        draw: draws the figure.
        values: what the table was made from, by name, for whoever counts on.
    """

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    claims: list[Claim]
    draw: Callable[["Figure"], None]
    values: dict[str, object]


class Experiment:
    """A table or figure of a paper, at a small size. Subclass it with a name.

    Attributes:
        name: its name in EXPERIMENTS.
        of: the table or figure that it is the counterpart of.
        limits: what it does not show.
    """

    name: ClassVar[str]
    of: ClassVar[str]
    limits: ClassVar[str]

    def __init_subclass__(cls, name: str, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.name = name
        EXPERIMENTS[name] = cls

    def run(self, setting: Setting) -> Finding:
        """Do the work and say what came out, be it what the paper says or not."""
        raise NotImplementedError
