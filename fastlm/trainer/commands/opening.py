"""What a folder holds of a trained model: a finished run's, an interrupted run's newest checkpoint, a run's best/, or a
folder that transformers can open.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_model
from tokenizers import Tokenizer
from torch import nn

from fastlm.interop import from_huggingface, head_from_huggingface
from fastlm.models import Transformer
from fastlm.models.heads import Headed
from fastlm.trainer import checkpoint
from fastlm.trainer.data.tokenizer import load_tokenizer
from fastlm.trainer.options import plugins
from fastlm.trainer.outputs.artefacts import BEST
from fastlm.trainer.plan import Plan
from fastlm.trainer.words import Refusal, command

# what the architectures with a head for rows or spans are called
HEADED = ("ForSequenceClassification", "ForQuestionAnswering", "Simple", "RowClassifier", "SpanReader")


class Opened(NamedTuple):
    """A trained model.

    Args:
        model: what others open of it, which stands under a head where it was fine-tuned to label rows or spans.
        module: all of it, such as a generator and a discriminator, where that was asked for and is there; or model.
        tokenizer: its tokenizer.
        plan: of the run that trained it; None for another folder.
    """

    model: Transformer | Headed
    module: nn.Module
    tokenizer: Tokenizer
    plan: Plan | None


def trained(folder: Path, imported: tuple[str, ...], note: Callable[[str], None], whole: bool = False) -> Opened:
    """The model in a folder.

    Args:
        folder: where; it is there.
        imported: the plugins that were given for it, in this process.
        note: called with a line about where the weights are from, if they are no finished run's.
        whole: whether `module` is wanted, which a finished run's newest checkpoint has.

    Raises:
        Refusal: naming the file, for what is missing or damaged.
    """
    run = folder.parent if folder.name == BEST and not (folder / "run.json").exists() else folder
    plan = Plan.read(run) if (run / "run.json").exists() else None
    if plan is not None:
        plugins.require(plan.config.plugin, imported, folder)
    finished = (folder / "model.safetensors").exists()
    if plan is None and not finished:
        raise Refusal(f"{folder} holds no trained model (no model.safetensors); `fastlm pretrain` trains one")
    for needed in ("config.json", "tokenizer.json") if finished else ("tokenizer.json",):
        if not (folder / needed).exists():
            raise Refusal(
                f"{folder / needed} is missing, without which the model cannot be read; copy it from where it was "
                "trained"
            )
    last = checkpoint.newest(folder / "state", note) if plan is not None and (whole or not finished) else None
    if last is not None:
        return _saved(folder, last, plan, lambda line: None if finished else note(line))
    if not finished:
        go_on = command("resume", folder)
        raise Refusal(f"{folder} holds no trained model yet (no whole checkpoint in state/); `{go_on}` goes on")
    with _reading(folder / "config.json"):
        entries = json.loads((folder / "config.json").read_text())
    headed = any(name.endswith(HEADED) for name in entries.get("architectures") or ())
    with _reading(folder / "model.safetensors", SafetensorError, RuntimeError, TypeError):
        model = (head_from_huggingface if headed else from_huggingface)(folder)
    return Opened(model, model, _tokenizer(folder), plan)


def _saved(folder: Path, last: Path, plan: Plan, note: Callable[[str], None]) -> Opened:
    """The model as the run saved it last."""
    tokenizer = _tokenizer(folder)
    vocab_size = tokenizer.get_vocab_size()
    shape = plan.config.model(vocab_size)
    objective = plan.config.objective_on_rows(shape.context, vocab_size)
    module = objective.model(shape)
    load_model(module, str(last / "model.safetensors"))
    done = last.name.removeprefix("step-")
    note(f"{folder} holds no model.safetensors; these are its weights after step {done} of {plan.steps}")
    return Opened(objective.exported(module).eval(), module, tokenizer, plan)


def _tokenizer(folder: Path) -> Tokenizer:
    with _reading(folder / "tokenizer.json", Exception):  # tokenizers raises nothing narrower
        return load_tokenizer(folder / "tokenizer.json")


@contextlib.contextmanager
def _reading(path: Path, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, *errors) as error:
        raise Refusal(
            f"{path} cannot be read ({' '.join(str(error).split())}); it is damaged or another program's"
        ) from error
