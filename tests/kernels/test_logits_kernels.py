"""Triton's rows of logits: on the GPU if there is one, compiled; else in Triton's interpreter (tests/conftest.py says
so).
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from lost import OPTIONS, Drawn, arguments, assert_loss_accurate, assert_rows_accurate, draw, products, results

import fastlm
from fastlm.backends import native
from fastlm.ops import linear_cross_entropy as module
from fastlm.ops import logits

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = ("linear_cross_entropy", "summed_linear_cross_entropy")

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def there(drawn: Drawn) -> Drawn:
    return Drawn(*(x.to(DEVICE) for x in drawn))


@settings(
    max_examples=60 if native.interpreting() else 5, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(products())
def test_rows_of_any_size_are_as_accurate_as_pytorchs(drawn):
    dtype, x, labels, a = drawn
    bias = None if a.bias is None else a.bias.to(DEVICE)
    assert_rows_accurate(
        module.TRITON, dtype, x.to(DEVICE), labels.to(DEVICE), a._replace(weight=a.weight.to(DEVICE), bias=bias)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_it_is_as_accurate_as_pytorch(reduction, options, dtype, as_on_a_gpu, monkeypatch):
    """In several chunks."""
    monkeypatch.setattr(logits, "GPU", logits.Chunk(0, 7))
    with fastlm.use_backend(**dict.fromkeys(OPS, "triton")):
        assert_loss_accurate(there(draw(dtype)), reduction, options)


@pytest.mark.parametrize("layouts", [("transposed", "inside"), ("apart", "expanded")], ids=" ".join)
def test_hidden_and_weight_in_any_place(layouts, as_on_a_gpu):
    with fastlm.use_backend(**dict.fromkeys(OPS, "triton")):
        assert_loss_accurate(there(draw(torch.bfloat16, V=130, layouts=layouts)), "sum", OPTIONS["all"])


def test_while_a_graph_is_captured_all_rows_are_multiplied(as_on_a_gpu, monkeypatch):
    """Nothing waits for how many have a target, and those without give zeros."""
    drawn = there(draw(torch.float32))
    for backend in ("triton", "reference"):
        for reduction in ("sum", "none"):
            made = []
            with fastlm.use_backend(**dict.fromkeys(OPS, backend)):
                for answer in (False, True):
                    monkeypatch.setattr(logits, "capturing", lambda device, answer=answer: answer)
                    made.append(results(fastlm.linear_cross_entropy, drawn, reduction=reduction, z_loss=0.1))
            torch.testing.assert_close(made[1], made[0], rtol=1e-5, atol=1e-5)


def test_the_same_bits_every_time():
    x = torch.randn(3, 5001, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    labels = torch.tensor([0, 5000, 77], device=DEVICE)
    a = arguments(x, None, 5001, **OPTIONS["all"])
    first = module.TRITON.lose(x.clone(), labels, a)
    for _ in range(2 if native.interpreting() else 20):
        assert all(torch.equal(*pair) for pair in zip(module.TRITON.lose(x.clone(), labels, a), first, strict=True))


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_words_without_a_share():
    """Logits of -∞, a whole tile of them first; and of 1e4, whose exponentials overflow."""
    x = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[0, :3000], x[1, 7] = -torch.inf, 1e4
    labels = torch.tensor([4000, 7], device=DEVICE)
    a = arguments(x, None, 5000)
    (loss, dx), p = module.TRITON.lose(x.clone(), labels, a), x.double().softmax(-1)
    torch.testing.assert_close(loss.double(), -p.log().gather(1, labels[:, None]).squeeze(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        dx.double(), p.scatter_add(1, labels[:, None], -torch.ones_like(p)), rtol=1e-5, atol=1e-6
    )
