"""Who computes attention (fastlm/ops/attention.py): PyTorch's own kernels where nothing is positional, Triton on GPUs,
C++ on CPUs."""

import torch
import torch.nn.functional as F

from fastlm.backends import native
from fastlm.backends.philox import threshold
from fastlm.masks import UNBOUNDED
from fastlm.ops.attention import LEARNED, TENSORS, Arguments, attention, attention_backward

# ---------------------------------------------------------------------------------------------------------------------
# PyTorch


def _sdpa_refuses(*args):
    a = Arguments(*args)
    used = [name for name in TENSORS[3:] if getattr(a, name) is not None]
    if used:
        return f"scaled_dot_product_attention takes {used[0]} only as an L×L tensor, if at all"
    if a.dropout or a.return_lse:
        return "scaled_dot_product_attention has no dropout from a seed, and returns no lse"
    causal = (a.left, a.right, a.offset) == (UNBOUNDED, 0, 0) and a.q.shape[2] == a.k.shape[2]
    if not causal and not _sees_all(a):
        return "scaled_dot_product_attention knows no mask, or causal with as many queries as keys"
    return None


def _sees_all(a: Arguments) -> bool:
    """Whether the band hides nothing, as when one query decodes."""
    return a.left >= a.q.shape[2] - 1 + a.offset and a.right >= a.k.shape[2] - 1 - a.offset


def _sdpa_yields(*args):
    """On CPUs the C++ kernels take half the time and less from L = 512 on. Not for calls so small that the custom
    operator's own time counts, by a sweep in benchmarks/FACTS.md; nor for bf16 where the processor multiplies tiles of
    it (AMX), which was not measured."""
    a = Arguments(*args)
    if a.q.device.type != "cpu" or _cpp_refuses(*args):
        return False
    smallest = 2**22 if a.q.dtype == torch.bfloat16 else 2**23
    return a.q.numel() * a.k.shape[2] >= smallest and _cpp_is_faster(a.q.dtype)


def _cpp_is_faster(dtype: torch.dtype) -> bool:
    return native.cpp_missing(torch.device("cpu")) is None and not (
        dtype == torch.bfloat16 and "amx" in native.cpu().available()
    )


# torch.compiler.assume_constant_result, which would import Dynamo, and so Triton, with fastlm
_cpp_is_faster._dynamo_marked_constant = True


@attention.backend("sdpa", devices=("cpu", "cuda"), refuses=_sdpa_refuses, yields=_sdpa_yields, differentiable=True)
def _(*args):
    """PyTorch's own kernels (cuDNN, FlashAttention, CPU flash), which serve plain attention well. No lse."""
    a = Arguments(*args)
    options = {} if _sees_all(a) else {"is_causal": True}
    # a comparison of sizes is not a bool under torch.compile until it is asked like this
    if a.q.shape[1] != a.k.shape[1]:
        options["enable_gqa"] = True
    return F.scaled_dot_product_attention(a.q, a.k, a.v, scale=a.scale, **options), None


# ---------------------------------------------------------------------------------------------------------------------
# Triton


def _triton_missing(device: torch.device) -> str | None:
    missing = native.triton_missing(device)
    if missing or device.type != "cuda":
        return missing
    if torch.version.hip:
        return "the Triton kernels of attention hold NVIDIA assembly, and this is a ROCm build of torch"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"the Triton kernels of attention need compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    return None


def _triton_refuses(*args):
    a = Arguments(*args)
    if a.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"query is {a.q.dtype}; served are fp32, bf16 and fp16"
    if not 1 <= a.q.shape[3] <= 256:
        return f"the head dimension is {a.q.shape[3]}; served are 1 to 256"
    if a.scale <= 0:
        return f"scale is {a.scale}; served are positive scales, so negate query"
    return None


def _triton_backward_refuses(grad, grad_lse, out, lse, *args):
    return _triton_refuses(*args[:-1])


@attention.backend("triton", devices=("cuda",), missing=_triton_missing, refuses=_triton_refuses)
def _(*args):
    from fastlm.kernels.attention import forward

    return forward(Arguments(*args))


@attention_backward.backend("triton", devices=("cuda",), missing=_triton_missing, refuses=_triton_backward_refuses)
def _(grad, grad_lse, out, lse, *args):
    from fastlm.kernels.attention_backward import backward

    *given, wanted = args
    a, wanted = Arguments(*given), dict(zip(LEARNED, wanted, strict=True))
    made = backward(
        grad, grad_lse, out, lse, a, {name for name, want in wanted.items() if want and getattr(a, name) is not None}
    )
    return [made[name] if want and name in made else lse.new_empty(0) for name, want in wanted.items()]


# ---------------------------------------------------------------------------------------------------------------------
# C++

CPP_IDS = ("q_groups", "k_groups", "prefix", "q_segments", "k_segments", "q_ranks", "k_ranks")
CPP_LEARNED = LEARNED[4:]
CPP_BY_NAME = (*CPP_LEARNED, *CPP_IDS)  # what its launcher takes by name


