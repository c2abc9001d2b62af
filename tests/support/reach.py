"""Call every C++ kernel of every instruction set on small arguments that reach its lines: what sanitizers watch.

    python tests/support/reach.py memory|threads

Says what it calls before it does, so that the last line names the call in which a sanitizer stopped it. Whether results
are right is other tests' business; here they need only be made."""

import sys
from collections.abc import Callable, Iterator
from itertools import product

import torch
from cases import EMBEDDING, GATE, NORM, OPTIMIZERS, ROTATE
from chosen import MANY_TERMS, MANY_TURNS, TERMS, arguments, draw, results, taken_in_turns, with_terms
from draws import arguments as drawn
from hypothesis import HealthCheck, given, settings

import fastlm
from fastlm.backends import native
from fastlm.backends.dispatch import OPS
from fastlm.ops.attention import attention
from fastlm.ops.linear import FEW, linear_of_few_rows
from fastlm.ops.optim.unscale import grad_stats, unscale
from fastlm.ops.rotary import rotate

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tiles are of 64 queries and 64 keys; a unit has four tiles of queries up to 64 channels, two up to 128, and then one.
SHAPES = {
    "one": dict(Lq=1, Lk=1, D=1),
    "parts of tiles": dict(B=2, H=2, Hk=1, Lq=37, Lk=53, D=5, right=0),
    "whole tiles": dict(Lq=128, Lk=192, D=32),
    "edges": dict(Lq=130, Lk=150, D=40, left=70, right=3),
    "two units": dict(H=1, Hk=1, Lq=300, Lk=70, D=16, right=0, offset=-200),
    "128 channels": dict(H=1, Hk=1, Lq=130, Lk=67, D=128, table=False),
    "256 channels": dict(H=1, Hk=1, Lq=65, Lk=65, D=256, right=0),
    "241 channels": dict(H=1, Hk=1, Lq=3, Lk=66, D=241),
    "lengths": dict(B=3, Lq=20, Lk=70, key_lengths=torch.tensor([70, 5, 0])),
    "blind rows": dict(Lq=200, Lk=20, left=3, right=0),
    "no keys": dict(Lk=0),
    "no queries": dict(Lq=0),
}
BY_LAUNCHERS = ("long", "many", "several_groups")  # what these reach is compiled once, not for each set and dtype


def attentions(dtype: torch.dtype) -> Iterator[tuple[str, Callable]]:
    for name, sizes in SHAPES.items():
        yield name, lambda sizes=sizes: results(arguments(dtype=dtype, **sizes))
    for term in TERMS:
        sizes = dict(B=2, H=2, Hk=1, Lq=70, Lk=67, D=20, left=60, right=0)
        yield term, lambda term=term, sizes=sizes: results(with_terms(arguments(dtype=dtype, **sizes), [term]))
    yield "all terms", lambda: results(with_terms(arguments(B=2, Lq=66, Lk=130, D=33, dtype=dtype), TERMS))
    yield "views", lambda: results(_views(dtype))
    yield "gradient of lse", lambda: _gradient_of_lse(dtype)


def _views(dtype: torch.dtype):
    q, k, v = draw(2, 33, 3, 4, 18, dtype=dtype).transpose(1, 3).unbind(2)  # [B, L, 3, H, D], as a projection leaves it
    return arguments(D=18, dtype=dtype, table=False)._replace(q=q, k=k[:, :2], v=v[:, 2:])


def _gradient_of_lse(dtype: torch.dtype) -> None:
    args = arguments(dtype=dtype, return_lse=True)
    leaves = [x.requires_grad_() for x in args[:3]]
    sum(x.float().square().sum() for x in attention(args)).backward()
    assert all(x.grad.isfinite().all() for x in leaves)


@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(drawn(longest=80, widest=40, dtypes=DTYPES))
def draws(args) -> None:
    results(args)


def rotations(dtype: torch.dtype) -> Iterator[tuple[str, Callable]]:
    for case in ROTATE:

        def call(case=case) -> None:
            x, *angles, layout = case.make(dtype, CPU)
            out = rotate(x.requires_grad_(), *angles, layout)
            out.backward(out.detach())

        yield str(case), call


def norms(dtype: torch.dtype) -> Iterator[tuple[str, Callable]]:
    for case in NORM:

        def call(case=case) -> None:
            a = case.make(dtype, CPU)
            y, s, _ = OPS[case.op](a._replace(**{name: x.requires_grad_() for name, x in tensors_of(a).items()}))
            (y.float().sum() + s.float().sum()).backward()

        yield str(case), call


