"""Arguments for attention with terms chosen by name, and everything that comes of them."""

import torch
from tolerance import leaves_of, with_gradients

from fastlm.ops.attention import VECTORS, Arguments, attention


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(B=1, H=2, Hk=2, Lq=70, Lk=70, D=32, dtype=torch.float32, table=True, **given) -> Arguments:
    q, k, v = (
        draw(B, H, Lq, D, dtype=dtype),
        draw(B, Hk, Lk, D, dtype=dtype, seed=1),
        draw(B, Hk, Lk, D, dtype=dtype, seed=2),
    )
    return Arguments.of(q, k, v, table=draw(H, Lq + Lk - 1, seed=3) if table else None, **given)


def with_terms(args: Arguments, names: list[str]) -> Arguments:
    """args with the terms and masks of these names (TERMS) drawn as well."""
    (B, H, Lq, D), (Hk, Lk), dtype = args.q.shape, args.k.shape[1:3], args.q.dtype
    ints = lambda high, *shape, seed: torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))
    ids = lambda name, high: {f"{side}_{name}": ints(high, B, n, seed=n) for side, n in (("q", Lq), ("k", Lk))}
    vectors = lambda seed: draw(H, Lq + Lk - 1, D, dtype=dtype, seed=seed)
    drawn = {
        "prefix": lambda: dict(prefix=ints(Lk + 3, B, seed=5)),
        "segments": lambda: {name: x.sort(-1).values for name, x in ids("segments", 3).items()},
        "ranks": lambda: ids("ranks", Lk),
        "dropout": lambda: dict(dropout=0.3, seed=2**63 - 9),
        "softcap": lambda: dict(softcap=1.5),
        "bias": lambda: dict(bias=draw(B, H, Lq, Lk, dtype=dtype, seed=6)),
        "bias of the batch": lambda: dict(bias=draw(1, H, Lq, Lk, dtype=dtype, seed=6)),
        "bias of heads": lambda: dict(bias=draw(B, 1, Lq, Lk, seed=6)),
        "one bias": lambda: dict(bias=draw(1, 1, Lq, Lk, dtype=dtype, seed=6)),
        "bias of keys": lambda: dict(bias=draw(1, H, 1, Lk, seed=6)),
        "bias of queries": lambda: dict(bias=draw(B, 1, Lq, 1, seed=6)),
        "groups": lambda: dict(same=draw(B, H, Lq, seed=7), **ids("groups", 2)),
        "query vectors": lambda: dict(query_vectors=vectors(8)),
        "query vectors and positions": lambda: dict(
            query_vectors=vectors(8), q_position=draw(B, H, Lq, D, dtype=dtype, seed=9)
        ),
        "key vectors": lambda: dict(key_vectors=vectors(10)),
        "key vectors and positions": lambda: dict(
            key_vectors=vectors(10), k_position=draw(B, Hk, Lk, D, dtype=dtype, seed=11)
        ),
        "value vectors": lambda: dict(value_vectors=vectors(12)),
        "buckets": dict,
    }
    for name in names:
        args = args._replace(**drawn[name]())
    return in_buckets(args, torch.Generator().manual_seed(13)) if "buckets" in names else args


def in_buckets(a: Arguments, g: torch.Generator) -> Arguments:
    """The same with fewer vectors: each belongs to a run of distances, short near the middle, long far off."""
    given = {name: getattr(a, name) for name in VECTORS if getattr(a, name) is not None}
    if not given:
        return a
    Lq, n = a.q.shape[2], a.q.shape[2] + a.k.shape[2] - 1
    far = (torch.arange(n) - Lq).abs() > n // 8
    rises = torch.rand(n, generator=g) < torch.where(far, 0.03, 0.7)
    buckets = (rises.long().cumsum(0) - rises[0].long()).to(a.q.device)
    return a._replace(buckets=buckets, **{name: x[:, : buckets[-1] + 1] for name, x in given.items()})


