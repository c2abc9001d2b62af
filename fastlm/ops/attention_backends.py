"""Who computes attention (fastlm/ops/attention.py): PyTorch's own kernels where nothing is positional, Triton on GPUs,
C++ on CPUs. CUDA C++, below Triton: attention_cuda.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.backends import native
from fastlm.backends.philox import threshold
from fastlm.masks import UNBOUNDED
from fastlm.ops.attention import (
    INTEGERS,
    ROWS,
    TENSORS,
    TERMS,
    VECTORS,
    Arguments,
    attention,
    attention_backward,
    in_order,
    names_needing_grad,
)
from fastlm.ops.distances import of_each

FP32 = torch.finfo(torch.float32)


def _kernels_refuse(a: Arguments) -> str | None:
    """What none of our own kernels serves."""
    if a.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"query is {a.q.dtype}; served are fp32, bf16 and fp16"
    if not 1 <= a.q.shape[3] <= 256:
        return f"the head dimension is {a.q.shape[3]}; served are 1 to 256"
    if a.softcap is not None and not FP32.tiny <= a.softcap <= FP32.max:
        return f"softcap is {a.softcap}; served are positive numbers that fp32 holds"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch


def _sdpa_refuses(a: Arguments) -> str | None:
    used = [name for name in TERMS if getattr(a, name) is not None]
    if used:
        return f"scaled_dot_product_attention takes {used[0]} only as an L×L tensor, if at all"
    if a.dropout or a.return_lse or a.softcap is not None:
        return "scaled_dot_product_attention has no dropout from a seed and no softcap, and returns no lse"
    causal = (a.left, a.right, a.offset) == (UNBOUNDED, 0, 0) and a.q.shape[2] == a.k.shape[2]
    if not causal and not _sees_all(a):
        return "scaled_dot_product_attention knows no mask, or causal with as many queries as keys"
    return None


def _sees_all(a: Arguments) -> bool:
    """Whether the band hides nothing, as when one query decodes."""
    return a.left >= a.q.shape[2] - 1 + a.offset and a.right >= a.k.shape[2] - 1 - a.offset


def _sdpa_is_slower(a: Arguments) -> bool:
    """On CPUs the C++ kernels take half the time and less from L = 512 on. Not for calls so small that the custom
    operator's own time counts, by a sweep in benchmarks/FACTS.md; nor for bf16 where the processor multiplies tiles of
    it (AMX), which was not measured.
    """
    if a.q.device.type != "cpu" or _cpp_refuses(a):
        return False
    smallest = 2**22 if a.q.dtype == torch.bfloat16 else 2**23
    return a.q.numel() * a.k.shape[2] >= smallest and _cpp_is_faster(a.q.dtype)


def _cpp_is_faster(dtype: torch.dtype) -> bool:
    return native.cpp_missing(torch.device("cpu")) is None and not (
        dtype == torch.bfloat16 and "amx" in native.cpu().available()
    )


# torch.compiler.assume_constant_result, which would import Dynamo, and so Triton, with fastlm
_cpp_is_faster._dynamo_marked_constant = True


@attention.backend(
    "sdpa", devices=("cpu", "cuda"), refuses=_sdpa_refuses, slower_than_next=_sdpa_is_slower, differentiable=True
)
def _(a):
    """PyTorch's own kernels (cuDNN, FlashAttention, CPU flash), which serve plain attention well. No lse."""
    options = {} if _sees_all(a) else {"is_causal": True}
    # a comparison of sizes is not a bool under torch.compile until it is asked like this
    if a.q.shape[1] != a.k.shape[1]:
        options["enable_gqa"] = True
    return F.scaled_dot_product_attention(a.q, a.k, a.v, scale=a.scale, **options), None


# ---------------------------------------------------------------------------------------------------------------------
# Triton


def _triton_unavailable(device: torch.device) -> str | None:
    missing = native.triton_missing(device)
    if missing or device.type != "cuda":
        return missing
    if torch.version.hip:
        return "the Triton kernels of attention hold NVIDIA assembly, and this is a ROCm build of torch"
    return too_old(device, "Triton")


