"""What a call of an op takes the host on a CPU, at sizes where its kernel takes next to nothing.

    python benchmarks/calls.py

Microseconds of process time of one thread, called without gradients, forward, and forward and backward: through
torch.library's operator → as it is called where nobody looks on (fastlm/backends/eager.py); and PyTorch's own.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import compare
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout built in place, unless fastlm is installed
from fastlm.backends import dispatch
from fastlm.backends.dispatch import use_backend
from fastlm.ops import attention, gate, linear_cross_entropy, norm, rotary


def calls() -> dict[str, tuple[list[Tensor], Callable[[], Tensor]]]:
    """Name → (leaves, the call)."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g).requires_grad_()
    x, weight, bias, gates = draw(1, 768), draw(768), draw(768), draw(1, 512)
    q, one, k, v = draw(1, 4, 64, 32), draw(1, 4, 1, 32), draw(1, 4, 64, 32), draw(1, 4, 64, 32)
    angles, hidden, words = torch.rand(2, 64, 16), draw(8, 64), draw(128, 64)
    labels = torch.arange(8)
    normed = lambda bias: norm.Arguments(x, None, weight, bias, 1e-5, 0.0, False)
    of = attention.Arguments.of
    loss = linear_cross_entropy.Arguments(hidden, words, None, labels, -100, 0.0, 0.0, 0.0, 1.0)
    table, of_one = draw(4, 127), draw(4, 64)
    return {
        "layer_norm [1, 768]": ([x, weight, bias], lambda: norm.layer_norm(normed(bias))[0]),
        "rms_norm [1, 768]": ([x, weight], lambda: norm.rms_norm(normed(None))[0]),
        "gated [1, 512]": ([gates], lambda: gate.gated(gates, "silu")),
        "rotate [1, 4, 64, 32]": ([q], lambda: rotary.rotate(q, *angles, "half")),
        "attention, L 1 of 64": ([one, k, v, of_one], lambda: attention.attention(of(one, k, v, table=of_one))[0]),
        "attention, L 64": ([q, k, v, table], lambda: attention.attention(of(q, k, v, table=table, right=0))[0]),
        "linear_cross_entropy": ([hidden, words], lambda: linear_cross_entropy.linear_cross_entropy(loss)[0]),
        "the same, summed": (
            [hidden, words],
            lambda: linear_cross_entropy.summed_linear_cross_entropy(loss, True, True)[0],
        ),
        "F.layer_norm": ([x, weight, bias], lambda: F.layer_norm(x, (768,), weight, bias)),
        "F.scaled_dot_product_attention, L 64": ([q, k, v], lambda: F.scaled_dot_product_attention(q, k, v)),
    }


def through_the_operator(call: Callable) -> Callable:
    def operator():
        seen, dispatch.observed = dispatch.observed, lambda values: True
        try:
            return call()
        finally:
            dispatch.observed = seen

    return operator


def microseconds(call: Callable) -> str:
    ours = lambda: [call]
    seconds = compare({"ours": ours, "operator": lambda: [through_the_operator(call)]}, "process", budget=3.0).seconds
    return f"{1e6 * seconds['operator'].median:4.0f} →{1e6 * seconds['ours'].median:4.0f}"


def main() -> None:
    torch.set_num_threads(1)
    with use_backend(layer_norm="cpp", rms_norm="cpp", gated="cpp", rotate="cpp", attention="cpp"):
        for name, (leaves, forward) in calls().items():
            grad = torch.ones_like(forward())
            both = lambda forward=forward, leaves=leaves, grad=grad: torch.autograd.grad(forward(), leaves, grad)
            times = microseconds(torch.no_grad()(forward)), microseconds(forward), microseconds(both)
            print(f"{name:37}", "   ".join(times))


if __name__ == "__main__":
    main()
