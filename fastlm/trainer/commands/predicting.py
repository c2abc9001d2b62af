"""A fine-tuned model answers: what it says of the rows of a file."""

import json
from collections.abc import Callable

import numpy as np
import torch

from fastlm.trainer.commands.opening import trained
from fastlm.trainer.data.files import Skipped
from fastlm.trainer.data.tokenizer import vocabulary
from fastlm.trainer.options.folders import Predict
from fastlm.trainer.tasks import rows
from fastlm.trainer.tasks.examples import encoded, encoding_of
from fastlm.trainer.words import Refusal


@torch.no_grad()
def write(asked: Predict, show: Callable[[str], None], note: Callable[[str], None]) -> None:
    """Say what a fine-tuned model makes of each row, a line of JSON each: the row's texts and "prediction".

    Args:
        asked: the command's flags.
        show: called with each line.
        note: called with a line about where the weights are from, if they are no finished run's, and about rows that
            are left out.

    Raises:
        Refusal: naming the file, for what is missing or damaged, and for a folder that was not fine-tuned.
    """
    opened = trained(asked.folder, asked.plugin, note, whole=True)
    if opened.plan is None or opened.plan.config.command != "finetune":
        raise Refusal(f"{asked.folder} was not fine-tuned; `fastlm finetune {asked.folder}` does it")
    config, known, skipped = opened.plan.config, vocabulary(opened.tokenizer), Skipped()
    _, found = rows.read(asked.file, "", config.kind, skipped.add, answered=False)
    answer = config.labels[0] if config.labels else "0"  # which nothing is made of
    asked_of = [row._replace(answer=answer) for row in found]
    examples = encoded(asked_of, config, known, encoding_of(opened.tokenizer), skipped.add)
    for line in skipped.lines():
        note(f"skipped {line}")
    model, task = opened.module.eval(), config.objective_over(examples, config.model(known.size).context, known)
    for first in range(0, len(examples), config.batch):
        some = examples[first : first + config.batch]
        batch = task.fixed(np.arange(first, first + len(some)))
        for example, said in zip(some, task.answers(model, batch, some, opened.tokenizer.decode), strict=True):
            row = rows.shown(config.kind, example.said) | {"prediction": said}
            show(json.dumps(row, ensure_ascii=False))
