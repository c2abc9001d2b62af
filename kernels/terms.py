"""What attention adds to a tile of scores and to values, and what becomes of them: one place for all kernels.

A tile holds scores of BLOCK_M queries from i0 on with BLOCK_N keys from j0 on, either way up: queries × keys, or keys ×
queries (KEYS_FIRST) where a program owns keys. o_i and o_j are the places of queries and keys in it, the one a row, the
other a column. Meanings and shapes: fastlm/ops/attention.py.
"""

from typing import Annotated, Any, NamedTuple

import triton
import triton.language as tl

from fastlm.kernels.masks import of_row, visible
from fastlm.kernels.rows_by_distance import by_distance, distance_rows, relative_shift
from fastlm.kernels.tile import LOG2E, Rows, accumulate, dot, fma, load_readonly, places, tanh

# ---------------------------------------------------------------------------------------------------------------------
# What kernels are given

# Kinds of pointers, by how launch.py lays tensors out.
Vectors = Annotated[Any, "[H, Lq + Lk - 1, D] in q's dtype, without gaps"]
Integers = Annotated[Any, "int32 or int64, without gaps"]
Floats = Annotated[Any, "fp32, without gaps"]
Table = Annotated[Any, "[H, Lq + Lk - 1] fp32, rows Numbers.table_stride apart"]


class Bias(NamedTuple):
    """[1|B, 1|H, 1|Lq, 1|Lk] in memory: a pointer, strides, 0 where one element serves all, and constexprs that say
    whether queries, and whether keys, have elements of their own.
    """

    p: Any
    strides: Any
    by_query: Any
    by_key: Any


class TermPointers(NamedTuple):
    """Pointers to a call's terms and masks, None for those it does not have, which then cost nothing.

    q_bounds, k_bounds [B, 2, tiles]: the least and the largest segment in each tile of queries, of keys.
    """

    table: Table
    bias: Bias
    q_position: Rows
    query_vectors: Vectors
    k_position: Rows
    key_vectors: Vectors
    value_vectors: Vectors
    same: Floats
    q_groups: Integers
    k_groups: Integers
    key_lengths: Integers
    prefix: Integers
    q_segments: Integers
    k_segments: Integers
    q_ranks: Integers
    k_ranks: Integers
    q_bounds: Any
    k_bounds: Any


class Numbers(NamedTuple):
    """A call's numbers. table_stride: from head to head; softcap: None for none; threshold: of dropout
    (fastlm/backends/philox.py), None for none; q0, k0: where it counts queries and keys from; dropout_scale:
    1/(1 - dropout).

    Kernels take the fields one by one, in this order: in a tuple Triton would compile anew for numbers that are 1 or
    multiples of 16, for do_not_specialize goes by parameters' names (3.6 and 3.9, benchmarks/FACTS.md).
    """

    H: Any
    group: Any
    Lq: Any
    Lk: Any
    table_stride: Any
    left: Any
    right: Any
    offset: Any
    scale: Any
    softcap: Any
    seed: Any
    q0: Any
    k0: Any
    threshold: Any
    dropout_scale: Any


class Head(NamedTuple):
    """What a program works on: a row of the batch, a query head, and how many keys that row has.

    Where rows of a tile are queries of several heads (kernels/decoding.py), h and o_i [BLOCK_M, 1] are each one's head
    and place; else o_i is None.
    """

    b: Any
    h: Any
    n_keys: Any
    o_i: Any


# compiled kernels do not depend on these numbers, which change from call to call and from model to model
UNSPECIALIZED = ["H", "group", "Lq", "Lk", "table_stride", "left", "right", "offset", "seed", "q0", "k0", "threshold"]

# ---------------------------------------------------------------------------------------------------------------------
# Scores


@triton.jit
def table_at(t, h, first, o_i, o_j, n):
    """The table's score of each pair of a tile, given j0 - i0."""
    return load_readonly(t.table + (h * n.table_stride + (first + n.Lq - 1)) + (o_j - o_i))


@triton.jit
def bias_at(t, head, i0, j0, o_i, o_j, n, EDGE: tl.constexpr):
    """The bias of each pair of a tile. EDGE: past the ends the last one's, by limits, which keep wide loads away.

    One of a tile's queries, or keys, is loaded once for all, and not by a tl.load, whose buffer would be in shared
    memory.
    """
    i, j = i0 + o_i, j0 + o_j
    if EDGE:
        i, j = tl.minimum(i, n.Lq - 1), tl.minimum(j, n.Lk - 1)
    p_bias = t.bias.p + (head.b * t.bias.strides[0] + head.h * t.bias.strides[1])
    if t.bias.by_query:
        p_bias += i.to(tl.int64) * t.bias.strides[2]
    if t.bias.by_key:
        p_bias += j.to(tl.int64) * t.bias.strides[3]
    x = tl.load(p_bias) if t.bias.by_query and t.bias.by_key else load_readonly(p_bias)
    return tl.broadcast_to(x.to(tl.float32), (o_i + o_j).shape)


