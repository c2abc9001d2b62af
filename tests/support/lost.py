"""How right the loss is: the rule of tolerance.py for linear_cross_entropy and its gradients, beside F.cross_entropy of
F.linear; and for what backends make of a chunk's products, beside the definition.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from draws import LAYOUTS
from hypothesis import strategies as st
from tolerance import Yardstick, assert_accurate, max_and_rms
from torch import Tensor

import fastlm
from fastlm.ops.linear_cross_entropy import PYTORCH, Rows
from fastlm.ops.logits import Arguments

ORDERS, ULPS = 3, 4.0
NAMES = ("loss", "dhidden", "dweight", "dbias")
OPTIONS = {
    "plain": {},
    "smoothed": dict(label_smoothing=0.1),
    "z-loss": dict(z_loss=1e-2),
    "capped": dict(softcap=2.0, temperature=0.7),
    "all": dict(label_smoothing=0.1, z_loss=1e-2, softcap=2.0, temperature=1.3),
}


class Drawn(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor


def draw(dtype: torch.dtype, N: int = 37, D: int = 24, V: int = 91, layouts: tuple[str, str] = 2 * ("dense",)) -> Drawn:
    """Every fifth row has no target. layouts: names in draws.LAYOUTS, of hidden and weight."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=g).to(dtype) for s in ((N, D), (V, D), (V,)))
    labels = torch.randint(V, (N,), generator=g)
    labels[::5] = -100
    hidden, weight = (LAYOUTS[name](x) for name, x in zip(layouts, (hidden, weight), strict=True))
    return Drawn(hidden, weight, bias, labels)


def plain(hidden, weight, labels, bias, label_smoothing=0.0, z_loss=0.0, softcap=None, temperature=1.0):
    """A loss for each row by PyTorch's functions."""
    x = F.linear(hidden, weight, bias)
    x = (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature
    loss = F.cross_entropy(x, labels, reduction="none", label_smoothing=label_smoothing)
    return (loss + z_loss * x.logsumexp(-1).square()).where(labels != -100, 0)


def results(function, drawn: Drawn, **options) -> dict[str, Tensor]:
    """The loss of each row, which have weights of their own, or their sum, as the function gives it; its gradients."""
    leaves = [x.detach().requires_grad_() for x in drawn[:3] if x is not None]
    hidden, weight, *bias = leaves
    loss = function(hidden, weight, drawn.labels, bias[0] if bias else None, **options)
    weights = torch.linspace(0.5, 1.5, len(drawn.labels)).to(loss) if loss.ndim else 1.5
    made = torch.autograd.grad((loss * weights).sum(), leaves)
    return dict(zip(NAMES, (loss.detach(), *made), strict=False))


def yardstick(drawn: Drawn, reduction: str, options: dict) -> Yardstick:
    """Of several orders of the channels, along which logits are added up."""
    function = lambda *a, **o: plain(*a, **o) if reduction == "none" else plain(*a, **o).sum()
    wide = Drawn(*(x.double() if x is not None and x.is_floating_point() else x for x in drawn))
    truth, errors = results(function, wide, **options), {}
    for i in range(ORDERS):
        order = torch.randperm(drawn.hidden.shape[1], generator=torch.Generator().manual_seed(i))
        made = results(
            function, drawn._replace(hidden=drawn.hidden[:, order], weight=drawn.weight[:, order]), **options
        )
        for name, x in made.items():
            x = x[:, order.argsort()] if name in ("dhidden", "dweight") else x
            errors.setdefault(name, []).append(max_and_rms(x, truth[name]))
    return Yardstick(truth, {name: tuple(map(max, zip(*of, strict=True))) for name, of in errors.items()})


def assert_loss_accurate(drawn: Drawn, reduction: str, options: dict, against: Yardstick | None = None) -> None:
    against = yardstick(drawn, reduction, options) if against is None else against
    ours = lambda *a, **o: fastlm.linear_cross_entropy(*a, reduction=reduction, **o)
    for name, got in results(ours, drawn, **options).items():
        assert_accurate(name, got, against, ulps=ULPS)


# ---------------------------------------------------------------------------------------------------------------------
# Rows of products


class Products(NamedTuple):
    """A chunk: x [rows, V], labels that are words of it or not, and the call's other arguments."""

    x: Tensor
    labels: Tensor
    a: Arguments


@st.composite
def products(draw, dtypes=(torch.float32, torch.bfloat16, torch.float16), longest: int = 5000):
    """Chunks of any size, whose rows lie apart by more than their words, and whose words are some of all."""
    rows, V = draw(st.integers(1, 4)), draw(st.integers(1, longest))
    apart, beyond = draw(st.sampled_from((0, 1, 64))), draw(st.sampled_from((0, 7)))
    g = torch.Generator().manual_seed(rows + 7 * V)
    x = torch.full((rows, V + apart), torch.nan)[:, :V]
    x[:] = 4 * torch.randn(rows, V, generator=g)
    bias = torch.randn(V, generator=g) if draw(st.booleans()) else None
    options = draw(st.sampled_from(list(OPTIONS.values())))
    labels = torch.randint(-2 if beyond else 0, V + (2 if beyond else 0), (rows,), generator=g)
    return draw(st.sampled_from(dtypes)), x, labels, arguments(x, bias, V + beyond, **options)


def arguments(x, bias, words, label_smoothing=0.0, z_loss=0.0, softcap=0.0, temperature=1.0) -> Arguments:
    weight = x.new_empty(x.shape[1], 0)
    return Arguments(x, weight, bias, x, -100, label_smoothing, z_loss, softcap, temperature, 0, words, "")


def assert_rows_accurate(by: Rows, dtype: torch.dtype, x: Tensor, labels: Tensor, a: Arguments) -> None:
    """Of the same products in fp64, beside the definition in fp32, whose gradient is rounded to dtype."""
    held = torch.full((len(x), x.stride(0)), torch.nan, dtype=dtype, device=x.device)[:, : x.shape[1]]
    chunk = lambda: held.copy_(x)
    exact = a._replace(bias=None if a.bias is None else a.bias.double())
    truth, errors = of_rows(PYTORCH, chunk().double(), labels, exact), {}
    for name, got in of_rows(PYTORCH, chunk(), labels, a).items():
        errors[name] = max_and_rms(got, truth[name])
    for name, got in of_rows(by, chunk, labels, a).items():
        assert_accurate(name, got, Yardstick(truth, errors), ulps=2.0)


def of_rows(by: Rows, x, labels: Tensor, a: Arguments) -> dict[str, Tensor]:
    """What `by` measures; the gradient of rows that weigh differently; the loss and its gradient in one."""
    fresh = x if callable(x) else lambda: x.clone()
    lse, wanted = by.measure(fresh(), labels, a)
    scale, g = (torch.linspace(begin, 1.5, len(lse)).to(lse) for begin in (0.5, 1.0))
    made = dict(lse=lse, wanted=wanted, gradient=by.gradient(fresh(), labels, lse, scale, g, a).clone())
    if a.words == a.weight.shape[0]:
        loss, dx = lost(by, fresh(), labels, a, lse, wanted)
        made |= dict(loss=loss, dloss=dx)
    return made


def lost(by: Rows, x: Tensor, labels: Tensor, a: Arguments, lse: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    if by.lose is not None:
        return by.lose(x, labels, a)
    one = torch.ones_like(lse)
    return lse - wanted + a.z_loss * lse.square(), by.gradient(x, labels, lse, one + 2 * a.z_loss * lse, one, a)
