"""The feed-forward layer, with any activation by its name in a model's config."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.checks import below_one, flag, one_of, whole
from fastlm.nn.linear import Linear
from fastlm.nn.recompute import recomputed
from fastlm.ops import gate


def _activated(name: str, x: Tensor) -> Tensor:
    return gate.activated(x, name)


# by their names in a model's config; fastlm/ops/gate.py has their formulas
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {name: partial(_activated, name) for name in gate.ACTIVATIONS}


class MLP(nn.Module):
    """The feed-forward layer: out(f(inner(x))), or gated out(f(gate(x)) · up(x)), [..., dim] → [..., dim].

    Args:
        dim: width of the input and the output.
        hidden: width between the two linear layers. A gated layer's `inner` is [2·hidden, dim], gate first.
        activation: f, by its name in ACTIVATIONS: "gelu", "gelu_tanh", "relu", "silu" or "tanh". Default "gelu".
        gated: whether it is gated. With "silu" that is Llama's SwiGLU, with "gelu_tanh" T5 v1.1's GEGLU.
        bias: whether the linear layers have a bias. Default True.
        dropout: share of what `out` reads that is dropped while training, in [0, 1). Default 0.

    Raises:
        ValueError: for values that are out of range or unknown.

    Vaswani et al. 2017; the gate: Shazeer 2020.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        whole(1, dim=dim, hidden=hidden)
        one_of(ACTIVATIONS, activation=activation)
        flag(gated=gated, bias=bias)
        below_one(dropout=dropout)
        self.activation, self.gated, self.dropout = activation, gated, dropout
        self.inner = Linear(dim, (1 + gated) * hidden, bias=bias)
        self.out = Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        between = partial(gate.gated if self.gated else gate.activated, self.inner(x), self.activation)
        y = between()
        if self.dropout and self.training:
            return self.out(F.dropout(y, self.dropout))
        with recomputed(y, between):
            return self.out(y)