MASKS = ["prefix", "segments", "ranks"]
TERMS = [
    *MASKS, "dropout", "softcap", "bias", "bias of the batch", "bias of heads", "one bias", "bias of keys",
    "bias of queries", "groups",
    "query vectors", "query vectors and positions", "key vectors", "key vectors and positions", "value vectors",
    "buckets",  # of all vectors, whatever the order of these names
]  # fmt: skip


def results(args: Arguments) -> dict[str, torch.Tensor]:
    leaves = leaves_of(args)
    out, lse = attention(args._replace(**leaves))
    return with_gradients(out, leaves, draw(*args.q.shape, dtype=args.q.dtype, seed=4)) | {"lse": lse.detach()}


MANY_TURNS = {  # several units of work for each key head, more than one tile of keys
    "bidirectional": dict(H=2, Hk=1, Lq=600, Lk=520),
    "causal": dict(H=2, Hk=2, Lq=700, Lk=700, right=0),
    "diagonal": dict(Lq=600, Lk=600, left=0, right=0),  # neighbouring units share no key
    "window": dict(Lq=600, Lk=600, left=70, right=3),
    "lengths": dict(B=2, H=2, Hk=1, Lq=530, Lk=400, key_lengths=torch.tensor([130, 400])),
    "wide": dict(H=2, Hk=1, Lq=300, Lk=200, D=256),
}
MANY_TERMS = {  # the same with terms that units share, whose sums are added to in turn as well
    "masks": (MASKS, dict(B=2, H=2, Hk=1, Lq=530, Lk=400, left=40, right=0)),
    "prefix of a window": (["prefix", "value vectors"], dict(B=2, Lq=600, Lk=600, left=20, right=3)),
    "dropout and biases": (["dropout", "bias of keys", "groups"], dict(B=2, H=2, Hk=1, Lq=530, Lk=400)),
    "bias of the batch": (["bias of the batch"], dict(B=3, H=2, Hk=1, Lq=530, Lk=400, right=0)),
    "bias of heads": (["bias of heads", "prefix"], dict(B=2, H=6, Hk=2, Lq=300, Lk=400)),
    "one bias": (
        ["one bias", "ranks"],
        dict(B=3, H=4, Hk=2, Lq=530, Lk=200, left=300, key_lengths=torch.tensor([200, 70, 0])),
    ),
    "vectors of a batch": (
        ["query vectors", "value vectors"],
        dict(B=3, H=1, Hk=1, Lq=600, Lk=600, D=16, left=100, right=100),
    ),
    "vectors of a ragged batch": (
        ["key vectors"],
        dict(B=4, H=2, Hk=1, Lq=300, Lk=500, D=16, right=0, key_lengths=torch.tensor([0, 500, 90, 300])),
    ),
    "vectors": (
        ["query vectors", "key vectors and positions", "value vectors"],
        dict(B=2, H=4, Hk=2, Lq=520, Lk=200, D=16, right=0),
    ),
    "vectors in buckets": (
        ["query vectors", "key vectors", "value vectors", "buckets"],
        dict(B=2, H=4, Hk=2, Lq=620, Lk=500, D=16, right=30),
    ),
    "softcap": (
        ["softcap", "bias of keys", "query vectors", "key vectors"],
        dict(B=2, H=2, Hk=1, Lq=530, Lk=400, D=16, right=0),
    ),
    "all": (
        ["prefix", "ranks", "dropout", "bias", "query vectors and positions", "key vectors", "value vectors"],
        dict(H=2, Hk=1, Lq=300, Lk=330, right=0),
    ),
}


def taken_in_turns(name: str, dtype: torch.dtype) -> Arguments:
    """What MANY_TURNS or MANY_TERMS has under this name."""
    if name in MANY_TURNS:
        return arguments(dtype=dtype, **MANY_TURNS[name])
    terms, sizes = MANY_TERMS[name]
    return with_terms(arguments(dtype=dtype, offset=sizes["Lk"] - sizes["Lq"], **sizes), terms)
