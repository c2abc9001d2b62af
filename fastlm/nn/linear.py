"""Linear layers, in the place of torch.nn's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.backends.eager import observed
from fastlm.ops.linear import FEW, linear_of_few_rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, with a kernel of our own where a text is written on a CPU: for at most eight rows of
    x whose gradient nobody asks for, but for one row of fp16, of which PyTorch's kernel is faster.

    Args:
        x: [..., K] floats.
        weight: [N, K], in x's dtype.
        bias: [N], in x's dtype, or None.

    Returns:
        [..., N]

    Raises:
        RuntimeError: PyTorch's, for shapes, dtypes and devices that do not fit.
    """
    return linear_of_few_rows(x, weight, bias) if _few(x, weight, bias) else F.linear(x, weight, bias)


def _few(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = (x, weight, bias)
    if observed(given) or x.device.type != "cpu" or x.ndim == 0:
        return False
    rows = x.shape[:-1].numel()
    if rows > FEW or (rows == 1 and x.dtype == torch.float16):
        return False
    tensors = (x, weight) if bias is None else given
    return (
        not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and all(t.dtype == x.dtype and t.device == x.device for t in tensors)
        and weight.ndim == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
    )


class Linear(nn.Linear):
    """torch.nn.Linear, state dict included, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
