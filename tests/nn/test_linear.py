"""Linear layers of few rows: as right as PyTorch's by every instruction set, and PyTorch's own where they are not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tolerance import Yardstick, assert_accurate, max_and_rms

import fastlm
from fastlm.backends import native
from fastlm.models import Transformer
from fastlm.models.presets import preset
from fastlm.nn.linear import linear
from fastlm.ops.linear import FEW, linear_of_few_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = ((1, 1), (7, 3), (64, 16), (131, 259), (200, 1000))  # outputs, channels
needs_cpp = pytest.mark.skipif(not native.cpp_is_built(), reason="the C++ extension is not built")


def draw(rows, N, K, dtype, bias=True):
    g = torch.Generator().manual_seed(0)
    made = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    return made(rows, K), made(N, K), made(N) if bias else None


def assert_linear_accurate(x, weight, bias, f):
    """By the rule of tolerance.py, plain PyTorch in two orders of the channels."""
    given = [None if t is None else t.double() for t in (x, weight, bias)]
    truth, errors = F.linear(*given), []
    for order in (torch.arange(x.shape[1]), torch.arange(x.shape[1]).flip(0)):
        errors.append(max_and_rms(F.linear(x[:, order], weight[:, order], bias), truth))
    plain = tuple(map(max, zip(*errors, strict=True)))
    assert_accurate("y", f(x, weight, bias), Yardstick({"y": truth}, {"y": plain}), ulps=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, K", SIZES)
@needs_cpp
def test_every_instruction_set_is_as_accurate_whatever_the_threads(N, K, dtype, threads, poisoned):
    active = native.cpu().active()
    try:
        for isa in native.cpu().available():
            native.cpu().use(isa)
            for rows in range(1, FEW + 1):
                given = draw(rows, N, K, dtype, bias=rows % 2 == 0)
                with fastlm.use_backend("cpp"):
                    assert_linear_accurate(*given, linear_of_few_rows)
                    made = [threads(n) or linear_of_few_rows(*given) for n in (1, 2, 7)]
                assert all(torch.equal(other, made[0]) for other in made)
    finally:
        native.cpu().use(active)


def calls(monkeypatch) -> list:
    """Rows of each call that linear_of_few_rows was given."""
    seen = []
    monkeypatch.setattr("fastlm.nn.linear.linear_of_few_rows", lambda x, *of: seen.append(x.shape) or F.linear(x, *of))
    return seen


def test_few_rows_without_gradients_are_ours(monkeypatch):
    seen, (x, weight, bias) = calls(monkeypatch), draw(FEW, 5, 4, torch.float32)
    linear(x, weight, bias), linear(x[:2, None], weight), linear(x[0], weight), linear(x[:2].half(), weight.half())
    assert seen == [(8, 4), (2, 1, 4), (4,), (2, 4)]


@torch.no_grad()
def test_layers_of_a_model_take_it_while_it_writes(monkeypatch):
    seen, model = calls(monkeypatch), Transformer(preset("gpt", layers=1)).eval()
    model.generate(torch.zeros(1, 3, dtype=torch.int64), 2)
    assert len(seen) == 2 * (4 + 1)  # for each token: qkv, out, two of the MLP, and the head


@pytest.mark.parametrize(
    "why",
    [
        "more rows",
        "one of fp16",
        "a gradient",
        "autocast",
        "another dtype",
        "compiled",
        "a tensor of a class of its own",
    ],
)
def test_all_else_is_pytorchs(why, monkeypatch):
    seen, (x, weight, bias) = calls(monkeypatch), draw(FEW, 5, 4, torch.float32)
    expected = F.linear(x, weight, bias)
    if why == "more rows":
        linear(torch.cat((x, x)), weight, bias)
    elif why == "one of fp16":
        linear(x[:1].half(), weight.half(), bias.half())
    elif why == "a gradient":
        weight.requires_grad_()
        got = torch.autograd.grad(linear(x, weight, bias).sum(), weight)[0]
        torch.testing.assert_close(got, x.sum(0).expand(5, 4))
    elif why == "autocast":
        with torch.autocast("cpu"):
            assert linear(x, weight, bias).dtype == torch.bfloat16
    elif why == "another dtype":
        with pytest.raises(RuntimeError):
            linear(x, weight.bfloat16(), bias)
    elif why == "compiled":
        torch.testing.assert_close(torch.compile(linear, backend="eager", fullgraph=True)(x, weight, bias), expected)
    else:
        linear(x.as_subclass(type("Mine", (torch.Tensor,), {})), weight, bias)
    assert seen == []


def test_errors_are_pytorchs():
    x, weight, bias = draw(2, 5, 4, torch.float32)
    for wrong in ((x[:, :3], weight, bias), (x, weight[0, None, None], bias), (x, weight, bias[:3])):
        with pytest.raises(RuntimeError):
            linear(*wrong)


@torch.no_grad()
def test_the_module_is_torchs():
    theirs, x = torch.nn.Linear(6, 5), torch.randn(3, 6)
    ours = fastlm.nn.Linear(6, 5)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(copy.deepcopy(ours)(x), theirs(x))
    torch.testing.assert_close(ours(x.expand(9, 3, 6)), theirs(x.expand(9, 3, 6)))
    assert repr(ours) == repr(theirs)
