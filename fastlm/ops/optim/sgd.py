"""SGD with momentum (Sutskever et al. 2013) over lists of tensors: 12 bytes a parameter in fp32, 20 with momentum.
Backends: update.py's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops.optim.precision import assign, parameters
from fastlm.ops.optim.update import UpdateOp


class SgdUpdate(NamedTuple):
    """One update; update.py says what the fields are that every update has. buffers: empty for momentum 0."""

    params: list[Tensor]
    masters: list[Tensor]
    keys: list[int]
    grads: list[Tensor]
    buffers: list[Tensor]
    steps: list[Tensor]
    coefficient: Tensor | None
    found_inf: Tensor | None


class SgdOptions(NamedTuple):
    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool


# ---------------------------------------------------------------------------------------------------------------------
# Definition


@UpdateOp
def sgd(update: SgdUpdate, options: SgdOptions) -> None:
    """One update in place: g ← coefficient · g + weight_decay·θ, t ← t + 1, then

        b ← momentum · b + (1 - dampening) g, at the first step b ← g
        θ ← θ - lr · (g + momentum · b if nesterov else b)

    Without buffers, θ ← θ - lr · g.
    """
    lr, momentum, dampening, weight_decay, nesterov = options
    for i, (p, g, step) in enumerate(zip(parameters(update), update.grads, update.steps, strict=True)):
        theta = p.read()
        d = (g.float() if update.coefficient is None else update.coefficient * g.float()) + weight_decay * theta
        written = [(step, step + 1)]
        if update.buffers:
            buffer = update.buffers[i]
            b = torch.where(step == 0, d, momentum * buffer.float() + (1 - dampening) * d)
            d = d + momentum * b if nesterov else b
            written.append((buffer, b))
        assign([*p.write(theta - lr * d, step + 1), *written], update.found_inf)
