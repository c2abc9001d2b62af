"""Reading gradients under loss scaling: the norm, the clip factor and the overflow flag in one read; unscaling in
place.

Gradients may be fp32, bf16 or fp16, each tensor by itself. Nothing is read back to the host: results are fp32 tensors
on the gradients' device, for `adamw` and its kin to take. Micikevicius et al. 2018; Pascanu et al. 2013 for the clip.
"""

import torch
from torch import Tensor

from fastlm.backends import native
from fastlm.backends.dispatch import op
from fastlm.backends.native import address
from fastlm.ops.optim.lists import cpp_list, dense, refuses_lists, unrepeated, write_back

# ---------------------------------------------------------------------------------------------------------------------
# Definition


@op
def grad_stats(grads: list[Tensor], scale: Tensor | None, max_norm: float) -> Tensor:
    """Return [norm, coefficient, found_inf], fp32.

    norm = ‖grads / scale‖₂ over all tensors; coefficient = min(1, max_norm / (norm + 1e-6)) / scale unscales and clips
    (max_norm ≤ 0: unscales only); found_inf = 1 where the norm is not finite, which any inf or NaN makes it. Sums are
    fp64.
    """
    unscale = 1.0 if scale is None else 1.0 / scale.double()
    total = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt() * unscale
    norm = total.float()
    clip = (max_norm / (norm.double() + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(total)
    return torch.stack((norm, (clip * unscale).float(), (~norm.isfinite()).float()))


@op(mutates=("grads", "found_inf"))
def unscale(grads: list[Tensor], factor: Tensor, found_inf: Tensor) -> None:
    """grads ← factor · grads in place; found_inf, an fp32 scalar, becomes 1 if an element was inf or NaN, else
    stays.
    """
    for g in map(unrepeated, grads):
        found_inf.copy_(torch.maximum(found_inf, (~g.isfinite().all()).float()))
        g.copy_(factor * g.float())


# ---------------------------------------------------------------------------------------------------------------------
# Backends


def _refuses(grads, *rest):
    return refuses_lists(grads=grads)


def _grad_stats(module, grads, scale, max_norm, *where):
    laid_out = [dense(g) for g in grads]
    stats = torch.empty(3, dtype=torch.float32, device=grads[0].device)
    sizes = [g.numel() for g in laid_out]
    module.grad_stats(cpp_list(laid_out), sizes, address(scale), max_norm, address(stats), *where)
    return stats


def _unscale(module, grads, factor, found_inf, *where):
    grads = [unrepeated(g) for g in grads]
    laid_out = [dense(g) for g in grads]
    sizes = [g.numel() for g in laid_out]
    module.unscale(cpp_list(laid_out), sizes, address(factor), address(found_inf), *where)
    write_back(grads, laid_out)


@grad_stats.backend("cpp", devices=("cpu",), unavailable=native.cpp_missing, refuses=_refuses)
def _(*args):
    return _grad_stats(native.cpu(), *args, torch.get_num_threads())


@grad_stats.backend("cuda", devices=("cuda",), unavailable=native.cuda_missing, refuses=_refuses)
def _(grads, *args):
    workspace = native.cuda_workspace("grad_stats", grads)
    return _grad_stats(native.cuda(), grads, *args, workspace.data_ptr(), *native.cuda_stream(grads[0].device))


@unscale.backend("cpp", devices=("cpu",), unavailable=native.cpp_missing, refuses=_refuses)
def _(*args):
    _unscale(native.cpu(), *args, torch.get_num_threads())


@unscale.backend("cuda", devices=("cuda",), unavailable=native.cuda_missing, refuses=_refuses)
def _(grads, *args):
    _unscale(native.cuda(), grads, *args, *native.cuda_stream(grads[0].device))
