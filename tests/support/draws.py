"""Arguments of attention drawn by hypothesis: sizes, strides, grouped heads, terms and masks in any combination.

`@given(arguments())` is all that a backend's test needs; one that does not serve everything rejects what it refuses by
`assume`.
"""

from itertools import cycle
from types import SimpleNamespace

import torch
from chosen import in_buckets
from hypothesis import strategies as st
from torch import Tensor

from fastlm.masks import UNBOUNDED
from fastlm.ops.attention import Arguments


def _transposed(x: Tensor) -> Tensor:
    last = (-3, -2) if x.ndim > 2 else (0, -1)
    return x.transpose(*last).contiguous().transpose(*last)


def _apart(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, 99)), -1)[..., 0]


def _inside(x: Tensor) -> Tensor:
    larger = x.new_full([n + 3 for n in x.shape], 99)
    inner = larger[tuple(slice(1, n + 1) for n in x.shape)]
    return inner.copy_(x)


LAYOUTS = {  # the same values in other places, or fewer values in their place
    "dense": lambda x: x,
    "transposed": _transposed,
    "apart": _apart,
    "inside": _inside,
    "expanded": lambda x: x[:1].expand(x.shape),
    "one channel": lambda x: x[..., :1].expand(x.shape),
}
TERMS = {
    "table": lambda m: dict(table=m.real(m.H, m.n, dtype=torch.float32)),
    "bias": lambda m: dict(
        bias=m.real(*(n if full else 1 for n, full in zip((m.B, m.H, m.Lq, m.Lk), m.bias, strict=True)))
    ),
    "groups": lambda m: dict(
        same=m.real(m.B, m.H, m.Lq, dtype=torch.float32), q_groups=m.ints(2, m.B, m.Lq), k_groups=m.ints(2, m.B, m.Lk)
    ),
    "query vectors": lambda m: dict(query_vectors=m.real(m.H, m.n, m.D)),
    "query positions": lambda m: dict(query_vectors=m.real(m.H, m.n, m.D), q_position=m.real(m.B, m.H, m.Lq, m.D)),
    "key vectors": lambda m: dict(key_vectors=m.real(m.H, m.n, m.D)),
    "key positions": lambda m: dict(key_vectors=m.real(m.H, m.n, m.D), k_position=m.real(m.B, m.Hk, m.Lk, m.D)),
    "value vectors": lambda m: dict(value_vectors=m.real(m.H, m.n, m.D)),
    "dropout": lambda m: dict(dropout=0.3, seed=2**62 + m.Lq),
    "softcap": lambda m: dict(softcap=1.5),
    "key lengths": lambda m: dict(key_lengths=m.ints(m.Lk + 3, m.B)),
    "prefix": lambda m: dict(prefix=m.ints(m.Lk + 3, m.B)),
    "segments": lambda m: dict(q_segments=m.ints(3, m.B, m.Lq), k_segments=m.ints(3, m.B, m.Lk)),
    "ranks": lambda m: dict(q_ranks=m.ints(m.Lk, m.B, m.Lq), k_ranks=m.ints(m.Lk, m.B, m.Lk)),
}


def attention_arguments(
    dtype, B, heads, Lq, Lk, D, terms, bias, buckets, layouts, int_dtype, left, right, offset, scale, device
) -> Arguments:
    """heads: (H, Hk). terms: names in TERMS. bias: which of its sides are full. buckets: whether distances share
    vectors. layouts: names in LAYOUTS, dealt out in turn.
    """
    g, layout = torch.Generator().manual_seed(1000 * Lq + Lk), cycle(layouts)
    real = lambda *shape, dtype=dtype: LAYOUTS[next(layout)](torch.randn(shape, generator=g).to(device, dtype))
    ints = lambda high, *shape: LAYOUTS[next(layout)](
        torch.randint(high, shape, generator=g, dtype=int_dtype).to(device)
    )
    m = SimpleNamespace(B=B, H=heads[0], Hk=heads[1], Lq=Lq, Lk=Lk, D=D, n=Lq + Lk - 1, bias=bias, real=real, ints=ints)
    made = dict(q=real(B, m.H, Lq, D), k=real(B, m.Hk, Lk, D), v=real(B, m.Hk, Lk, D))
    for name in terms:
        made |= TERMS[name](m)
    a = Arguments.of(**made, left=left, right=right, offset=offset, scale=scale)
    return in_buckets(a, g) if buckets else a


def arguments(
    longest: int = 40,
    widest: int = 33,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    device: str | torch.device = "cpu",
) -> st.SearchStrategy[Arguments]:
    """At most `longest` queries and keys and `widest` channels, of one of `dtypes`."""
    bound = st.just(UNBOUNDED) | st.integers(0, longest)
    return st.builds(
        attention_arguments,
        dtype=st.sampled_from(dtypes),
        B=st.integers(1, 2),
        heads=st.sampled_from([(2, 1), (1, 1), (2, 2)]),
        Lq=st.integers(1, longest),
        Lk=st.integers(1, longest),
        D=st.integers(1, widest),
        terms=st.lists(st.sampled_from(sorted(TERMS)), max_size=5, unique=True),
        bias=st.tuples(*[st.booleans()] * 4),
        buckets=st.booleans(),
        layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=1, max_size=5),
        int_dtype=st.sampled_from([torch.int64, torch.int32]),
        left=bound,
        right=bound,
        offset=st.integers(-longest // 2, longest // 2),
        scale=st.sampled_from([0.25, 1.0]),
        device=st.just(device),
    )
