"""A trained model writes."""

from collections.abc import Callable

import torch
from tokenizers import Tokenizer

from fastlm.models.heads import Headed
from fastlm.trainer.commands.opening import trained
from fastlm.trainer.data.tokenizer import EOS, PAD
from fastlm.trainer.options.folders import Sample
from fastlm.trainer.words import Refusal

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
    model, _, tokenizer, _ = trained(asked.folder, asked.plugin, note)
    if isinstance(model, Headed):
        raise Refusal(f"{asked.folder} was taught to label, and writes no text; `fastlm predict` says what it labels")
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
