"""Who competes in attention: every way a user of PyTorch has to get the same result, given the same inputs.

    fastlm            this library's choice for the device
    fastlm cuda       its CUDA C++, on GPUs
    sdpa …            scaled_dot_product_attention without a bias, each of its kernels forced: what no position costs
    dense bias …      scaled_dot_product_attention with the bias as a ready-made [H, L, L] tensor, its gradient dense:
                      less work than a model has to do
    flex              compiled FlexAttention; the bias is computed in score_mod, a learned table is a captured buffer
    flex max-autotune the same with the tiles that its compiler finds best by trying them
    eager             the formula in plain PyTorch

A distance table that is learned (T5, KERPLE) gets its gradient in "backward" and "both"; fixed slopes (ALiBi) do not.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from shapes import Attention
from timing import compare
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
from fastlm import positions
from fastlm.ops.rotary import rotate
from fastlm.positions import Terms

# relative error of one head, forward; twice that backward
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
FORCED = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Inputs:
    """q, k, v [B, H, L, D] that take gradients; grad = dL/dout; terms as the scheme gives them."""

    problem: Attention
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    terms: Terms

    @property
    def learned(self) -> bool:
        return self.terms.table is not None and self.terms.table.requires_grad

    @property
    def scale(self) -> float:
        return self.problem.D**-0.5

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v]


@dataclass(frozen=True)
class Contestant:
    run: Callable[[], Tensor]  # → out
    leaves: list[Tensor]  # what gets a gradient
    backend: str | None = None  # that is forced, of ours

    def call(self, direction: str, grad: Tensor) -> Callable[[], object]:
        """What is timed. forward: as in training, with a backward to come; backward: alone, over a graph that is kept;
        both.
        """
        if self.backend is not None:
            with self.forced():
                timed = replace(self, backend=None).call(direction, grad)
            return self.forced()(timed)
        if direction == "forward":
            return self.run
        if direction == "both":
            return lambda: torch.autograd.grad(self.run(), self.leaves, grad)
        out = self.run()
        return lambda: torch.autograd.grad(out, self.leaves, grad, retain_graph=True)

    def forced(self) -> AbstractContextManager:
        return fastlm.use_backend(attention=self.backend, attention_backward=self.backend)


def make_inputs(problem: Attention, device: torch.device) -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    shape = problem.B, problem.H, problem.L, problem.D
    q, k, v, grad = (torch.randn(shape, generator=g, device=device).to(problem.dtype) for _ in range(4))
    scheme = positions.make(problem.scheme, heads=problem.H, head_dim=problem.D, causal=True).to(device)
    with torch.no_grad():
        terms = scheme.terms(problem.L, problem.L, device=device)
    if terms.table is not None and list(scheme.parameters()):
        terms = terms._replace(
            table=torch.randn(terms.table.shape, generator=g, device=device).mul_(0.5).requires_grad_()
        )
    return Inputs(problem, q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad, terms)


def dense_bias(x: Inputs) -> Tensor:
    """[1, H, L, L] in q's dtype, -inf above the diagonal."""
    L = x.problem.L
    bias = x.terms.table.detach().unfold(-1, L, 1).flip(-2).to(x.q.dtype)
    future = torch.ones(L, L, dtype=torch.bool, device=x.q.device).triu_(1)
    return bias.masked_fill(future, -torch.inf)[None].requires_grad_(x.learned)


