"""How right activations are: the rule of tolerance.py for y and the gradient of x, beside eager PyTorch."""

import torch
from tolerance import Yardstick, assert_accurate, max_and_rms

from fastlm.backends.dispatch import OPS
from fastlm.ops.gate import PYTORCHS


def results(f, x: torch.Tensor, activation: str) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = f(x, activation)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return {"y": y.detach(), "dx": torch.autograd.grad(y, x, dy)[0]}


def assert_gate_accurate(case, dtype: torch.dtype, device: torch.device) -> None:
    x, activation = case.make(dtype, device)

    def plain(x, activation):
        if case.op == "activated":
            return PYTORCHS[activation](x)
        gate, up = x.chunk(2, -1)
        return PYTORCHS[activation](gate) * up

    truth = results(OPS[case.op].definition, x.double(), activation)
    errors = {name: max_and_rms(got, truth[name]) for name, got in results(plain, x, activation).items()}
    for name, got in results(OPS[case.op], x, activation).items():
        assert_accurate(name, got, Yardstick(truth, errors))
