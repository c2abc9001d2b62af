"""RMS norms, known by what they compute: their classes are many, and a name promises nothing.

A module with one weight is asked for rows of several sizes, in fp32 and in bf16, and answers as one of three do:

    PlainNorm           n · weight, rounded at the end                     torch's, OLMo 2
    RoundingNorm        n is rounded before the weight multiplies it       Llama and its kin, T5
    OffsetNorm          n · (1 + weight)                                   Gemma
"""

import copy
import inspect
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastlm.interop.swap.served import Served
from fastlm.ops.norm import Arguments, default_eps, rms_norm

EPS = ("variance_epsilon", "eps")  # what transformers and torch call it
DIFFERENT = 0.01  # share of bf16 results that may differ, for sums in another order; another rounding changes a tenth


class PlainNorm(Served):
    how = "fastlm's RMS norm, a pass each way"
    weight_offset: ClassVar[float] = 0.0
    rounds_first: ClassVar[bool] = False

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:  # classes differ in the dtype that comes out
            return super().forward(x)
        return normed(self, type(self), x)


class RoundingNorm(PlainNorm):
    rounds_first = True


class OffsetNorm(PlainNorm):
    weight_offset = 1.0


KINDS = (PlainNorm, RoundingNorm, OffsetNorm)


def normed(module: nn.Module, kind: type[PlainNorm], x: Tensor, op=rms_norm) -> Tensor:
    eps = next(getattr(module, name) for name in EPS if hasattr(module, name))
    eps = default_eps(x.dtype) if eps is None else eps
    return op(Arguments(x, None, module.weight, None, eps, kind.weight_offset, kind.rounds_first))[0]


def is_norm(module: nn.Module) -> bool:
    """Whether a module may be an RMS norm, by the names that classes of them have; T5's is a T5LayerNorm."""
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and not isinstance(module, nn.LayerNorm)


def kind_of(module: nn.Module) -> type[PlainNorm] | None:
    """Which of KINDS computes what a module does, or None."""
    weight, eps = getattr(module, "weight", None), [name for name in EPS if hasattr(module, name)]
    alone = [name for name, _ in module.named_parameters()] == ["weight"] and not list(module.buffers())
    takes = list(inspect.signature(type(module).forward).parameters)
    if not alone or weight.ndim != 1 or not eps or len(takes) != 2 or list(module.children()):
        return None
    random = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=random)
    rows, drawn = draw(4, len(weight)) * torch.tensor([[1e-4], [1e-2], [1.0], [1e2]]), draw(len(weight))
    asked = copy.copy(module)  # its hooks and its weight stay out of it
    kinds = list(KINDS)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            asked._parameters = module._parameters | {"weight": nn.Parameter(drawn.to(dtype))}
            x = rows.to(dtype)
            want = asked.forward(x)
            kinds = [kind for kind in kinds if _same(normed(asked, kind, x, rms_norm.definition), want)]
    return kinds[0] if kinds else None


def _same(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if got.dtype == torch.float32:
        return torch.allclose(got, want, rtol=1e-4, atol=0)
    return (got != want).float().mean().item() <= DIFFERENT
