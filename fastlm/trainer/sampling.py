"""A trained model writes: from a finished run's folder, from an interrupted run's newest checkpoint, or from a folder
that transformers can open.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from tokenizers import Tokenizer

from fastlm.interop import from_huggingface
from fastlm.models import Transformer
from fastlm.trainer import checkpoint
from fastlm.trainer.data.tokenizer import EOS, PAD, load_tokenizer
from fastlm.trainer.options import plugins
from fastlm.trainer.options.folders import Sample
from fastlm.trainer.plan import Plan
from fastlm.trainer.words import Refusal, command

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no whole character are decoded to


def write(asked: Sample, show: Callable[[str], None], note: Callable[[str], None]) -> None:
    """Let the model in a folder write what was asked for.

    Args:
        asked: the command's flags.
        show: called with each piece of text as it is written, the prompt first.
        note: called with a line about where the weights are from, if they are no finished run's.

    Raises:
        Refusal: naming the file, for what is missing or damaged, and for a model that writes nothing.
    """
    model, tokenizer = _open(asked.folder, asked.plugin, note)
    if model.decoder is None:
        raise Refusal(f"{asked.folder} holds an encoder, which writes no text; its sample.txt shows what it fills in")
    prompt = tokenizer.encode(asked.prompt).ids or [EOS]
    alone = model.encoder is None
    ends = {} if alone else dict(eos=EOS, pad=PAD, start=PAD)  # a decoder alone begins another text
    shown = _Shown(tokenizer, show)
    if alone:
        shown.add(prompt)
    options = dict(temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, beams=asked.beams)
    options |= dict(generator=torch.Generator().manual_seed(asked.seed), on_token=lambda new: shown.add(new.tolist()))
    try:
        written = model.generate(torch.tensor([prompt]), asked.tokens, **options, **ends)
    except ValueError as error:
        raise Refusal(str(error)) from error
    if asked.beams > 1:  # which are known at the end
        shown.add(written[0, len(prompt) * alone :].tolist())
    shown.end()


class _Shown:
    """Text shown as its tokens come; a character of several tokens waits for its last."""

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], None]):
        self.tokenizer, self.show = tokenizer, show
        self.ids: list[int] = []
        self.length = 0  # characters shown

    def add(self, ids: list[int]) -> None:
        self.ids += ids
        text = self.tokenizer.decode(self.ids)
        if not text.endswith(REPLACEMENT):
            self._show(text)

    def end(self) -> None:
        self._show(self.tokenizer.decode(self.ids) + "\n")

    def _show(self, text: str) -> None:
        self.show(text[self.length :])
        self.length = len(text)


def _open(folder: Path, imported: tuple[str, ...], note: Callable[[str], None]) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer in a folder. Raises Refusal, naming the file, for what is missing or damaged."""
    plan = Plan.read(folder) if (folder / "run.json").exists() else None
    if plan is not None:
        plugins.require(plan.config.plugin, imported, folder)
    finished = (folder / "model.safetensors").exists()
    if plan is None and not finished:
        raise Refusal(f"{folder} holds no trained model (no model.safetensors); `fastlm pretrain` trains one")
    for name in ("config.json", "tokenizer.json") if finished else ("tokenizer.json",):
        if not (folder / name).exists():
            raise Refusal(
                f"{folder / name} is missing, without which the model cannot be read; copy it from where it was trained"
            )
    if not finished:
        return _interrupted(folder, plan, note)
    with _reading(folder / "config.json"):
        json.loads((folder / "config.json").read_text())
    with _reading(folder / "model.safetensors", SafetensorError, RuntimeError, TypeError):
        model = from_huggingface(folder)
    return model, _tokenizer(folder)


def _interrupted(folder: Path, plan: Plan, note: Callable[[str], None]) -> tuple[Transformer, Tokenizer]:
    """The model as the run saved it last."""
    last = checkpoint.newest(folder / "state", note)
    if last is None:
        go_on = command("resume", folder)
        raise Refusal(f"{folder} holds no trained model yet (no whole checkpoint in state/); `{go_on}` goes on")
    tokenizer = _tokenizer(folder)
    vocab_size = tokenizer.get_vocab_size()
    shape = plan.config.model(vocab_size)
    objective = plan.config.objective_on_rows(shape.context, vocab_size)
    model = objective.model(shape)
    load_model(model, str(last / "model.safetensors"))
    done = last.name.removeprefix("step-")
    note(f"{folder} holds no model.safetensors; these are its weights after step {done} of {plan.steps}")
    return objective.exported(model).eval(), tokenizer


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