@triton.jit
def within_half(x):
    """x, no less than fp16's least number unless it is -inf. Where -1e9, or the least float, hides a whole row, the
    softmax of what it hides is asked for; in units of 1/scale it overflows, and its rounding outweighs the scores.
    """
    return tl.where(x == float("-inf"), x, tl.maximum(x, -65504.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def same_at(t, head, i0, j0, o_i, o_j, n):
    """same[i] for pairs of one group, 0 for the others."""
    return tl.where(same_group(t, head, i0, j0, o_i, o_j, n), of_row(t.same, head.b * n.H + head.h, i0, o_i, n.Lq), 0.0)


@triton.jit
def same_group(t, head, i0, j0, o_i, o_j, n):
    return of_row(t.q_groups, head.b, i0, o_i, n.Lq) == of_row(t.k_groups, head.b, j0, o_j, n.Lk)


@triton.jit
def product(a, b, related, added, n):
    """(cap(x) + added, cap'(x)) of x = scale · (a @ b + related), in the scores' unit (kernels/online_softmax.py)."""
    if n.softcap is not None:
        y = tanh(accumulate(related, dot(a, b)) * (n.scale / n.softcap))
        return y * n.softcap if added is None else fma(y, n.softcap, added), 1.0 - y * y
    elif a.dtype == tl.float32:
        x = accumulate(related, dot(a, b))
        return x * n.scale if added is None else fma(x, n.scale, added), 1.0
    else:
        # the product's first accumulator, so that no addition follows
        return dot(a, b, related if added is None else accumulate(related, added * (1.0 / n.scale))), 1.0


@triton.jit
def scores(
    q, k, q_position, k_position, t, head, i0, j0, n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EDGE: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Scores of a tile, -inf where invisible, and cap' there, for `under_cap`. q_position, k_position: what meets the
    rows by distance.

    EDGE: some pairs may be invisible, or not exist; those of queries that do not exist are whatever they are, for
    nobody reads them.
    """
    o_i, o_j = places(BLOCK_M, BLOCK_N, KEYS_FIRST)
    if head.o_i is not None:
        o_i = head.o_i
    # what is scaled with the product: queries and keys with the vectors of their distance
    related, added = None, None
    if t.query_vectors is not None:
        related = relative_shift(q_position, t.query_vectors, head, i0, j0, n, D, BLOCK_M, BLOCK_D, KEYS_FIRST, False)
    if t.key_vectors is not None:
        of_keys = relative_shift(k_position, t.key_vectors, head, i0, j0, n, D, BLOCK_M, BLOCK_D, KEYS_FIRST, True)
        related = accumulate(related, of_keys)
    # what is added to it
    if t.table is not None:
        added = table_at(t, head.h, j0 - i0, o_i, o_j, n)
    if t.bias is not None:
        bias = bias_at(t, head, i0, j0, o_i, o_j, n, EDGE or KEYS_FIRST)
        added = accumulate(added, bias if q.dtype == tl.float32 else within_half(bias))
    if t.same is not None:
        added = accumulate(added, same_at(t, head, i0, j0, o_i, o_j, n))
    # S = scale · QKᵀ + all that, masked where the tile may hold invisible pairs
    x, slope = product(k, q.T, related, added, n) if KEYS_FIRST else product(q, k.T, related, added, n)
    return tl.where(visible(t, head, i0, j0, o_i, o_j, n), x, float("-inf")) if EDGE else x, slope


@triton.jit
def under_cap(ds, slope, n):
    """dX = dS ∘ cap' of a tile: the gradient of what a softcap bounds."""
    return ds if n.softcap is None else ds * slope


# ---------------------------------------------------------------------------------------------------------------------
# Probabilities


@triton.jit
def units(dtype: tl.constexpr, n):
    """(score → unit of the running maximum and of lse, that unit → log₂); one is 1: kernels/online_softmax.py."""
    if dtype == tl.float32:
        return 1.0, LOG2E
    return (n.scale if n.softcap is None else 1.0) * LOG2E, 1.0


@triton.jit
def probabilities(x, lse, dtype: tl.constexpr, n):
    """P = exp(S - L) of scores x and the log-sum-exp in their dtype's unit (FlashAttention-2, algorithm 2, line 11)."""
    to_unit, to_log2 = units(dtype, n)
    return tl.exp2(fma(x, to_unit, -lse) * to_log2)


@triton.jit
def apply_dropout(p, head, i0, j0, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """p where dropout keeps it, else 0: word j mod 4 of counter (j div 4, i, b·H + h, 0); fastlm/backends/philox.py."""
    if n.threshold is None:
        return p
    else:
        # one counter for four keys of a query, whose four words are theirs in order
        row = (head.b * n.H + head.h).to(tl.int32)
        o_i = tl.arange(0, BLOCK_M)[:, None] if head.o_i is None else head.o_i
        i, block = n.q0 + i0 + o_i, (n.k0 + j0) // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
        i, block = tl.broadcast(i, block)
        w0, w1, w2, w3 = tl.philox(n.seed, block, i, tl.zeros_like(i) + row, tl.zeros_like(i))
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        keep = (words >= n.threshold.to(tl.uint32)).to(tl.int8)  # bytes, for they cross threads
        return tl.where((keep.T if KEYS_FIRST else keep) != 0, p, 0.0)


@triton.jit
def add_values(acc, p, v, t, head, i0, j0, n, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """acc [M, D] + Σ p (v + value_vectors) over a tile's keys, p [M, N] in v's dtype."""
    acc = dot(p, v, acc)
    if t.value_vectors is not None:
        p = by_distance(p, BLOCK_M, False, False)
        acc = dot(p, distance_rows(t.value_vectors, head, i0, j0, n, D, BLOCK_M, BLOCK_D), acc)
    return acc


@triton.jit
def probability_gradient(
    grad, v, t, head, i0, j0, n,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """dP of a tile: ⟨grad[i], v[j] + value_vectors[d]⟩, through dropout."""
    dp = dot(v, grad.T) if KEYS_FIRST else dot(grad, v.T)
    if t.value_vectors is not None:
        dp += relative_shift(grad, t.value_vectors, head, i0, j0, n, D, BLOCK_M, BLOCK_D, KEYS_FIRST, False)
    if n.threshold is None:
        return dp
    else:
        return apply_dropout(dp, head, i0, j0, n, BLOCK_M, BLOCK_N, KEYS_FIRST) * n.dropout_scale
