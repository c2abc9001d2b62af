"""The feed-forward layers and norms that language models are made of, by their names in a model's config."""

import torch.nn.functional as F
from torch import Tensor, nn


class GeluMLP(nn.Module):
    """The feed-forward layer of GPT-2 (Radford et al. 2019): out(gelu(inner(x))), with the tanh approximation of GELU.

    Args:
        dim: width of the input and the output: [..., dim] → [..., dim].
        hidden: width between the two linear layers.
        bias: whether the linear layers have a bias.
    """

    def __init__(self, dim: int, hidden: int, bias: bool):
        super().__init__()
        self.inner = nn.Linear(dim, hidden, bias=bias)
        self.out = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.inner(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """The gated feed-forward layer of Llama (Shazeer 2020): out(silu(gate(x)) · up(x)).

    Args:
        dim: width of the input and the output: [..., dim] → [..., dim].
        hidden: width of gate and up, which are the two halves of one matrix, `inner`, gate first.
        bias: whether the linear layers have a bias.
    """

    def __init__(self, dim: int, hidden: int, bias: bool):
        super().__init__()
        self.inner = nn.Linear(dim, 2 * hidden, bias=bias)
        self.out = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.inner(x).chunk(2, -1)
        return self.out(F.silu(gate) * up)


MLPS = {"gelu": GeluMLP, "swiglu": SwiGLU}
NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}
