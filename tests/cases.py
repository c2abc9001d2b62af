"""Example arguments for every op: the one list that correctness tests and benchmarks share.

A case is a name and a function from (dtype, device) to the op's arguments, drawn from a fixed seed. To cover a new op or
shape, add an entry; the suites iterate.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastlm import positions
from fastlm.masks import band
from fastlm.ops.attention import TENSORS, Arguments


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    make: Callable[[torch.dtype, torch.device], tuple]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def _attention(
    B=2, H=2, Hk=2, Lq=64, Lk=64, D=64, scheme=None, bias=None, lengths=None, prefix=None, segments=False, order=False, groups=False,
    causal=False, window=None, offset=None, dropout=0.0,
):  # fmt: skip
    """scheme: a name in positions.SCHEMES whose table or vectors are used. bias: its shape, by which of B, H, Lq, Lk it has,
    such as "hqk". lengths, prefix: a list of B ints. segments: three to a row. order: a random one. groups: XLNet's two segments."""

    def make(dtype, device):
        g = torch.Generator().manual_seed(Lq * 1000 + Lk * 10 + D)
        wide = torch.promote_types(dtype, torch.float32)
        draw = lambda *shape, dtype=dtype: torch.randn(*shape, generator=g).to(device, dtype)
        ints = lambda high, *shape: torch.randint(high, shape, generator=g).to(device)
        a = dict.fromkeys(TENSORS)
        a |= {"q": draw(B, H, Lq, D), "k": draw(B, Hk, Lk, D), "v": draw(B, Hk, Lk, D)}
        at = Lk - Lq if offset is None else offset
        terms = 1
        if scheme is not None:
            torch.manual_seed(0)
            position = positions.make(scheme, dim=H * D, heads=H, head_dim=D, causal=causal)
            with torch.no_grad():
                for p in position.parameters():
                    p.copy_(torch.randn(p.shape, generator=g).abs() / (D**0.5 if p.shape[-1] == H * D else 1))
                made = position.terms(Lq, Lk, at)
            vectors, terms = made.vectors, made.vectors.terms
            a["table"] = None if made.table is None else made.table.to(device, wide)
            for name in ("query_vectors", "key_vectors", "value_vectors"):
                rows = getattr(vectors, name)
                a[name] = None if rows is None else rows.to(device, dtype)
            if vectors.position_bias is not None:
                a["q_position"] = draw(B, H, Lq, D)
        if bias is not None:
            a["bias"] = draw(*(n if letter in bias else 1 for letter, n in zip("bhqk", (B, H, Lq, Lk), strict=True)))
        if groups:
            a |= {"same": draw(B, H, Lq, dtype=wide), "q_groups": ints(2, B, Lq), "k_groups": ints(2, B, Lk)}
        a["key_lengths"] = None if lengths is None else torch.tensor(lengths, device=device)
        a["prefix"] = None if prefix is None else torch.tensor(prefix, device=device)
        if segments:
            a |= {f"{side}_segments": ints(3, B, n).sort(-1).values for side, n in (("q", Lq), ("k", Lk))}
        if order:
            a |= {"q_ranks": ints(Lk, B, Lq), "k_ranks": ints(Lk, B, Lk)}
        left, right = band(causal, window)
        return Arguments(**a, left=left, right=right, scale=(terms * D) ** -0.5, offset=at, dropout=dropout, seed=1234567890123, return_lse=False)

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
    shaw=_attention(Lq=70, Lk=70, scheme="shaw"),
    shaw_causal_gqa=_attention(H=4, Hk=2, Lq=33, Lk=50, D=32, causal=True, scheme="shaw"),
    transformer_xl=_attention(Lq=40, Lk=72, causal=True, scheme="transformer-xl"),
    xlnet=_attention(Lq=48, Lk=48, D=32, scheme="transformer-xl", order=True, groups=True),
    deberta=_attention(Lq=50, Lk=50, D=32, scheme="deberta", lengths=[50, 31]),
    deberta_gqa=_attention(H=4, Hk=2, Lq=20, Lk=44, D=32, scheme="deberta"),
    bias_full=_attention(bias="bhqk", causal=True),
    bias_heads=_attention(bias="hqk", Lq=37, Lk=53),
    bias_keys=_attention(bias="bk", Lq=37, Lk=53),
    bias_queries=_attention(bias="q", Lq=37, Lk=53),
    prefix=_attention(prefix=[9, 0], causal=True, Lq=70, Lk=70, scheme="t5"),
    packed=_attention(segments=True, causal=True, Lq=150, Lk=150, scheme="alibi"),
    packed_bidirectional=_attention(segments=True, lengths=[60, 64]),
    order=_attention(order=True, scheme="kerple"),
    every_mask=_attention(prefix=[5, 20], segments=True, lengths=[60, 30], order=True, causal=True, window=(25, 0), scheme="t5"),
    dropout=_attention(dropout=0.2, causal=True, Lq=70, Lk=70, scheme="t5"),
    dropout_odd=_attention(dropout=0.5, H=4, Hk=1, Lq=33, Lk=47, D=32),
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
