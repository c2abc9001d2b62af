"""What a call of `swap` did."""

from dataclasses import dataclass, field
from itertools import groupby


@dataclass
class Report:
    """What was swapped in a model and what was not; print it.

    Attributes:
        swapped: module name → what answers for it now.
        kept: module name → why it is as it was.

    The model itself has the name "".
    """

    swapped: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fastlm.swap: {len(self.swapped)} modules swapped, {len(self.kept)} kept"]
        for title, entries in (("swapped", self.swapped), ("kept", self.kept)):
            by_words = sorted(entries, key=entries.get)
            for words, names in groupby(by_words, entries.get):
                names = [name or "the model" for name in names]
                more = f" and {len(names) - 2} more" if len(names) > 2 else ""
                lines.append(f"  {title}: {', '.join(names[:2])}{more}: {words}")
        return "\n".join(lines)
