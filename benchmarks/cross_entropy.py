"""Who competes in the cross entropy of a linear layer's logits, forward and backward to hidden and weight:

    fastlm      fastlm.linear_cross_entropy
    torch       F.cross_entropy(F.linear(hidden, weight), labels)
    compiled    the same by torch.compile, on GPUs
    liger       Liger's fused linear cross entropy, on GPUs where it is installed

Rows without a target have label -100, and count for nothing.
"""

from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from machine import peak_growth
from shapes import Loss
from timing import compare
from torch import Tensor

import fastlm

# relative errors: of the loss, and of gradients
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-3, 2e-2), torch.float16: (1e-3, 1e-2)}
SOME, ROWS = 64, 512  # rows and words whose gradients are checked; rows that are there in fp64 at a time


class Inputs:
    """hidden [N, D] and weight [V, D], which take gradients; labels [N]."""

    def __init__(self, problem: Loss, device: torch.device):
        g = torch.Generator(device).manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=g, device=device)
        self.problem, N, V, D = problem, problem.N, problem.V, problem.D
        self.hidden = draw(N, D).to(problem.dtype).requires_grad_()
        self.weight = draw(V, D).mul_(D**-0.5).to(problem.dtype).requires_grad_()
        self.labels = torch.randint(V, (N,), generator=g, device=device)
        self.labels[torch.rand(N, generator=g, device=device) >= problem.targets] = -100

    def step(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        leaves = self.hidden, self.weight
        return lambda: torch.autograd.grad(loss(*leaves, self.labels), leaves)


def by_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels)


def by_liger() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def contestants(x: Inputs) -> dict[str, Callable[[], Callable]]:
    """{name: how to set the contestant's step up}, ours first."""
    losses = {"fastlm": lambda: fastlm.linear_cross_entropy, "torch": lambda: by_logits}
    if x.hidden.device.type == "cuda":
        losses |= {"compiled": lambda: torch.compile(by_logits, dynamic=False), "liger": by_liger}
    return {name: lambda make=make: x.step(make()) for name, make in losses.items()}


def measure(x: Inputs, clock: str, matmul: float, **limits) -> dict:
    """One row of results. matmul: operations a second of torch.mm in the problem's dtype."""
    field = contestants(x)
    found = compare({name: lambda make=make: [make()] for name, make in field.items()}, clock, **limits)
    ran = {name: make for name, make in field.items() if name not in found.left_out}
    problem = asdict(x.problem) | {"dtype": str(x.problem.dtype).removeprefix("torch.")}
    facts = dict(kind="loss", flops=x.problem.flops, matmul=matmul, clock=clock) | problem
    memory = {name: peak_bytes(x, make()) for name, make in ran.items()}
    return found.row(**facts, memory=memory)


def peak_bytes(x: Inputs, step: Callable) -> int | None:
    """Memory of a step beyond its inputs, gradients included; of a CPU None where the process cannot tell."""
    step()
    if x.hidden.device.type != "cuda":
        return peak_growth(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def check(x: Inputs) -> float:
    """The largest relative error of ours, of the loss and of gradients of some rows and some words, against fp64.

    Raises AssertionError above TOLERANCE, and for NaN.
    """
    loss = fastlm.linear_cross_entropy(x.hidden, x.weight, x.labels)
    d_hidden, d_weight = torch.autograd.grad(loss, (x.hidden, x.weight))
    got, largest = (loss.detach(), d_hidden[:SOME], d_weight[:SOME]), 0.0
    for mine, true, allowed in zip(got, _truth(x), [TOLERANCE[x.problem.dtype][i] for i in (0, 1, 1)], strict=True):
        error = ((mine.double() - true).norm() / true.norm()).item()
        assert error <= allowed, f"{x.problem}: off by {error:.1e}, allowed {allowed:.0e}"
        largest = max(largest, error)
    return largest


@torch.no_grad()
def _truth(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss, the gradient of the first rows of hidden and of the first words of weight, in fp64."""
    weight, counted = x.weight.double(), x.labels != -100
    total, d_weight, d_hidden = weight.new_zeros(()), torch.zeros_like(weight[:SOME]), []
    for rows in torch.arange(x.problem.N, device=weight.device).split(ROWS):
        hidden, labels = x.hidden[rows].double(), x.labels[rows].clamp(min=0)[:, None]
        log_p = (hidden @ weight.mT).log_softmax(-1)
        total -= log_p.gather(1, labels)[counted[rows]].sum()
        p = log_p.exp_().scatter_add_(1, labels, -torch.ones_like(labels, dtype=log_p.dtype))
        p *= counted[rows][:, None]
        d_weight += p[:, :SOME].mT @ hidden
        if len(d_hidden) == 0:
            d_hidden.append(p[:SOME] @ weight)
    return tuple(sums / counted.sum() for sums in (total, d_hidden[0], d_weight))
