"""A picture of every positional scheme and mask: where attention goes when the content says nothing.

    python benchmarks/gallery.py [PICTURE]        writes benchmarks/results/gallery.png unless told otherwise

Queries and keys are all equal and the values are the unit matrix, so what `fastlm.attention` returns is its
probabilities: query down, key across, one head, each row divided by its largest.
"""

import argparse
from pathlib import Path

import torch

import fastlm
from fastlm.positions import ALiBi, Kerple, RoPE, T5Bias, TransformerXL

LENGTH = 64  # of the sequence and of the heads, so that the values can be a unit matrix


def learned(position: torch.nn.Module, std: float) -> torch.nn.Module:
    """The scheme with parameters as large as training makes them; those of a new one hardly show."""
    for p in position.parameters():
        torch.nn.init.normal_(p, std=std)
    return position


def schemes() -> dict[str, dict]:
    """Title → what `fastlm.attention` is given."""
    torch.manual_seed(3)
    starts, visits = torch.tensor([0, 20, 44, LENGTH]), torch.randperm(8).repeat_interleave(LENGTH // 8)[None]
    kerple = Kerple(8)
    torch.nn.init.ones_(kerple.r1), torch.nn.init.ones_(kerple.r2)
    return {
        "RoPE": dict(position=RoPE(LENGTH), scale=0.05),
        "ALiBi": dict(position=ALiBi(8)),
        "T5": dict(position=learned(T5Bias(8, causal=False), 1.0)),
        "KERPLE": dict(position=kerple),
        "Transformer-XL": dict(position=learned(TransformerXL(64, 8, LENGTH), 0.06)),
        "causal": dict(causal=True),
        "ALiBi, causal, window 24": dict(position=ALiBi(8), causal=True, window=24),
        "prefix 20": dict(causal=True, prefix=torch.tensor([20])),
        "packed documents": dict(position=ALiBi(8), segments=fastlm.masks.segments_from_cu_seqlens(starts, LENGTH)),
        "blocks in a visiting order": dict(order=(visits, visits)),
    }


@torch.no_grad()
def probabilities(**given) -> torch.Tensor:
    """[LENGTH, LENGTH]: a middle head's, each row over its maximum."""
    q = torch.ones(1, 8, LENGTH, LENGTH)
    values = torch.eye(LENGTH).expand(1, 8, -1, -1).contiguous()
    rows = fastlm.attention(q, q, values, **given)[0, 3]
    return rows / rows.amax(-1, keepdim=True)


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    pictures = {title: probabilities(**given) for title, given in schemes().items()}
    figure, axes = plt.subplots(2, 5, figsize=(11, 4.9), layout="constrained")
    for axis, (title, picture) in zip(axes.flat, pictures.items(), strict=True):
        axis.imshow(picture, cmap="magma", vmin=0, vmax=1)
        axis.set_title(title, fontsize=10)
        axis.set_xticks([]), axis.set_yticks([])
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="A picture of every positional scheme and mask.")
    parser.add_argument("picture", nargs="?", type=Path, default=Path(__file__).parent / "results" / "gallery.png")
    draw(parser.parse_args().picture)


if __name__ == "__main__":
    main()
