"""The functions people call."""

from typing import TYPE_CHECKING, Literal, NoReturn, overload

import torch
from torch import Tensor

from fastlm.backends.dispatch import BackendError
from fastlm.backends.eager import transformed
from fastlm.checks import flag
from fastlm.nn import checks, torch_forms
from fastlm.nn.arguments import CommonOptions, arguments, turned
from fastlm.ops.attention import attention as attention_op
from fastlm.ops.attention_twice import ONCE
from fastlm.positions import Position, Terms

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class Options(CommonOptions, total=False):
        """attention's, for the two signatures that type checkers see."""

        position: Position | Terms | None
        bias: Tensor | None
        segments: Tensor | tuple[Tensor, Tensor] | None
        offset: int | None


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[False] = ..., **options: "Unpack[Options]"
) -> Tensor: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_lse: Literal[True], **options: "Unpack[Options]"
) -> tuple[Tensor, Tensor]: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    position: Position | Terms | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | int | None = None,
    prefix: Tensor | None = None,
    segments: Tensor | tuple[Tensor, Tensor] | None = None,
    key_lengths: Tensor | None = None,
    order: tuple[Tensor, Tensor] | None = None,
    group_bias: tuple[Tensor, Tensor, Tensor] | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    offset: int | None = None,
    return_lse: bool = False,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with any positional scheme and any mask, without an L×L tensor.

    Every mask holds beside the others. Queries that see no key give zeros, and zero gradients.

    Args:
        query: [B, H, Lq, D]; fp32, bf16 or fp16 (fp64 by the definition, and slowly).
        key: [B, Hk, Lk, D] in query's dtype, where H is a multiple of Hk (grouped-query attention).
        value: like key.
        position: a scheme of `fastlm.positions`, or what its `terms` made of this call's lengths and offset, once for
            every layer that shares the scheme. None: no position.
        bias: [1|B, 1|H, 1|Lq, 1|Lk] floats, added to the scores after scale; its gradient has its own shape.
        causal: whether key j is visible to query i only if j ≤ i + offset.
        window: (left, right) keys visible around each query's own, None on a side for no bound; an int for both sides.
        prefix: [B] int; keys before it are visible to every query, be the call causal or windowed.
        segments: [B, L] int, or a tuple (of queries [B, Lq], of keys [B, Lk]); a query sees the keys of its own
            segment, so that packed documents do not mix. `masks.segments_from_cu_seqlens` makes them from cu_seqlens.
            Positions need not start over in each segment while queries and keys are packed alike. Where they are not,
            causal, window and position would count along the row, which is refused on a CPU, where reading them waits
            for nothing; `masks.ranks_from_cu_seqlens` gives the order that causal documents have.
        key_lengths: [B] int; keys past a row's length are padding.
        order: (ranks of queries [B, Lq], ranks of keys [B, Lk]) int; a key is visible to queries that do not rank below
            it. For XLNet's query stream, which must not see its own token, take the ranks of queries minus 1.
        group_bias: (x [B, H, Lq] fp32, groups of queries [B, Lq], groups of keys [B, Lk]); x is added where a query's
            and a key's groups are equal (XLNet's relative segments).
        dropout: share of the probabilities that is dropped, in [0, 1); the rest grow by 1/(1 - dropout).
        seed: 0 … 2⁶³ - 1, of the dropout: the same seed drops the same ones on every backend. None: drawn from torch's
            generator; a captured CUDA graph repeats its own.
        scale: of the products. None: 1/√D, and 1/√(3D) for DeBERTa's three.
        softcap: bounds the scaled products x, those with a scheme's vectors among them, as softcap · tanh(x / softcap),
            before a table, a bias and masks come to them (Gemma 2). None: no bound.
        offset: the first query's position among the keys. None: Lk - Lq, so that the last query stands at the last
            key, and a decoding step needs no argument.
        return_lse: whether to return log Σ exp(score) too.

    Returns:
        [B, H, Lq, D] in query's dtype; with return_lse a tuple of it and [B, H, Lq] fp32, -inf where no key is seen.

    Raises:
        ValueError: for shapes, dtypes, devices or values that do not fit, with what would.
        TypeError: for an argument of another library, with what takes its place here.

    Keys and values past key_lengths may hold anything. All others must be finite, and for gradients queries too, be
    they masked or not: they weigh zero in sums, where 0 · NaN is NaN, here as in PyTorch's attention.

    Differentiable once, and more often under `use_backend("reference")`. Gradients come from the log-sum-exp in fp32:
    where all of a row's scores are large, by -1e4 say, they lose as many digits as it does.

    Vaswani et al. 2017; the kernels: Dao 2023, FlashAttention-2. The formula: fastlm/ops/attention.py.
    """
    if unknown:
        checks.unknown(*unknown)
    checks.no_tracing("attention")
    a = arguments(
        query, key, value, position=position, bias=bias, causal=causal, window=window, prefix=prefix, segments=segments,
        key_lengths=key_lengths, order=order, group_bias=group_bias, dropout=dropout, seed=seed, scale=scale,
        softcap=softcap, offset=offset, return_lse=return_lse,
    )  # fmt: skip
    out, lse = attention_op(a)
    _refuse_second_derivatives(out)
    return (out, lse) if return_lse else out


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, whose arguments these are, by `fastlm.attention`.

    A mask that hides keys from all queries alike is padding, which costs less; any other is read as it is. Dropout
    draws by fastlm's generator. Returns [..., H, Lq, Dv]; queries that see no key give zeros. Raises ValueError for
    what does not fit, attn_mask beside is_causal among it.
    """
    checks.tensors(query=query, key=key, value=value)
    flag(is_causal=is_causal, enable_gqa=enable_gqa)
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask is given and is_causal is True; give one of the two")
    (q, k, v, mask), lead = torch_forms.of_four_dimensions(query, key, value, attn_mask, enable_gqa)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, width = torch_forms.of_one_width(q, k, v)
    seen = {} if mask is None else torch_forms.mask_arguments(mask, q.shape[0], q.shape[2])
    seen |= {"causal": True, "offset": 0} if is_causal else {}
    out = attention(q, k, v, scale=scale, dropout=dropout_p, **seen)[..., :width]
    return out.reshape(*lead, *out.shape[2:])


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, layout: str = "half") -> Tensor:
    """Turn pairs of channels by angles, as rotary embedding does (Su et al. 2021, eq. 34).

    Args:
        x: [B, H, L, D] floats.
        cos: [L, R/2], or [B, L, R/2] where positions differ by row; fp32 (fp64 for x in fp64).
        sin: like cos.
        layout: "half" pairs channel i with i + R/2 (NeoX, Llama), "interleaved" pairs 2i with 2i + 1 (the paper).

    Returns:
        [B, H, L, D] in x's dtype; channels from R on are x's own.

    Raises:
        ValueError: for shapes, devices or a layout that do not fit.
    """
    checks.no_tracing("rotate")
    return turned(x, (cos, sin), layout)


for _function in (attention, rotate):  # torch.jit.script asks a function for this sentence, and stops with it
    _function.__script_unsupported = (
        f"fastlm.{_function.__name__} is not for torch.jit.script; use torch.compile or torch.export"
    )


class _Once(torch.autograd.Function):
    """Gradients as they are, of which there are no derivatives."""

    @staticmethod
    def forward(ctx, *grads):
        return grads

    @staticmethod
    def backward(ctx, *grads):
        raise BackendError(ONCE)


def _refuse_second_derivatives(out: Tensor) -> None:
    """In words, where PyTorch's own kernels computed; fastlm's op says it itself."""
    if out.requires_grad and not torch.compiler.is_compiling() and not transformed():
        node = out.grad_fn
        if type(node).__name__ == "SliceBackward0":  # on GPUs they pad channels to eights
            node = node.next_functions[0][0]
        if type(node).__name__.startswith("ScaledDotProduct"):
            node.register_hook(_once)


def _once(grads: tuple[Tensor | None, ...], _) -> tuple[Tensor | None, ...] | None:
    return _Once.apply(*grads) if torch.is_grad_enabled() else None