def too_old(device: torch.device, language: str) -> str | None:
    """Why kernels for the tensor cores of sm_80 and later do not run there, or None."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"the {language} kernels of attention need compute capability 8.0, and {name} has less"
    return None


def _triton_refuses(a: Arguments) -> str | None:
    reason = _kernels_refuse(a)
    if reason is None and a.scale <= 0:
        return f"scale is {a.scale}; served are positive scales, so negate query"
    if reason is None and a.dropout and a.first_key % 4:
        return f"dropout counts keys from {a.first_key} on; served are multiples of 4, of which four share a draw"
    return reason


def _triton_backward_refuses(grad, grad_lse, out, lse, a, needs_grad) -> str | None:
    return _triton_refuses(a)


@attention.backend("triton", devices=("cuda",), unavailable=_triton_unavailable, refuses=_triton_refuses)
def _(a):
    from fastlm.kernels.attention import forward

    return forward(without_buckets(a))


@attention_backward.backend(
    "triton", devices=("cuda",), unavailable=_triton_unavailable, refuses=_triton_backward_refuses
)
def _(grad, grad_lse, out, lse, a, needs_grad):
    from fastlm.kernels.attention_backward import backward

    made = backward(grad, grad_lse, out, lse, without_buckets(a), set(names_needing_grad(a, needs_grad)))
    return in_order(made if a.buckets is None else _per_bucket(made, a.buckets), a, needs_grad, lse)


def without_buckets(a: Arguments) -> Arguments:
    """A vector for each distance, for kernels that know no buckets."""
    if a.buckets is None:
        return a
    given = ((name, getattr(a, name)) for name in VECTORS)
    return a._replace(buckets=None, **{name: of_each(x, a.buckets) for name, x in given if x is not None})


def _per_bucket(made: dict[str, Tensor], buckets: Tensor) -> dict[str, Tensor]:
    """Gradients of vectors by distance as sums over buckets, whose bits repeat on GPUs too."""
    distances = torch.bincount(buckets)
    summed = lambda x: torch.segment_reduce(x.transpose(0, 1).contiguous(), "sum", lengths=distances).transpose(0, 1)
    return made | {name: summed(made[name]) for name in VECTORS if name in made}


# ---------------------------------------------------------------------------------------------------------------------
# C++

# what its launcher takes by name
CPP_BY_NAME = tuple(name for name in TENSORS if name not in ("q", "k", "v", "table", "key_lengths"))
CPP_LAYOUTS = {  # name → how its kernels take it, given query's dtype
    **dict.fromkeys(ROWS, lambda x, dtype: native.side_by_side(x)),
    **dict.fromkeys(INTEGERS, lambda x, dtype: x.long().contiguous()),
    **dict.fromkeys(("table", "same"), lambda x, dtype: x.float().contiguous()),
    **dict.fromkeys(("bias", *VECTORS), lambda x, dtype: x if x.dtype in (dtype, torch.float32) else x.float()),
}


def _cpp_refuses(a: Arguments) -> str | None:
    reason = _kernels_refuse(a)
    if reason is not None:
        return reason
    for name in ROWS:
        x = getattr(a, name)
        if x is not None and x.dtype != a.q.dtype:
            return f"{name} is {x.dtype} and query {a.q.dtype}; served are equal dtypes"
    if a.left + a.right < 0:
        return f"the band from -{a.left} to {a.right} is empty"
    return None


def _cpp_backward_refuses(grad, grad_lse, out, lse, a, needs_grad) -> str | None:
    return _cpp_refuses(a)


@attention.backend("cpp", devices=("cpu",), unavailable=native.cpp_missing, refuses=_cpp_refuses)
def _(a):
    """Memory besides arguments and results, fp32: at most 0.3 MiB a thread, 0.7 MiB with terms, whatever the lengths
    (csrc/cpu/attention.h: forward_space, terms_space), H · (Lq + Lk + 255) for a table, and D times that for each
    tensor of vectors.
    """
    a = _for_cpp(a)
    out, lse = a.q.new_empty(a.q.shape), a.q.new_empty(a.q.shape[:3], dtype=torch.float32)
    native.cpu().attention(
        *map(native.view, (a.q, a.k, a.v)), native.DTYPES[a.q.dtype],
        native.address(a.table), native.address(a.key_lengths), *_terms_for_cpp(a),
        (a.left, a.right, a.offset), a.scale, a.softcap or 0.0, out.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


@attention_backward.backend("cpp", devices=("cpu",), unavailable=native.cpp_missing, refuses=_cpp_backward_refuses)
def _(grad, grad_lse, out, lse, arguments, needs_grad):
    """Memory as ahead, with 0.8 MiB a thread, 1.2 MiB with terms (backward_space); and sums that become gradients: of k
    and v in fp32, twice B · Hk · Lk · D, of vectors like the vectors, of a 16-bit bias that rows of the batch or heads
    share like the bias, and of a table or a bias of keys or queries one for each row of the batch and head, B · H · L.
    Every sum has one order, so that bits do not depend on the number of threads.
    """
    a, names = _for_cpp(arguments), names_needing_grad(arguments, needs_grad)
    grad, out, lse = native.side_by_side(grad), out.contiguous(), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    made = {name: torch.empty_like(getattr(a, name), memory_format=torch.contiguous_format) for name in ("q", "k", "v")}
    if "table" in names:
        made["table"] = torch.empty_like(a.table)
    # kernels add to these
    sums = {
        name: torch.zeros_like(getattr(a, name), memory_format=torch.contiguous_format)
        for name in names
        if name in CPP_BY_NAME
    }
    native.cpu().attention_backward(
        native.view(grad), native.address(grad_lse), *map(native.view, (a.q, a.k, a.v)), native.DTYPES[a.q.dtype],
        native.address(a.table), native.address(a.key_lengths),
        *_terms_for_cpp(a), (a.left, a.right, a.offset), a.scale, a.softcap or 0.0, out.data_ptr(), lse.data_ptr(),
        *(native.address(made.get(name)) for name in ("q", "k", "v", "table")),
        {name: x.data_ptr() for name, x in sums.items()}, torch.get_num_threads(),
    )  # fmt: skip
    return in_order(made | sums, arguments, needs_grad, lse)


def _for_cpp(a: Arguments) -> Arguments:
    """Dtypes and layouts as its kernels take them."""
    tensors = ((name, getattr(a, name)) for name in TENSORS)
    return a._replace(**{name: CPP_LAYOUTS[name](x, a.q.dtype) for name, x in tensors if x is not None})


def _terms_for_cpp(a: Arguments) -> tuple[dict, tuple[float, int, int, int, int]]:
    """The rest of the terms by name, and dropout as its kernels take it."""
    terms = {
        name: (native.view(x), native.DTYPES.get(x.dtype, -1))
        for name in CPP_BY_NAME
        if (x := getattr(a, name)) is not None
    }
    return terms, (a.dropout, threshold(a.dropout), a.seed % 2**64, a.first_query, a.first_key)
