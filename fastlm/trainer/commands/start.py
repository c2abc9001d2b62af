"""A run that begins with a trained model's weights: what of its configuration the model decides, and the weights put in
place. The optimizer and the schedule begin anew.
"""

from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from fastlm.interop import model_type
from fastlm.models import ModelConfig
from fastlm.models.heads import Headed
from fastlm.models.presets import FAMILIES, FAMILY, PRESETS
from fastlm.objectives import Objective
from fastlm.objectives.base import copy_weights
from fastlm.trainer.commands.opening import Opened, trained
from fastlm.trainer.data.tokenizer import SPECIALS
from fastlm.trainer.options.config import Config
from fastlm.trainer.words import Refusal, flag

# flags that are fields of a ModelConfig
SHAPE = ("position", "context", "dim", "layers", "heads", "kv_heads", "hidden")


class Start(NamedTuple):
    """What a run begins with.

    Args:
        folder: where it was.
        opened: the model, and its tokenizer.
    """

    folder: Path
    opened: Opened

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.json"

    def give(self, objective: Objective, model: nn.Module) -> list[str]:
        """Put the weights into a model that the objective made; return the names of those that it has to learn anew.

        Raises Refusal for a model that they do not fit.
        """
        try:
            if type(model) is type(self.opened.module):  # a generator with its discriminator, and the like
                return copy_weights(model, self.opened.module)
            return objective.begin_with(model, self.opened.model)
        except ValueError as error:
            raise Refusal(f"the weights of {self.folder} do not fit --objective {objective.name}: {error}") from error


def begun_from(config: Config, given: Collection[str], note: Callable[[str], None]) -> tuple[Config, Start]:
    """The configuration with what the folder of --from decides, and what it holds.

    Args:
        config: as it was asked for.
        given: the fields that were asked for; the folder decides the others, and none of these may contradict it.
        note: called with a line about where the weights are from, if they are no finished run's.

    Raises:
        Refusal: naming the file or the flag.
    """
    start = open_start(config.from_, config.plugin, note)
    shape, plan = start.opened.model.config, start.opened.plan
    run = plan.config if plan is not None and plan.config.command == "pretrain" else None
    found = {name: getattr(shape, name) for name in SHAPE}
    found |= {"vocab": start.opened.tokenizer.get_vocab_size(), "preset": run.preset if run else preset_of(shape)}
    if run is None and "preset" in given and PRESETS[config.preset].kind == shape.kind:  # nothing there says which
        found["preset"] = config.preset
    for name in found:
        if name in given and getattr(config, name) not in (found[name], "preset"):
            raise Refusal(
                f"{flag(name)} {getattr(config, name)} contradicts --from {config.from_}, which has {found[name]}; "
                "leave it out"
            )
    if run is not None and "objective" not in given:
        found["objective"] = run.objective
        if "objective_options" not in given:
            found["objective_options"] = run.objective_options
    config = replace(config, **found, shape=asdict(shape))
    needed = found["vocab"] + config.objective_class().extra_ids
    if shape.vocab_size < needed:
        raise Refusal(
            f"{config.from_} has {shape.vocab_size:,} ids, and --objective {config.objective_class().name} needs "
            f"{needed:,} with the tokenizer's; give another --objective"
        )
    return config, start


def open_start(folder: Path, imported: tuple[str, ...], note: Callable[[str], None]) -> Start:
    """What a folder holds to begin with. Raises Refusal, naming the file."""
    opened = trained(folder, imported, note, whole=True)
    if isinstance(opened.model, Headed):  # another task begins with what is below the head
        opened = opened._replace(model=opened.model.model, module=opened.model.model)
    known = [opened.tokenizer.token_to_id(token) for token in SPECIALS]
    if known != list(range(len(SPECIALS))):
        raise Refusal(
            f"{folder / 'tokenizer.json'} is no tokenizer of fastlm's, whose ids 0 to {len(SPECIALS) - 1} are "
            f"{' '.join(SPECIALS)}; give a folder that fastlm trained"
        )
    return Start(folder, opened)


def preset_of(shape: ModelConfig) -> str:
    """The preset whose recipe fits a model from elsewhere: of its family and its size, of its family, or of its
    kind.
    """
    kind, own = [name for name in PRESETS if PRESETS[name].kind == shape.kind], model_type(shape)
    families = {name for name in FAMILIES if name in kind and model_type(FAMILIES[name]) == own}
    family = [name for name in kind if FAMILY[name] in families]
    size = [name for name in family if (PRESETS[name].dim, PRESETS[name].layers) == (shape.dim, shape.layers)]
    return (size or family or kind)[0]
