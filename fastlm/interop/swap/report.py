"""What a call of `swap` did."""

from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter


@dataclass
class Report:
    """What was swapped in a model and what was not; print it.

    Attributes:
        swapped: (module's name, what answers for it now).
        kept: (module's name, why it is as it was).

    The model itself has the name "".
    """

    swapped: list[tuple[str, str]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"fastlm.swap: {len(self.swapped)} modules swapped, {len(self.kept)} kept"]
        for title, entries in (("swapped", self.swapped), ("kept", self.kept)):
            for words, alike in groupby(sorted(entries, key=itemgetter(1)), itemgetter(1)):
                names = [name or "the model" for name, _ in alike]
                more = f" and {len(names) - 2} more" if len(names) > 2 else ""
                lines.append(f"  {title}: {', '.join(names[:2])}{more}: {words}")
        return "\n".join(lines)
