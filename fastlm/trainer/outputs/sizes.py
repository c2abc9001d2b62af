"""What `fastlm info --presets` says: of each preset its parameters, and the memory that training it takes with each
optimizer, activations aside. Nothing is allocated.
"""

from collections.abc import Iterator

import torch

from fastlm.models import Transformer
from fastlm.models.presets import PRESETS
from fastlm.optim import memory_table
from fastlm.trainer.words import count, size


def of_presets(names: tuple[str, ...] = ()) -> Iterator[str]:
    """A line of headings, and one for each preset, all of them unless some are named. Bytes are those of parameters,
    gradients and states in fp32.
    """
    columns: list[str] | None = None
    for name in names or PRESETS:
        with torch.device("meta"):
            model = Transformer(PRESETS[name])
        totals = {row.optimizer: size(row.total) for row in memory_table(model)}
        if columns is None:
            columns = list(totals)
            yield f"{'preset':<26}{'kind':<16}{'parameters':>11}" + "".join(f"{each:>11}" for each in columns)
        parameters = count(model.parameter_count())
        yield f"{name:<26}{PRESETS[name].kind:<16}{parameters:>11}" + "".join(f"{totals[c]:>11}" for c in columns)
