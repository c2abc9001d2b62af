"""Weights that are drawn back to where they began: L2-SP (Li, Grandvalet & Davoine 2018, "Explicit inductive bias for
transfer learning with convolutional networks").

    w ← w - lr·α·(w - w₀)      after each step of the optimizer

Theirs is a term of the loss, α/2 ‖w - w₀‖². This is decoupled from the loss, as AdamW's decay is (Loshchilov & Hutter
2019): Adam would divide that term's gradient by the size of all gradients, so that weights which move far were held
least, and clipping would take a share of it.
"""

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, nn

from fastlm.optim.sharding import local, placed_as
from fastlm.trainer.options.training import Training
from fastlm.trainer.words import Refusal


class Pull:
    """What draws a model's weights back.

    Args:
        strength: α.
        model: in training, divided among ranks or not.
        starts: the names of the parameters that are drawn back, and w₀ of each, whole.

    Raises:
        ValueError: for starts that are of another model.
    """

    def __init__(self, strength: float, model: nn.Module, starts: Iterable[tuple[str, Tensor]]):
        self.strength, self.starts, named = strength, {}, dict(model.named_parameters())
        for name, start in starts:
            if name not in named or named[name].shape != start.shape:
                raise ValueError(f"the model has no parameter {name} {list(start.shape)} to be drawn back")
            p = named[name]
            self.starts[p] = local(placed_as(start.to(p.device), p)).detach().clone()

    @torch.no_grad()
    def step(self, groups: list[dict], skipped: Tensor | None) -> None:
        """Draw the parameters of an optimizer's groups back, each by its group's rate. skipped: 1 where the optimizer
        left all as it was, and so does this; the host does not wait for it.
        """
        for group in groups:
            share = group["lr"] * self.strength
            share = share if skipped is None else share * (1 - skipped)
            for p in group["params"]:
                if p in self.starts:
                    local(p).lerp_(self.starts[p], share)


def starts_of(model: nn.Module, anew: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model by their names, but those that were drawn anew. One of two names is not new if one of
    them is not.
    """
    new, named = set(anew), model.named_parameters(remove_duplicate=False)
    given = {id(p) for name, p in named if name not in new}
    return ((name, p.detach()) for name, p in model.named_parameters() if id(p) in given)


def check(config: Training) -> None:
    """Raises Refusal for a pull that would go beyond the start."""
    if config.pull * config.lr > 1:
        asked = f"--pull {config.pull:g} times --lr {config.lr:g} is {config.pull * config.lr:.3g}"
        raise Refusal(f"{asked}; above 1, weights are drawn past where they began: give less of one of them")
