"""SGD with momentum (Sutskever et al. 2013) over lists of tensors: 12 bytes a parameter in fp32, 20 with momentum."""

import torch
from torch import Tensor

from fastlm.backends import native
from fastlm.backends.dispatch import op
from fastlm.backends.native import address
from fastlm.ops.lists import Lists, refuses_lists
from fastlm.ops.precision import assign, parameters

# ---------------------------------------------------------------------------------------------------------------------
# Definition


@op(mutates=("params", "companions", "buffers", "steps"))
def sgd(
    params: list[Tensor], companions: list[Tensor], keys: list[int], grads: list[Tensor], buffers: list[Tensor],
    steps: list[Tensor],
    coefficient: Tensor | None, found_inf: Tensor | None,
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool,
) -> None:  # fmt: skip
    """One update in place: g ← coefficient · g + weight_decay·θ, t ← t + 1, then

        b ← momentum · b + (1 - dampening) g, at the first step b ← g;  θ ← θ - lr · (g + momentum · b if nesterov else
        b)

    buffers: empty for momentum 0, where θ ← θ - lr · g. companions, keys, coefficient, found_inf: as for adamw.
    """
    for i, (p, g, step) in enumerate(zip(parameters(params, companions, keys), grads, steps, strict=True)):
        theta = p.read()
        d = (g.float() if coefficient is None else coefficient * g.float()) + weight_decay * theta
        written = [(step, step + 1)]
        if buffers:
            b = torch.where(step == 0, d, momentum * buffers[i].float() + (1 - dampening) * d)
            d = d + momentum * b if nesterov else b
            written.append((buffers[i], b))
        assign([*p.write(theta - lr * d, step + 1), *written], found_inf)


# ---------------------------------------------------------------------------------------------------------------------
# Backends


def _refuses(params, companions, keys, grads, buffers, *rest):
    return refuses_lists(params=params, grads=grads, buffers=buffers)


def _launch(module, params, companions, keys, grads, buffers, steps, coefficient, found_inf, *options):
    *scalars, where = options
    lists = Lists(params, companions, keys, grads, steps, buffers=buffers)
    flags = address(coefficient), address(found_inf)
    module.sgd(*lists.arguments(module), lists.steps, lists.sizes(), *flags, module.SgdOptions(*scalars), *where)
    lists.write_back()


@sgd.backend("cpp", devices=("cpu",), unavailable=native.cpp_missing, refuses=_refuses)
def _(*args):
    _launch(native.cpu(), *args, (torch.get_num_threads(),))


@sgd.backend("cuda", devices=("cuda",), unavailable=native.cuda_missing, refuses=_refuses)
def _(params, *args):
    workspace = native.cuda_workspace("sgd", params)
    _launch(native.cuda(), params, *args, (workspace.data_ptr(), *native.cuda_stream(params[0].device)))
