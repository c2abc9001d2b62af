"""Example arguments for every op: the one list that correctness tests and benchmarks share.

A case is a name and a function from (dtype, device) to the op's arguments, drawn from a fixed seed. To cover a new op
or shape, add an entry; the suites iterate.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastlm import positions
from fastlm.masks import band
from fastlm.ops import gate, norm
from fastlm.ops.attention import TENSORS, VECTORS, Arguments
from fastlm.positions import frequencies


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    make: Callable[[torch.dtype, torch.device], tuple]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


# Every scheme that attention serves, and beyond their defaults the options that change what is computed, after the
# scheme's name.
OPTIONS = {
    "rope interleaved": dict(layout="interleaved"),
    "rope partial": dict(fraction=0.5),
    "rope proportional": dict(fraction=0.5, layout="proportional"),
    "rope interpolated": dict(scaling=frequencies.interpolate(4.0)),
    "rope ntk": dict(scaling=frequencies.ntk(4.0)),
    "rope yarn": dict(scaling=frequencies.yarn(8.0, 32)),
    "rope llama3": dict(scaling=frequencies.llama3(8.0, 32)),
    "alibi learned": dict(learned=True),
    "t5 near": dict(buckets=8, max_distance=12),
    "shaw near": dict(reach=3),
    "shaw keys": dict(values=False),
    "transformer-xl clamped": dict(clamp=5),
    "deberta v1": dict(span=6),
    "deberta v3": dict(span=16, buckets=8),
}
POSITIONS = sorted([*OPTIONS, *(name for name, scheme in positions.SCHEMES.items() if not scheme.embeds())])


def position(name: str, heads: int, head_dim: int, causal: bool) -> positions.Position:
    """The scheme that POSITIONS names, its parameters drawn large enough to matter."""
    facts = dict(dim=heads * head_dim, heads=heads, head_dim=head_dim, causal=causal)
    made, g = positions.make(name.split()[0], **facts, **OPTIONS.get(name, {})), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=g).abs() / (head_dim**0.5 if p.shape[-1] == heads * head_dim else 1))
    return made


def _attention(
    B=2, H=2, Hk=2, Lq=64, Lk=64, D=64, scheme=None, bias=None, lengths=None, prefix=None, segments=False, order=False,
    groups=False,
    causal=False, window=None, offset=None, dropout=0.0, softcap=None,
):  # fmt: skip
    """scheme: a name in positions.SCHEMES whose table or vectors are used. bias: its shape, by which of B, H, Lq, Lk it
    has, such as "hqk". lengths, prefix: a list of B ints. segments: three to a row. order: a random one. groups:
    XLNet's two segments.
    """

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
            with torch.no_grad():
                made = position(scheme, H, D, causal).terms(Lq, Lk, at)
            vectors, terms = made.vectors, made.vectors.terms
            a["table"] = None if made.table is None else made.table.to(device, wide)
            for name in VECTORS:
                rows = getattr(vectors, name)
                a[name] = None if rows is None else rows.to(device, dtype)
            a["buckets"] = None if vectors.buckets is None else vectors.buckets.to(device)
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
        return Arguments(
            **a,
            left=left,
            right=right,
            scale=(terms * D) ** -0.5,
            offset=at,
            dropout=dropout,
            seed=1234567890123,
            return_lse=False,
            softcap=softcap,
        )

    return make


def _rotate(B=2, H=3, L=37, D=64, R=None, layout="half", per_row=False):
    def make(dtype, device):
        g = torch.Generator().manual_seed(L * 100 + D)
        x = torch.randn(B, H, L, D, generator=g)
        angles = 100 * torch.randn(*((B,) if per_row else ()), L, (R or D) // 2, generator=g, dtype=torch.float64)
        wide = torch.promote_types(dtype, torch.float32)
        return x.to(device, dtype), angles.cos().to(device, wide), angles.sin().to(device, wide), layout

    return make


def _norm(rows=(3, 13), D=64, residual=True, weight=True, bias=False, offset=0.0, rounds_first=False, mixed=False):
    """mixed: the residual and the weight are fp32 whatever x is, as under autocast."""

    def make(dtype, device):
        g = torch.Generator().manual_seed(D)
        wide = torch.promote_types(dtype, torch.float32) if mixed else dtype
        draw = lambda *shape, dtype: (2 * torch.randn(*shape, generator=g) + 0.5).to(device, dtype)
        return norm.Arguments(
            draw(*rows, D, dtype=dtype),
            draw(*rows, D, dtype=wide) if residual else None,
            draw(D, dtype=wide) if weight else None,
            draw(D, dtype=wide) if bias else None,
            1e-5,
            offset,
            rounds_first,
        )

    return make


def _gate(activation, rows=(3, 13), H=300):
    """Elements to ±12, where activations are flat, and 0."""

    def make(dtype, device):
        g = torch.Generator().manual_seed(H)
        x = (3 * torch.randn(*rows, H, generator=g)).clamp(-12, 12)
        x[..., :1] = 0.0
        return x.to(device, dtype), activation

    return make


def _embedding(tokens=50, rows=(7, 60), D=40, padding=-1, only=None):
    """Ids of which few are frequent, as in a text, or all of them one."""

    def make(dtype, device):
        g = torch.Generator().manual_seed(tokens)
        drawn = (tokens * torch.rand(*rows, generator=g) ** 3).long() if only is None else torch.full(rows, only)
        return drawn.to(device), torch.randn(tokens, D, generator=g).to(device, dtype), padding

    return make


def _all(op: str, **makes) -> list[Case]:
    return [Case(op, name, make) for name, make in makes.items()]


INF = float("inf")

ATTENTION = _all(
    "attention",
    plain=_attention(),
    causal=_attention(causal=True),
    odd=_attention(Lq=37, Lk=53, D=80, causal=True, scheme="t5"),
    t5=_attention(Lq=130, Lk=130, scheme="t5"),
    t5_causal=_attention(Lq=130, Lk=130, causal=True, scheme="t5"),
    alibi_causal=_attention(B=1, Lq=130, Lk=130, H=6, causal=True, scheme="alibi"),
    kerple_gqa=_attention(B=1, H=4, Hk=2, Lq=70, Lk=70, causal=True, scheme="kerple"),
    mqa=_attention(H=4, Hk=1, Lq=33, Lk=65, D=32),
    lengths=_attention(B=3, lengths=[64, 17, 0], scheme="t5"),
    decode=_attention(Lq=1, Lk=77, causal=True, scheme="alibi"),
    more_queries_than_keys=_attention(Lq=77, Lk=20, causal=True, scheme="t5"),
    window=_attention(Lq=130, Lk=130, causal=True, window=(40, 0), scheme="kerple"),
    window_symmetric=_attention(Lq=90, Lk=90, window=9),
    offset=_attention(Lq=20, Lk=90, causal=True, offset=13, scheme="t5"),
    one=_attention(Lq=1, Lk=1, causal=True, scheme="t5"),
    d96=_attention(Lq=50, Lk=50, D=96, causal=True),
    d128=_attention(Lq=65, Lk=65, D=128, causal=True, scheme="alibi"),
    shaw=_attention(Lq=70, Lk=70, scheme="shaw"),
    shaw_causal_gqa=_attention(B=1, H=4, Hk=2, Lq=33, Lk=50, D=32, causal=True, scheme="shaw"),
    transformer_xl=_attention(Lq=40, Lk=72, causal=True, scheme="transformer-xl"),
    xlnet=_attention(Lq=48, Lk=48, D=32, scheme="transformer-xl", order=True, groups=True),
    deberta=_attention(Lq=50, Lk=50, D=32, scheme="deberta", lengths=[50, 31]),
    deberta_gqa=_attention(B=1, H=4, Hk=2, Lq=20, Lk=44, D=32, scheme="deberta"),
    bias_full=_attention(bias="bhqk", causal=True),
    bias_heads=_attention(bias="hqk", Lq=37, Lk=53),
    bias_keys=_attention(H=4, bias="hk", Lq=37, Lk=53, lengths=[53, 30]),
    bias_queries=_attention(bias="q", Lq=37, Lk=53),
    prefix=_attention(prefix=[9, 0], causal=True, Lq=70, Lk=70, scheme="t5"),
    packed=_attention(segments=True, causal=True, Lq=130, Lk=130, scheme="alibi"),
    packed_bidirectional=_attention(segments=True, lengths=[60, 64]),
    order=_attention(order=True, scheme="kerple"),
    every_mask=_attention(
        prefix=[5, 20], segments=True, lengths=[60, 30], order=True, causal=True, window=(25, 0), scheme="t5"
    ),
    dropout=_attention(dropout=0.2, causal=True, Lq=70, Lk=70, scheme="t5"),
    dropout_odd=_attention(B=1, dropout=0.5, H=4, Hk=1, Lq=33, Lk=47, D=32),
    d256=_attention(B=1, Lq=40, Lk=40, D=256, causal=True, scheme="t5"),
    softcap=_attention(softcap=1.5),
    softcap_window_gqa=_attention(B=1, H=4, Hk=2, Lq=130, Lk=130, D=32, causal=True, window=(40, 0), softcap=0.5),
    softcap_t5=_attention(Lq=37, Lk=53, D=80, causal=True, scheme="t5", softcap=1.5),
    softcap_bias_dropout=_attention(Lq=37, Lk=53, bias="hqk", lengths=[53, 20], dropout=0.2, softcap=0.7),
    softcap_deberta=_attention(B=1, H=4, Hk=2, Lq=20, Lk=44, D=32, scheme="deberta", softcap=0.7),
    softcap_xlnet=_attention(
        Lq=48, Lk=48, D=32, scheme="transformer-xl", order=True, groups=True, segments=True, softcap=1.0
    ),
)

# Every kind of term beside every mask.
MASKS = dict(
    causal=dict(causal=True),
    window=dict(window=(40, 9)),
    lengths=dict(lengths=[150, 31]),
    prefix=dict(prefix=[9, 120], causal=True),
    packed=dict(segments=True, causal=True),
    order=dict(order=True),
    dropout=dict(dropout=0.2),
)
KINDS = {scheme or "plain": dict(scheme=scheme) for scheme in (None, "t5", "shaw", "transformer-xl", "deberta")}
KINDS |= dict(bias=dict(bias="hqk"), groups=dict(groups=True), softcap=dict(scheme="t5", softcap=1.5))
COMBINED = _all(
    "attention",
    **{
        f"{kind}_{mask}": _attention(H=4, Lq=150, Lk=150, D=16, **KINDS[kind], **MASKS[mask])
        for kind in KINDS
        for mask in MASKS
    },
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

NORMED = dict(
    alone=_norm(residual=False),
    residual=_norm(),
    bare=_norm(weight=False),
    mixed=_norm(mixed=True),
    gemma=_norm(offset=1.0),
    llama=_norm(rounds_first=True, D=72),
    odd=_norm(rows=(7,), D=37),
    narrow=_norm(rows=(40,), D=3),
    wide=_norm(rows=(5,), D=3001),
    many_rows=_norm(rows=(1100,), D=24),
    no_rows=_norm(rows=(0, 4)),
)
NORM = [
    *_all("layer_norm", **NORMED, bias=_norm(bias=True), bias_alone=_norm(bias=True, residual=False)),
    *_all("rms_norm", **NORMED),
]

GATE = [
    *_all("gated", **{name: _gate(name, H=2 * 300) for name in gate.ACTIVATIONS}),
    *_all("activated", **{name: _gate(name) for name in gate.ACTIVATIONS}),
    *_all("gated", narrow=_gate("silu", rows=(40,), H=2), odd=_gate("gelu", H=2 * 37), no_rows=_gate("silu", (0, 4))),
]

EMBEDDING = _all(
    "embedding",
    plain=_embedding(),
    padded=_embedding(padding=0),
    one_token=_embedding(only=3),
    rare=_embedding(tokens=3000, rows=(9,)),
    odd=_embedding(D=37),
    narrow=_embedding(D=1),
    wide=_embedding(tokens=5, D=1100),
    no_ids=_embedding(rows=(0, 4)),
)


def _lists(shapes, dtype, device, master=None, transpose=False, states=2, state_dtype=torch.float32):
    """[params, masters, keys, grads, *states], steps: what every optimizer's op begins with. Masters are for bf16
    alone.
    """
    g = torch.Generator().manual_seed(1)
    draw = lambda shape: torch.randn(shape, generator=g)
    master = master if dtype == torch.bfloat16 else None
    params = [draw(s).to(device, dtype) for s in shapes]
    masters = {  # they differ from the parameter by more than its rounding: those elements were written since
        "fp32": lambda: [p.float() + 2e-3 * draw(p.shape).to(device) * p.abs().float() for p in params],
        "remainder": lambda: [
            torch.randint(-(2**15), 2**15, p.shape, generator=g).to(device, torch.int16) for p in params
        ],
    }.get(master, list)()
    keys = [7 << 32 | i for i in range(len(shapes))] if master == "stochastic" else []
    grads = [(draw(s[::-1]).T if transpose and len(s) == 2 else draw(s)).to(device, dtype) for s in shapes]
    moments = [
        [0.1 * draw(s).to(device, state_dtype) for s in shapes],
        [0.01 * draw(s).square().to(device, state_dtype) for s in shapes],
    ]
    steps = [torch.full((), 3.0 + i, device=device) for i in range(len(shapes))]
    return [params, masters, keys, grads, *moments[:states]], steps


def _flags(device, coefficient, found_inf):
    return [None if x is None else torch.tensor(x, device=device) for x in (coefficient, found_inf)]


MIXED = ((64, 33), (7,), ())


def _adamw(shapes=MIXED, coefficient=0.5, found_inf=0.0, correction=1, decoupled=True, **options):
    def make(dtype, device):
        lists, steps = _lists(shapes, dtype, device, **options)
        return *lists, steps, *_flags(device, coefficient, found_inf), 1e-3, 0.9, 0.95, 1e-8, 0.1, correction, decoupled

    return make


def _lamb(
    shapes=MIXED,
    coefficient=0.5,
    found_inf=0.0,
    correction=1,
    decoupled=True,
    ratio=(True, False, 0.0, INF, 0.0, INF),
    **options,
):
    def make(dtype, device):
        lists, steps = _lists(shapes, dtype, device, **options)
        adam = 1e-2, 0.9, 0.95, 1e-6, 0.1, correction, decoupled
        return *lists, steps, *_flags(device, coefficient, found_inf), *adam, *ratio

    return make


def _sgd(
    shapes=MIXED, coefficient=0.5, found_inf=0.0, momentum=0.9, dampening=0.1, nesterov=False, first=False, **options
):
    def make(dtype, device):
        lists, steps = _lists(shapes, dtype, device, states=1 if momentum else 0, **options)
        lists = lists if momentum else [*lists, []]
        steps = [torch.zeros_like(step) for step in steps] if first else steps
        return *lists, steps, *_flags(device, coefficient, found_inf), 1e-2, momentum, dampening, 0.1, nesterov

    return make


def _adafactor(
    shapes=((64, 33), (7,), (), (3, 20, 50)), coefficient=0.5, found_inf=0.0, tiny=1.0, momentum=0.0, lr=1e-2,
    relative=True, ramp=INF, offset=0.0,
    eps=(1e-30, 0.0), scaled=True, decay=0.1, by_step=True, first=False, dead=False, **options,
):  # fmt: skip
    """tiny: what gradients and factors are scaled by. dead: a row and a column of each matrix have no gradient, and
    never had.
    """

    def make(dtype, device):
        (params, masters, keys, grads, exp_avgs), steps = _lists(shapes, dtype, device, states=1, **options)
        squares = [
            (tiny * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))).square().to(device)
            for p in params
        ]
        for p, g, v in zip(params, grads, squares, strict=True):
            g.mul_(tiny)
            if dead and p.ndim > 1 and p.numel():
                for x in (g, v):
                    x[..., 1, :], x[..., :, 2] = 0.0, 0.0
        factored = [p.ndim > 1 and p.numel() > 0 for p in params]
        rows = [v.mean(-1) if f else v for v, f in zip(squares, factored, strict=True)]
        cols = [v.mean(-2) if f else v.new_empty(0) for v, f in zip(squares, factored, strict=True)]
        if first:
            rows, cols, steps = (
                [torch.zeros_like(x) for x in rows],
                [torch.zeros_like(x) for x in cols],
                [torch.zeros_like(x) for x in steps],
            )
        lists = params, masters, keys, grads, rows, cols, exp_avgs if momentum else []
        scalars = lr, relative, ramp, 0.8, offset, *eps, 1e-3, scaled, 0.05, 1.0, momentum, decay, by_step
        return *lists, steps, *_flags(device, coefficient, found_inf), *scalars

    return make


ODD = dict(
    bare=dict(coefficient=None, found_inf=None),
    skipped=dict(found_inf=1.0),
    transposed_gradient=dict(transpose=True),
    empty_tensors=dict(shapes=((0,), (3, 0), (0, 3), (5,))),
    long=dict(shapes=((600_001,),)),
    many=dict(shapes=((3,),) * 300),
    masters=dict(master="fp32"),
    remainders=dict(master="remainder"),
    by_noise=dict(master="stochastic", shapes=((64, 33), (7,), (), (2051,))),
)
STATES = dict(
    bf16_states=dict(state_dtype=torch.bfloat16),
    bf16_states_and_masters=dict(state_dtype=torch.bfloat16, master="fp32"),
)


def _odd(make, more: dict) -> dict[str, Callable]:
    return {"mixed_shapes": make()} | {name: make(**options) for name, options in (ODD | more).items()}


ADAMW = _all(
    "adamw",
    **_odd(
        _adamw,
        STATES | dict(uncorrected=dict(correction=0), corrected_step=dict(correction=2), l2=dict(decoupled=False)),
    ),
)
LAMB = _all(
    "lamb",
    **_odd(
        _lamb,
        STATES
        | dict(
            uncorrected=dict(correction=0, ratio=(False, False, 0.0, INF, 0.0, INF)),
            corrected_step=dict(correction=2, ratio=(True, False, 0.0, INF, 0.01, 10.0)),
            l2=dict(decoupled=False),
            bounded_norm=dict(ratio=(True, False, 2.0, 3.0, 0.0, INF)),
            rms=dict(correction=2, ratio=(True, True, 0.0, INF, 1e-3, INF)),
            several_groups=dict(shapes=((1000, 1500), (40,), (1100, 1000), (30, 20))),
        ),
    ),
)
SGD = _all(
    "sgd",
    **_odd(
        _sgd,
        STATES | dict(plain=dict(momentum=0.0), nesterov=dict(nesterov=True, dampening=0.0), first=dict(first=True)),
    ),
)
ADAFACTOR = _all(
    "adafactor",
    **_odd(
        _adafactor,
        dict(
            first_step=dict(first=True),
            momentum=dict(momentum=0.9),
            bf16_momentum=dict(momentum=0.9, state_dtype=torch.bfloat16),
            bounded=dict(eps=(0.0, 1.2e-7), by_step=False),
            bound_binds=dict(eps=(0.0, 1.2e-7), tiny=2e-7),
            bound_and_dead_rows=dict(eps=(0.0, 1.2e-7), dead=True),
            dead_rows=dict(dead=True, first=True),
            given_step=dict(relative=False, lr=3e-3, scaled=False),
            warmup=dict(lr=INF, ramp=1e-6),
            offset=dict(offset=2.0),
            wide=dict(shapes=((5, 3001), (3, 2, 1100))),
            tall=dict(shapes=((3001, 5), (1025, 1))),
            several_groups=dict(shapes=((1000, 1500), (40,), (1100, 1000), (30, 20))),
        ),
    ),
)
OPTIMIZERS = ADAMW + LAMB + SGD + ADAFACTOR
