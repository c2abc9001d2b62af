"""`fastlm evaluate`: how well a trained model knows a text."""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.tokenizer import bytes_of, dtype_of, encode, vocabulary
from fastlm.trainer.evaluation import Evaluation
from fastlm.trainer.options.config import Config
from fastlm.trainer.options.folders import Evaluate
from fastlm.trainer.outputs import lines
from fastlm.trainer.start import Start, open_start, preset_of
from fastlm.trainer.words import Refusal, clock, count, several

Say = Callable[..., None]


def evaluate(asked: Evaluate, say: Say) -> dict[str, float]:
    """Measure the model in a folder over all of a text, by the objective that it was trained on.

    Args:
        asked: the command's flags.
        say: called with a label and its parts for each line that is shown.

    Returns:
        What `Evaluation` found.

    Raises:
        Refusal: naming the file or the flag.
    """
    start = open_start(asked.folder, asked.plugin, lambda line: say("note", line))
    config = _config(start)
    corpus = find(asked.data, asked.text_key)
    for line in lines.of_text(corpus, split=False):
        say(*line)
    tokenizer = start.opened.tokenizer
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ids.bin"
        encode(tokenizer, corpus.all_documents(), path)
        ids = np.memmap(path, dtype_of(tokenizer.get_vocab_size()), "r")
        begun = time.perf_counter()
        found, windows = _found(start, config, ids, asked)
        spent = time.perf_counter() - begun
        say("tokens", count(len(ids)), f"{several(windows, 'window')} of {_context(start, asked)}", clock(spent))
        del ids  # before its folder goes
    objective = config.objective_class()
    parts = [f"{found['loss']:.4f} nats"]
    parts += [f"{name} {found[name]:.4f} nats" for name in (objective.compared,) if name != "loss"]
    if "bits_per_byte" in found:
        parts += [f"perplexity {math.exp(found['loss']):.4g}", f"{found['bits_per_byte']:.4f} bits/byte"]
    shares = [name for name in objective.shares if name in found]
    say("result", objective.name, *parts, *(f"{name.replace('_', ' ')} {found[name]:.1%}" for name in shares))
    return found


def _config(start: Start) -> Config:
    """What the model was trained by; for a folder of another program's, what one of its kind would be."""
    plan, model = start.opened.plan, start.opened.model
    if plan is None:
        return Config(preset=preset_of(model.config), shape=asdict(model.config))
    if plan.config.command != "pretrain":
        raise Refusal(f"{start.folder} learned a task, not a text; its report.md says how well")
    return plan.config


def _context(start: Start, asked: Evaluate) -> int:
    most = start.opened.model.config.context
    if asked.context is not None and asked.context > most:
        raise Refusal(f"--context is {asked.context}, and the model was trained on {most}; give at most that")
    return asked.context or most


def _found(start: Start, config: Config, ids: np.ndarray, asked: Evaluate) -> tuple[dict[str, float], int]:
    """What was found, and over how many windows."""
    module, tokenizer = start.opened.module, start.opened.tokenizer
    try:
        objective = config.objective_over(ids, _context(start, asked), vocabulary(tokenizer))
    except ValueError as error:
        raise Refusal(f"the text has {error}") from error
    shape = config.model(tokenizer.get_vocab_size())
    with torch.device("meta"):
        wanted = type(objective.model(shape))
    if not isinstance(module, wanted):
        raise Refusal(
            f"{start.folder} holds one part of what --objective {objective.name} trains, which is lost with state/; "
            "give the run's whole folder"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = torch.from_numpy(bytes_of(tokenizer)) if objective.reports_bits_per_byte else None
    looking = Evaluation(
        objective, asked.batch, device, asked.dtype, bytes_of=sizes, remembers=config.remembers(shape)
    )  # fmt: skip
    windows = min(asked.windows or objective.windows, objective.windows)
    return looking.of(module.to(device), windows), windows
