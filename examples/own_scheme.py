"""A positional scheme of one's own, trained from scratch beside others, and read far beyond the training length; CPU,
under a minute. Draws own_scheme.png.

    python examples/own_scheme.py

Needs: pip install fastlm matplotlib
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import fastlm
from fastlm.models import Transformer
from fastlm.models.presets import preset

WORDS, TRAINED, LENGTHS = 32, 32, (32, 64, 128, 256)


class Logarithmic(fastlm.positions.Position, name="logarithmic"):
    """-r · log(1 + distance), r learned for each head: KERPLE's logarithmic kernel with its scale left out."""

    def __init__(self, heads: int):
        super().__init__()
        self.r = torch.nn.Parameter(torch.linspace(0.5, 4.0, heads))

    def bias(self, distance):
        return -self.r[:, None] * torch.log1p(distance.abs())


def rows(n: int, L: int, draw: torch.Generator) -> torch.Tensor:
    """[n, L] int64: each word is one of the two before it, plus one, by chance."""
    words = torch.randint(WORDS, (n, L), generator=draw)
    back = torch.randint(1, 3, (n, L), generator=draw)
    for i in range(2, L):
        words[:, i] = (words.gather(1, (i - back[:, i])[:, None])[:, 0] + 1) % WORDS
    return words


def loss(model: Transformer, words: torch.Tensor) -> torch.Tensor:
    """Nats a word, of the last TRAINED words of each row."""
    logits = model(words[:, :-1])[:, -TRAINED + 2 :]
    return F.cross_entropy(logits.flatten(0, 1), words[:, -TRAINED + 2 :].flatten())


def train(position: str, steps: int = 200) -> dict[int, float]:
    """The loss at each of LENGTHS, after training at the first."""
    torch.manual_seed(0)
    config = preset("gpt", position=position, vocab_size=WORDS, dim=64, layers=2, heads=4, context=max(LENGTHS))
    model, draw = Transformer(config), torch.Generator().manual_seed(1)
    optimizer = fastlm.optim.AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, rows(16, TRAINED, draw)).backward()
        optimizer.step()
    with torch.no_grad():
        return {L: loss(model.eval(), rows(64, L, draw)).item() for L in LENGTHS}


def curves(positions: tuple[str, ...] = ("logarithmic", "alibi", "rope", "learned")) -> Iterator[tuple[str, dict]]:
    for name in positions:
        yield name, train(name)


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    for name, found in curves():
        print(f"{name:12} " + "  ".join(f"L {L}: {nats:.3f}" for L, nats in found.items()))
        plt.plot(list(found), list(found.values()), marker="o", label=name)
    plt.axvline(TRAINED, color="grey", linewidth=0.8)
    plt.xscale("log", base=2)
    plt.xlabel("length; trained up to the line")
    plt.ylabel("nats a word")
    plt.legend(frameon=False)
    plt.savefig("own_scheme.png", dpi=150)