def gates(dtype: torch.dtype) -> Iterator[tuple[str, Callable]]:
    for case in GATE:

        def call(case=case) -> None:
            x, activation = case.make(dtype, CPU)
            OPS[case.op](x.requires_grad_(), activation).float().sum().backward()

        yield str(case), call


def embeddings(dtype: torch.dtype) -> Iterator[tuple[str, Callable]]:
    for case in EMBEDDING:

        def call(case=case) -> None:
            ids, weight, padding = case.make(dtype, CPU)
            with fastlm.use_backend(embedding="cpp"):
                OPS[case.op](ids, weight.requires_grad_(), padding).float().sum().backward()

        yield str(case), call


def losses(dtype: torch.dtype) -> Iterator[tuple[str, Callable]]:
    """Rows of several blocks and a rest, and short ones; with a bias where there is all else."""
    every = dict(label_smoothing=0.1, z_loss=0.1, softcap=2.0, temperature=0.7)
    for V, options in product((1, 5, 1024, 2061), ({}, every)):

        def call(V=V, options=options) -> None:
            hidden, weight = (draw(n, 3, dtype=dtype).requires_grad_() for n in (9, V))
            given = hidden, weight, torch.arange(9) % V, draw(V, dtype=dtype).requires_grad_() if options else None
            for reduction in ("sum", "none"):
                fastlm.linear_cross_entropy(*given, reduction=reduction, **options).sum().backward()

        yield f"{V} words {' '.join(options)}", call


def linears(dtype: torch.dtype) -> Iterator[tuple[str, Callable]]:
    """Outputs and channels that leave a rest, for any number of rows."""
    for rows, (N, K) in product(range(1, FEW + 1), ((5, 3), (131, 259))):

        def call(rows=rows, N=N, K=K) -> None:
            linear_of_few_rows(draw(rows, K, dtype=dtype), draw(N, K, dtype=dtype), draw(N, dtype=dtype))

        yield f"{rows} rows, {N} outputs of {K}", call


def tensors_of(args) -> dict[str, torch.Tensor]:
    return {name: x for name, x in args._asdict().items() if isinstance(x, torch.Tensor)}


def optimizers(dtype: torch.dtype) -> Iterator[tuple[str, Callable]]:
    for case in OPTIMIZERS:
        yield str(case), lambda case=case: OPS[case.op](*case.make(dtype, CPU))
    grads = [draw(1000, 33, dtype=dtype), draw(5, dtype=dtype), draw(0, dtype=dtype), draw(8, 6, dtype=dtype).T]
    yield "grad_stats", lambda: grad_stats(grads, torch.tensor(8.0), 2.0)
    yield "unscale", lambda: unscale(grads, torch.tensor(0.5), torch.zeros(()))
    yield "unscale what is not finite", lambda: unscale([draw(9, dtype=dtype) / 0], torch.tensor(1.0), torch.zeros(()))


def memory() -> None:
    sets = native.cpu().available()
    for isa in sets:
        native.cpu().use(isa)
        for dtype in DTYPES:
            for calls in (attentions, rotations, norms, gates, embeddings, linears, losses, optimizers):
                for name, call in calls(dtype):
                    if (isa, dtype) == (sets[0], DTYPES[0]) or not name.endswith(BY_LAUNCHERS):
                        print(isa, dtype, calls.__name__, name, flush=True)
                        call()
        print(isa, "draws", flush=True)
        draws()


def threads() -> None:
    """By the first of the sets alone: how threads wait for one another is the same in all."""
    for name in (*MANY_TURNS, *MANY_TERMS):
        args, made = taken_in_turns(name, torch.float32), []
        for n in (2, 7):
            print(native.cpu().active(), name, n, "threads", flush=True)
            torch.set_num_threads(n)
            made.append(results(args))
        for key, got in made[1].items():
            assert torch.equal(got, made[0][key]), f"{key} differs between 2 and 7 threads"
    for name, call in (
        *norms(torch.float32),
        *gates(torch.float32),
        *embeddings(torch.float32),
        *linears(torch.float32),
        *losses(torch.float32),
        *optimizers(torch.float32),
    ):
        print(native.cpu().active(), name, flush=True)
        call()


if __name__ == "__main__":
    with fastlm.use_backend("cpp"):
        {"memory": memory, "threads": threads}[sys.argv[1]]()
    print("reached the end")
