"""Example arguments for every op: the one list that correctness tests and benchmarks share.

A case is a name and a function from (dtype, device) to the op's arguments, drawn from a fixed seed. To cover a new op or
shape, add an entry; the suites iterate.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastlm import positions
from fastlm.masks import band


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    make: Callable[[torch.dtype, torch.device], tuple]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def _attention(B=2, H=2, Hk=2, Lq=64, Lk=64, D=64, scheme=None, lengths=None, causal=False, window=None, offset=None):
    """scheme: a name in positions.SCHEMES whose table is used, or None. lengths: key_lengths as a list of B ints."""

    def make(dtype, device):
        g = torch.Generator().manual_seed(Lq * 1000 + Lk * 10 + D)
        draw = lambda *shape: torch.randn(*shape, generator=g)
        q, k, v = draw(B, H, Lq, D), draw(B, Hk, Lk, D), draw(B, Hk, Lk, D)
        at = Lk - Lq if offset is None else offset
        table = None
        if scheme is not None:
            torch.manual_seed(0)
            position = positions.make(scheme, heads=H, head_dim=D, causal=causal)
            with torch.no_grad():
                for p in position.parameters():
                    p.copy_(torch.randn(p.shape, generator=g).abs())
                table = position.terms(Lq, Lk, at).table
        key_lengths = None if lengths is None else torch.tensor(lengths, device=device)
        left, right = band(causal, window)
        table = None if table is None else table.to(device, torch.promote_types(dtype, torch.float32))
        return *(t.to(device, dtype) for t in (q, k, v)), table, key_lengths, left, right, D**-0.5, at

    return make


def _rotate(B=2, H=3, L=37, D=64, R=None, layout="half", per_row=False):
    def make(dtype, device):
        g = torch.Generator().manual_seed(L * 100 + D)
        x = torch.randn(B, H, L, D, generator=g)
        angles = 100 * torch.randn(*((B,) if per_row else ()), L, (R or D) // 2, generator=g, dtype=torch.float64)
        wide = torch.promote_types(dtype, torch.float32)
        return x.to(device, dtype), angles.cos().to(device, wide), angles.sin().to(device, wide), layout

    return make


def _all(op: str, **makes) -> list[Case]:
    return [Case(op, name, make) for name, make in makes.items()]


ATTENTION = _all(
    "attention",
    plain=_attention(),
    causal=_attention(causal=True),
    odd=_attention(Lq=37, Lk=53, D=80, causal=True, scheme="t5"),
    t5=_attention(Lq=200, Lk=200, scheme="t5"),
    t5_causal=_attention(Lq=200, Lk=200, causal=True, scheme="t5"),
    alibi_causal=_attention(Lq=130, Lk=130, H=6, causal=True, scheme="alibi"),
    kerple_gqa=_attention(H=4, Hk=2, Lq=70, Lk=70, causal=True, scheme="kerple"),
    mqa=_attention(H=4, Hk=1, Lq=33, Lk=65, D=32),
    lengths=_attention(B=3, lengths=[64, 17, 0], scheme="t5"),
    decode=_attention(Lq=1, Lk=77, causal=True, scheme="alibi"),
    more_queries_than_keys=_attention(Lq=77, Lk=20, causal=True, scheme="t5"),
    window=_attention(Lq=150, Lk=150, causal=True, window=(40, 0), scheme="kerple"),
    window_symmetric=_attention(Lq=90, Lk=90, window=9),
    offset=_attention(Lq=20, Lk=90, causal=True, offset=13, scheme="t5"),
    one=_attention(Lq=1, Lk=1, causal=True, scheme="t5"),
    d96=_attention(Lq=50, Lk=50, D=96, causal=True),
    d128=_attention(Lq=65, Lk=65, D=128, causal=True, scheme="alibi"),
    d256=_attention(B=1, Lq=40, Lk=40, D=256, causal=True, scheme="t5"),
)

ROTATE = _all(
    "rotate",
    half=_rotate(),
    interleaved=_rotate(layout="interleaved"),
    partial=_rotate(D=80, R=20),
    partial_interleaved=_rotate(D=80, R=20, layout="interleaved"),
    per_row=_rotate(per_row=True),
    d128=_rotate(D=128, L=65),
    one=_rotate(B=1, H=1, L=1, D=32),
)


def _adamw(shapes=((64, 33), (7,), ()), coefficient=0.5, found_inf=0.0, transpose=False, correct=True):
    def make(dtype, device):
        g = torch.Generator().manual_seed(1)
        draw = lambda shape: torch.randn(shape, generator=g)
        params = [draw(s).to(device, dtype) for s in shapes]
        grads = [(draw(s[::-1]).T if transpose and len(s) == 2 else draw(s)).to(device, dtype) for s in shapes]
        exp_avgs = [0.1 * draw(s).to(device) for s in shapes]
        exp_avg_sqs = [0.01 * draw(s).square().to(device) for s in shapes]
        steps = [torch.full((), 3.0 + i, device=device) for i in range(len(shapes))]
        scalars = [None if x is None else torch.tensor(x, device=device) for x in (coefficient, found_inf)]
        return params, grads, exp_avgs, exp_avg_sqs, steps, *scalars, 1e-3, 0.9, 0.95, 1e-8, 0.1, correct

    return make


ADAMW = _all(
    "adamw",
    mixed_shapes=_adamw(),
    bare=_adamw(coefficient=None, found_inf=None),
    skipped=_adamw(found_inf=1.0),
    transposed_gradient=_adamw(transpose=True),
    uncorrected=_adamw(correct=False),
    empty_tensors=_adamw(shapes=((0,), (3, 0), (5,))),
    long=_adamw(shapes=((600_001,),)),
    many=_adamw(shapes=((3,),) * 300),
)
