"""What the tests of optimizers share: precisions, parameters with gradients, and twins of them."""

import torch
from torch import nn

from fastlm import optim

BACKENDS = ("cpp", "reference")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
PRECISIONS = {
    "fp32": (F32, {}),
    "bf16": (BF16, {}),
    "fp16": (F16, {}),
    "bf16-masters": (BF16, dict(master="fp32")),
    "fp16-masters": (F16, dict(master="fp32")),
    "bf16-remainders": (BF16, dict(master="remainder")),
    "bf16-noise": (BF16, dict(master="stochastic")),
    "bf16-states": (BF16, dict(state_dtype="bf16")),
}


def make(choice, params, **more):
    return optim.OPTIMIZERS[choice.optimizer](params, **choice.options, **more)


def params_and_grads(shapes=((7, 5), (4,), ()), dtype=F32, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]
    return params, lambda: [setattr(p, "grad", (scale * torch.randn(p.shape, generator=g)).to(dtype)) for p in params]


def twins(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def share_grads(params, others):
    for p, q in zip(params, others, strict=True):
        q.grad = None if p.grad is None else p.grad.to(q.dtype, copy=True)


def close(x, y):
    if x.dtype == torch.int16:  # remainders: the parameter's own bits may carry
        return
    tolerance = dict(rtol=2e-6, atol=2e-6) if x.dtype == F32 else dict(rtol=torch.finfo(x.dtype).eps, atol=1e-6)
    torch.testing.assert_close(x, y, **tolerance)