def turned(x: Inputs, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k rotated as a few lines of PyTorch do it, where the scheme rotates."""
    if x.terms.rotate_q is None:
        return q, k
    return rotate.definition(q, *x.terms.rotate_q, x.terms.layout), rotate.definition(
        k, *x.terms.rotate_k, x.terms.layout
    )


def ours(x: Inputs) -> Contestant:
    leaves = x.leaves + [x.terms.table] * x.learned
    return Contestant(lambda: fastlm.attention(x.q, x.k, x.v, position=x.terms, causal=True), leaves)


def sdpa(x: Inputs, backend: SDPBackend | None = None, bias: Tensor | None = None) -> Contestant:
    def run() -> Tensor:
        q, k = turned(x, x.q, x.k)
        return F.scaled_dot_product_attention(q, k, x.v, attn_mask=bias, is_causal=bias is None)

    def forced() -> Tensor:
        with sdpa_kernel(backend):
            return run()

    return Contestant(run if backend is None else forced, x.leaves + [bias] * (bias is not None and x.learned))


def eager(x: Inputs) -> Contestant:
    L, bias = x.problem.L, None if x.terms.table is None else dense_bias(x)
    future = torch.ones(L, L, dtype=torch.bool, device=x.q.device).triu_(1)

    def run() -> Tensor:
        q, k = turned(x, x.q, x.k)
        score = q @ k.mT * x.scale
        score = score.masked_fill(future, -torch.inf) if bias is None else score + bias
        return score.softmax(-1) @ x.v

    return Contestant(run, x.leaves + [bias] * x.learned)


def flex(x: Inputs, mode: str | None = None) -> Contestant:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = 1000
    L, table = x.problem.L, x.terms.table
    slopes = positions.alibi_slopes(x.problem.H).to(x.q.device)
    by_table = lambda score, b, h, i, j: score + table[h, j - i + L - 1]
    by_slope = lambda score, b, h, i, j: score - slopes[h] * (i - j)
    score_mod = {"none": None, "alibi": by_slope}.get(x.problem.scheme, by_table)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, L, L, device=x.q.device)
    compiled = torch.compile(flex_attention, dynamic=False, mode=mode)
    return Contestant(
        lambda: compiled(x.q, x.k, x.v, score_mod=score_mod, block_mask=mask), x.leaves + [table] * x.learned
    )


def contestants(x: Inputs, tuned: bool = False) -> dict[str, Callable[[], Contestant]]:
    """{name: how to set the contestant up}, ours first. Setting up may fail, for want of memory or of a kernel.

    tuned: whether FlexAttention takes part as max-autotune chooses too, on GPUs.
    """
    biased, on_gpu = x.terms.table is not None, x.q.device.type == "cuda"
    field = {"fastlm": lambda: ours(x)}
    if on_gpu:
        field["fastlm cuda"] = lambda: replace(ours(x), backend="cuda")
        field |= {f"sdpa {name}": lambda backend=backend: sdpa(x, backend) for name, backend in FORCED.items()}
        if biased:
            dense = cache(lambda: dense_bias(x))  # one tensor for both, made by the first that needs it
            field |= {
                f"dense bias {name}": lambda name=name: sdpa(x, FORCED[name], dense())
                for name in ("cudnn", "efficient")
            }
        if x.terms.rotate_q is None:
            field["flex"] = lambda: flex(x)
            if tuned:
                field["flex max-autotune"] = lambda: flex(x, "max-autotune-no-cudagraphs")
    else:
        field["sdpa"] = lambda: sdpa(x)
        if biased:
            field["dense bias"] = lambda: sdpa(x, bias=dense_bias(x))
        field["eager"] = lambda: eager(x)
    return {name: cache(set_up) for name, set_up in field.items()}


def measure(x: Inputs, field: dict[str, Callable[[], Contestant]], direction: str, clock: str, **limits) -> dict:
    """One row of results."""
    calls = {name: lambda set_up=set_up: [set_up().call(direction, x.grad)] for name, set_up in field.items()}
    problem = asdict(x.problem) | {"dtype": str(x.problem.dtype).removeprefix("torch.")}
    return compare(calls, clock, **limits).row(
        kind="attention", direction=direction, flops=x.problem.flops(direction), **problem
    )


def peak_bytes(x: Inputs) -> int:
    """Device memory that ours takes beyond its inputs, forward and backward, results included; 0 on a CPU, which is not
    asked.
    """
    if x.q.device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ours(x).call("both", x.grad)()
    return torch.cuda.max_memory_allocated() - before


def check(x: Inputs, gradients: bool) -> dict[str, float]:
    """Relative errors of ours on the first head against fp64: out, and with gradients dq, dk, dv and dtable, which sums
    over the batch.

    Raises AssertionError above TOLERANCE, and for NaN.
    """
    mine = ours(x)
    out = mine.run()
    truth = _truth(x)
    got = {"out": out[:1, :1]}
    if gradients:
        names = ("dq", "dk", "dv", "dtable")
        got |= {
            n: g[:1] if n == "dtable" else g[:1, :1]
            for n, g in zip(names, torch.autograd.grad(out, mine.leaves, x.grad), strict=False)
        }
    errors = {n: ((g.double() - truth[n]).norm() / truth[n].norm()).item() for n, g in got.items()}
    for n, error in errors.items():
        allowed = TOLERANCE[x.problem.dtype] * (1 if n == "out" else 2)
        assert error <= allowed, f"{x.problem}: {n} of the first head is off by {error:.1e}, allowed {allowed:.0e}"
    return errors


def _truth(x: Inputs) -> dict[str, Tensor]:
    """The formula in fp64 for the first head: out and gradients of the first row, and the table's gradient over all
    rows.
    """
    table = None if x.terms.table is None else x.terms.table[:1].detach().double().requires_grad_(x.learned)
    future = torch.ones(x.problem.L, x.problem.L, dtype=torch.bool, device=x.q.device).triu_(1)
    rows = []
    for b in range(x.problem.B if x.learned else 1):
        q, k, v = leaves = [t[b : b + 1, :1].detach().double().requires_grad_() for t in x.leaves]
        q, k = turned(x, q, k)
        score = q @ k.mT * x.scale if table is None else q @ k.mT * x.scale + table.unfold(-1, x.problem.L, 1).flip(-2)
        out = score.masked_fill(future, -torch.inf).softmax(-1) @ v
        grads = torch.autograd.grad(out, leaves + [table] * x.learned, x.grad[b : b + 1, :1].double())
        rows.append((out.detach(), *grads))
    return dict(zip(("out", "dq", "dk", "dv"), rows[0], strict=False)) | {"dtable": sum(row[-1] for row in rows)}
