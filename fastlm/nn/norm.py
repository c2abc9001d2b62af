"""Norms that take the residual branch's addition into their pass, in the place of torch.nn's."""

from torch import Tensor, nn

from fastlm.backends.dispatch import Op
from fastlm.checks import finite, flag
from fastlm.ops.norm import Arguments, default_eps, layer_norm, rms_norm, sum_dtype


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm, with its arguments and state dict, over rows to which a residual may be added first.

        y = (s - mean(s)) / √(var(s) + eps) · weight + bias          s = x, or x + residual

    Args:
        normalized_shape: the last dimensions of x, or the last one as an int.
        eps: is added to the variance. Default 1e-5.
        elementwise_affine: whether there is a weight. Default True.
        bias: whether there is a bias beside it. Default True.
        device, dtype: of the parameters.

    Ba et al. 2016.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of rows.

        Args:
            x: [..., *normalized_shape] floats.
            residual: like x, or None. A pre-norm model gives its stream here and a branch as x.

        Returns:
            y like x; with a residual (y, s), both in the wider of the two dtypes.

        Raises:
            ValueError: for shapes that do not fit.
        """
        return _normed(layer_norm, self, x, residual, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm, with its arguments and state dict, over rows to which a residual may be added first.

        y = s / √(mean(s²) + eps) · (weight + weight_offset)         s = x, or x + residual

    Args:
        normalized_shape: the last dimensions of x, or the last one as an int.
        eps: is added to the mean square. None, the default: the least step from 1 in fp32, in fp64 for fp64.
        elementwise_affine: whether there is a weight. Default True.
        device, dtype: of the parameters.
        weight_offset: is added to the weight, which starts at 1 less: 1.0 for Gemma. Default 0.0.
        rounds_first: whether the normed row is rounded to 16 bits before the weight multiplies it, as in Llama and T5.
            Default False.

    Raises:
        ValueError: for options that are no number, or neither True nor False.

    Zhang and Sennrich 2019.
    """

    def __init__(
        self,
        normalized_shape,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device=None,
        dtype=None,
        *,
        weight_offset: float = 0.0,
        rounds_first: bool = False,
    ):
        if not finite(weight_offset):
            raise ValueError(f"weight_offset is {weight_offset!r}; give a number, such as 1.0 for Gemma's weights")
        flag(rounds_first=rounds_first)
        self.weight_offset, self.rounds_first = float(weight_offset), rounds_first
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        """weight + weight_offset ← 1"""
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """As `LayerNorm.forward`."""
        eps = default_eps(sum_dtype(x, residual)) if self.eps is None else self.eps
        return _normed(rms_norm, self, x, residual, None, eps, self.weight_offset, self.rounds_first)


def _normed(
    op: Op,
    module: LayerNorm | RMSNorm,
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    rounds_first: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    shape = module.normalized_shape
    if x.shape[-len(shape) :] != shape:
        raise ValueError(f"x is {list(x.shape)}; its last dimensions must be {list(shape)}, which the norm is over")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual is {list(residual.shape)} and x {list(x.shape)}; give them one shape")
    options = eps, weight_offset, rounds_first
    if len(shape) > 1:
        flat = [None if t is None else t.flatten(-len(shape)) for t in (x, residual, module.weight, bias)]
        y, s, _ = op(Arguments(*flat, *options))
        return y.view(x.shape) if residual is None else (y.view(x.shape), s.view(x.shape))
    y, s, _ = op(Arguments(x, residual, module.weight, bias, *options))
    return y if residual is None else (y, s)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}  # by their names in a model's config
