"""How right norms are: the rule of tolerance.py for y, s and every gradient, beside eager PyTorch."""

import torch
import torch.nn.functional as F
from tolerance import Yardstick, assert_accurate, max_and_rms

from fastlm.backends.dispatch import OPS
from fastlm.ops.norm import Arguments

LEARNED = ("x", "residual", "weight", "bias")


def results(op, a: Arguments, order=None) -> dict[str, torch.Tensor]:
    """y, s and the gradient of every tensor, the channels in this order."""
    given = [name for name in LEARNED if getattr(a, name) is not None]
    ordered = lambda x: x if order is None else x[..., order]
    leaves = {name: ordered(getattr(a, name)).detach().requires_grad_() for name in given}
    y, s = op(a._replace(**leaves))[:2]
    g = torch.Generator().manual_seed(1)
    dy, ds = (torch.randn(a.x.shape, generator=g).to(a.x.device) for _ in range(2))
    outputs = {"y": y} if a.residual is None else {"y": y, "s": s}
    grads = [ordered(x).to(y) for x in (dy, ds)][: len(outputs)]
    made = torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads)
    back = lambda x: x.detach() if order is None else x.detach()[..., order.argsort()]
    return {name: back(x) for name, x in (outputs | dict(zip(given, made, strict=True))).items()}


def plain(name: str, a: Arguments):
    """Eager PyTorch, or transformers' lines, in the dtypes that come."""
    s = a.x if a.residual is None else a.x + a.residual
    if not a.weight_offset and not a.rounds_first and a.weight is not None and a.weight.dtype == s.dtype:
        if name == "layer_norm":
            return F.layer_norm(s, s.shape[-1:], a.weight, a.bias, a.eps), s
        return F.rms_norm(s, s.shape[-1:], a.weight, a.eps), s
    n = s.to(torch.promote_types(s.dtype, torch.float32))
    n = n - n.mean(-1, keepdim=True) if name == "layer_norm" else n
    n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + a.eps)
    if a.rounds_first:
        return (a.weight * n.to(s.dtype)).to(s.dtype), s
    n = n if a.weight is None else n * (a.weight_offset + a.weight.to(n.dtype))
    return (n if a.bias is None else n + a.bias).to(s.dtype), s


def yardstick(name: str, a: Arguments) -> Yardstick:
    exact = a._replace(**{n: getattr(a, n).double() for n in LEARNED if getattr(a, n) is not None})
    truth, errors = results(OPS[name].definition, exact), {}
    for i in range(3):
        order = torch.randperm(a.x.shape[-1], generator=torch.Generator().manual_seed(i)).to(a.x.device)
        for key, x in results(lambda a: plain(name, a), a, order).items():
            errors.setdefault(key, []).append(max_and_rms(x, truth[key]))
    return Yardstick(truth, {key: tuple(map(max, zip(*of, strict=True))) for key, of in errors.items()})


def assert_norm_accurate(case, dtype, device) -> None:
    a = case.make(dtype, device)
    against = yardstick(case.op, a)
    for key, got in results(OPS[case.op], a).items():
        assert_accurate(key, got, against, ulps=1.0)
