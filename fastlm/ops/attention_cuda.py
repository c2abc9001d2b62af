"""Attention by CUDA C++ (csrc/cuda/attention), ranked below Triton and chosen by `use_backend(attention="cuda")`."""

import torch

from fastlm.backends import native
from fastlm.ops.attention import TENSORS, Arguments, attention, attention_backward, in_order, names_needing_grad
from fastlm.ops.attention_backends import too_old

TERMS = {  # name → how its kernels take it
    "table": lambda x: x.float().contiguous(),
    **dict.fromkeys(("key_lengths", "prefix", "q_segments", "k_segments"), lambda x: x.long().contiguous()),
}
OTHERS = tuple(name for name in TENSORS if name not in ("q", "k", "v", *TERMS))


def _unavailable(device: torch.device) -> str | None:
    missing = native.cuda_missing(device)
    if missing or device.type != "cuda":
        return missing
    return too_old(device, "CUDA")


def _refuses(a: Arguments) -> str | None:
    if a.q.dtype not in (torch.bfloat16, torch.float16):
        return f"query is {a.q.dtype}; served are fp16 and bf16"
    D = a.q.shape[3]
    if D > 128 or D % 8 or D == 0:
        return f"the head dimension is {D}; served are multiples of 8 up to 128"
    for name in OTHERS:
        if getattr(a, name) is not None:
            return f"it does not serve {name}"
    if a.q.shape[2] + a.k.shape[2] + abs(a.offset) >= 2**29:
        return f"the offset is {a.offset} for {a.q.shape[2]} queries and {a.k.shape[2]} keys; served are sums below 2²⁹"
    for name in ("dropout", "softcap"):
        if getattr(a, name):
            return f"it does not serve {name}"
    if a.scale <= 0:
        return f"scale is {a.scale}; served are positive scales, so negate query"
    if a.left + a.right < 0:
        return f"the band from -{a.left} to {a.right} is empty"
    for name in ("k", "v"):
        if getattr(a, name).dtype != a.q.dtype:
            return f"{name} is {getattr(a, name).dtype} and query {a.q.dtype}; served are equal dtypes"
    return None


def _backward_refuses(grad, grad_lse, out, lse, a, needs_grad) -> str | None:
    return _refuses(a)


@attention.backend("cuda", devices=("cuda",), unavailable=_unavailable, refuses=_refuses)
def _(a):
    """Memory besides arguments and results: with segments, 16 bytes for every 64 queries and every 64 keys of a row."""
    q, k, v, _terms, addresses = _laid_out(a)
    out, lse = a.q.new_empty(a.q.shape), a.q.new_empty(a.q.shape[:3], dtype=torch.float32)
    workspace = a.q.new_empty(native.cuda().attention_workspace(q.shape, k.shape, addresses), dtype=torch.uint8)
    native.cuda().attention(
        *map(native.view, (q, k, v)), native.DTYPES[q.dtype], addresses, (a.left, a.right, a.offset), a.scale,
        out.data_ptr(), lse.data_ptr(), native.address(workspace), *native.cuda_stream(q.device),
    )  # fmt: skip
    return out, lse


@attention_backward.backend("cuda", devices=("cuda",), unavailable=_unavailable, refuses=_backward_refuses)
def _(grad, grad_lse, out, lse, a, needs_grad):
    """Memory besides arguments and results: 8 bytes a query of each head, for a table's gradient partial sums of
    H · (Lq + Lk) numbers and up to 16 times that, and what it takes ahead.
    """
    q, k, v, terms, addresses = _laid_out(a)
    grad, out, lse = native.chunked(grad), out.contiguous(), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    made = {name: getattr(a, name).new_empty(getattr(a, name).shape) for name in ("q", "k", "v")}
    if "table" in names_needing_grad(a, needs_grad):
        made["table"] = torch.empty_like(terms["table"])
    band = a.left, a.right, a.offset
    size = native.cuda().attention_backward_workspace(q.shape, k.shape, addresses, band, "table" in made)
    workspace = a.q.new_empty(size, dtype=torch.uint8)
    native.cuda().attention_backward(
        native.view(grad), native.address(grad_lse), *map(native.view, (q, k, v)), native.DTYPES[q.dtype], addresses,
        band, a.scale, out.data_ptr(), lse.data_ptr(),
        *(native.address(made.get(name)) for name in ("q", "k", "v", "table")), native.address(workspace),
        *native.cuda_stream(q.device),
    )  # fmt: skip
    return in_order(made, a, needs_grad, lse)


def _laid_out(a: Arguments) -> tuple:
    """q, k and v as its kernels take them, the call's terms by name, and their addresses. All must outlive the call."""
    terms = {name: layout(x) for name, layout in TERMS.items() if (x := getattr(a, name)) is not None}
    return *map(native.chunked, (a.q, a.k, a.v)), terms, {name: native.address(x) for name, x in terms.items()}