def _cpp_refuses(*args):
    a = Arguments(*args)
    if a.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"query is {a.q.dtype}; served are fp32, bf16 and fp16"
    if not 1 <= a.q.shape[3] <= 256:
        return f"the head dimension is {a.q.shape[3]}; served are 1 to 256"
    for name in ("q_position", "k_position"):
        x = getattr(a, name)
        if x is not None and x.dtype != a.q.dtype:
            return f"{name} is {x.dtype} and query {a.q.dtype}; served are equal dtypes"
    if a.left + a.right < 0:
        return f"the band from -{a.left} to {a.right} is empty"
    return None


def _cpp_backward_refuses(grad, grad_lse, out, lse, *args):
    return _cpp_refuses(*args[:-1])


@attention.backend("cpp", devices=("cpu",), missing=native.cpp_missing, refuses=_cpp_refuses)
def _(*args):
    """Memory besides arguments and results, fp32: at most 0.3 MiB a thread, 0.7 MiB with terms, whatever the lengths
    (csrc/cpu/attention.h: forward_space, terms_space), H · (Lq + Lk + 255) for a table, and D times that for each
    tensor of vectors."""
    a = _for_cpp(Arguments(*args))
    out, lse = a.q.new_empty(a.q.shape), a.q.new_empty(a.q.shape[:3], dtype=torch.float32)
    native.cpu().attention(
        *map(native.view, (a.q, a.k, a.v)), native.DTYPES[a.q.dtype], native.address(a.table), native.address(a.key_lengths),
        *_terms_for_cpp(a), (a.left, a.right, a.offset), a.scale, out.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


@attention_backward.backend("cpp", devices=("cpu",), missing=native.cpp_missing, refuses=_cpp_backward_refuses)
def _(grad, grad_lse, out, lse, *args):
    """Memory as ahead, with 0.8 MiB a thread, 1.2 MiB with terms (backward_space); and sums that become gradients: of k
    and v in fp32, twice B · Hk · Lk · D, of vectors like the vectors, of a 16-bit bias that rows of the batch or heads
    share like the bias, and of a table or a bias of keys or queries one for each row of the batch and head, B · H · L.
    Every sum has one order, so that bits do not depend on the number of threads."""
    *forward, wanted = args
    given = Arguments(*forward)
    a = _for_cpp(given)
    grad, out, lse = native.side_by_side(grad), out.contiguous(), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (a.q, a.k, a.v))
    dtable = torch.empty_like(a.table) if wanted[LEARNED.index("table")] else None
    learned = [
        name
        for name, want in zip(LEARNED, wanted, strict=True)
        if want and name in CPP_BY_NAME and getattr(a, name) is not None
    ]
    made = {name: torch.zeros(getattr(a, name).shape, dtype=getattr(a, name).dtype) for name in learned}
    native.cpu().attention_backward(
        native.view(grad), native.address(grad_lse), *map(native.view, (a.q, a.k, a.v)), native.DTYPES[a.q.dtype],
        native.address(a.table), native.address(a.key_lengths),
        *_terms_for_cpp(a), (a.left, a.right, a.offset), a.scale, out.data_ptr(), lse.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(),
        native.address(dtable), {name: x.data_ptr() for name, x in made.items()}, torch.get_num_threads(),
    )  # fmt: skip
    made |= {"q": dq, "k": dk, "v": dv, "table": dtable}
    return [
        lse.new_empty(0) if made.get(name) is None else made[name].to(getattr(given, name).dtype) for name in LEARNED
    ]


def _for_cpp(a: Arguments) -> Arguments:
    """Dtypes and layouts as its kernels take them; terms that are neither in query's dtype nor in fp32 become fp32."""
    learned = {name: getattr(a, name) for name in ("bias", "query_vectors", "key_vectors", "value_vectors")}
    return a._replace(
        **{
            name: x.float()
            for name, x in learned.items()
            if x is not None and x.dtype not in (a.q.dtype, torch.float32)
        },
        **{name: native.side_by_side(getattr(a, name)) for name in ("q", "k", "v")},
        table=None if a.table is None else a.table.float().contiguous(),
        key_lengths=None if a.key_lengths is None else a.key_lengths.long().contiguous(),
        **{name: getattr(a, name).long().contiguous() for name in CPP_IDS if getattr(a, name) is not None},
        **{
            name: native.side_by_side(getattr(a, name))
            for name in ("q_position", "k_position")
            if getattr(a, name) is not None
        },
        same=None if a.same is None else a.same.float().contiguous(),
    )


def _terms_for_cpp(a: Arguments) -> tuple[dict, tuple[float, int, int]]:
    """The rest of the terms by name, and dropout as its kernels take it."""
    given = {
        name: (native.view(getattr(a, name)), native.DTYPES.get(getattr(a, name).dtype, -1))
        for name in CPP_BY_NAME
        if getattr(a, name) is not None
    }
    return given, (a.dropout, threshold(a.dropout), a.seed % 2**64)
