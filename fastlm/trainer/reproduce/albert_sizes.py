"""Parameters of ALBERT and BERT, counted."""

from dataclasses import replace

import torch

from fastlm.models import Transformer
from fastlm.models.presets import PRESETS
from fastlm.trainer.reproduce.experiment import Claim, Experiment, Finding, Setting

# millions, as the paper's table 1 rounds them
PAPER = {
    "bert-base": 108, "bert-large": 334, "albert-base": 12, "albert-large": 18, "albert-xlarge": 60,
    "albert-xxlarge": 235,
}  # fmt: skip


class AlbertSizes(Experiment, name="albert-sizes"):
    of = "Lan et al. 2020, table 1: parameters of BERT and ALBERT; no seeds, for nothing is drawn"
    limits = (
        "Only parameters are counted here. That ALBERT is as good as BERT with fewer is not shown, nor that it is "
        "faster: it computes as much as a BERT of its shape, for its layers are as many."
    )

    def run(self, setting: Setting) -> Finding:
        counts = {name: _model(name).parameter_count() for name in PAPER}
        parts = {name: _parts(name) for name in PAPER}
        rows = [
            (name, f"{n / 1e6:.2f} M", f"{PAPER[name]} M", *(f"{x / 1e6:.2f} M" for x in parts[name]))
            for name, n in counts.items()
        ]
        ratio = counts["bert-large"] / counts["albert-large"]
        gaps = {name: abs(n / 1e6 - PAPER[name]) for name, n in counts.items()}
        claims = [
            Claim("Every count is the paper's, to a million.", max(gaps.values()) < 1),
            Claim(
                "But for ALBERT-xxlarge, every count is the paper's to one and a half.",
                max(gap for name, gap in gaps.items() if name != "albert-xxlarge") < 1.5,
            ),
            Claim(f"ALBERT-large has 18 times fewer parameters than BERT-large ({ratio:.1f}).", 17.5 < ratio < 19),
        ]
        columns = ("model", "parameters", "the paper's", "in embeddings", "in layers")
        return Finding(columns, rows, claims, lambda figure: _draw(figure, parts), {"counts": counts})


def _model(name: str) -> Transformer:
    """With the pooler of the first token, and without the heads of pretraining, as the paper seems to count."""
    with torch.device("meta"):
        return Transformer(replace(PRESETS[name], head="none", pair_labels=0, pooler=True))


def _parts(name: str) -> tuple[int, int]:
    model = _model(name)
    embedding = {id(p): p.numel() for p in model.embedding.parameters()}
    layers = {id(p): p.numel() for p in model.encoder.parameters()}
    return sum(embedding.values()), sum(layers.values())


def _draw(figure, parts: dict[str, tuple[int, int]]) -> None:
    axes = figure.subplots()
    embeddings, layers = zip(*parts.values(), strict=True)
    axes.barh(list(parts), [x / 1e6 for x in embeddings], label="embeddings")
    axes.barh(list(parts), [x / 1e6 for x in layers], left=[x / 1e6 for x in embeddings], label="layers")
    axes.set(xlabel="millions of parameters")
    axes.invert_yaxis()
    axes.legend()
