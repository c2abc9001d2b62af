"""Attention by blocks of queries and keys, of which ranks hold stretches: ahead, and on the way back.

For queries that begin at a and keys that begin at b, what masks and schemes count by distance is what it is in one
process when the call's offset is a - b, and

    out_b, lse_b = attention(q, k_b, v_b)      lse = log Σ_b exp(lse_b)      out = Σ_b exp(lse_b - lse) · out_b

On the way back p = exp(score - lse) and δ = ⟨grad, out⟩ - grad_lse are those of all keys. A block then gives parts of
dq, of what its scheme learns, and of dk_b and dv_b, which go to the rank that these belong to. What a scheme adds is
made for each block, ahead and again on the way back, and so never for a whole sequence.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.backends.dispatch import BackendError
from fastlm.nn import checks
from fastlm.nn.arguments import by_distance, terms_of
from fastlm.nn.exchange import Exchange, Tensors
from fastlm.ops.attention import LEARNED, Arguments, attention, attention_backward
from fastlm.positions import Position

OF_QUERIES = ("q_segments", "q_ranks", "q_groups")
OF_KEYS = ("k_segments", "k_ranks", "k_groups")  # which come with keys


class Span(NamedTuple):
    """A stretch of the sequence, begin … end - 1, and where it stands in its rank's tensors."""

    begin: int
    end: int
    at: slice


class Call(NamedTuple):
    """A call on this rank.

    Args:
        own: the arguments with this rank's masks, and the sequence's band, lengths and prefix.
        scale: as the caller gave it.
        position: the scheme, by which queries and keys are turned already.
        spans: every rank's stretches.
        exchange: with the other ranks.
    """

    own: Arguments
    scale: float | None
    position: Position | None
    spans: list[list[Span]]
    exchange: Exchange

    def turns(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensors | None]]:
        """Each rank whose turn it is, with its k, v and what comes with them; None where queries here see none."""
        numbers = (getattr(self.own, name) for name in OF_KEYS)
        lengths = [sum(span.end - span.begin for span in spans) for spans in self.spans]
        return self.exchange.turns((k, v, *(x for x in numbers if x is not None)), lengths)

    def pairs(self, rank: int) -> list[tuple[Span, Span]]:
        """Stretches of this rank's queries and of that one's keys."""
        return pairs(self.own, self.spans[self.exchange.rank], self.spans[rank])

    def block(self, queries: Span, keys: Span, x: Tensors, numbers: Tensors) -> Arguments:
        """The ordinary call of one stretch and another. x: q, k, v of these, and same if there is one. numbers: those
        that came with all of these keys' rank's.
        """
        (q, k, v, *same), a, numbers = x, self.own, iter(numbers)
        offset = queries.begin - keys.begin
        terms = terms_of(self.position if acts_by_distance(self.position) else None, q.shape[2], k.shape[2], offset, q)
        checks.terms(terms, q.shape[1], q.shape[3], (q.shape[2], k.shape[2], offset))
        given = lambda names: ((name, x) for name in names if (x := getattr(a, name)) is not None)
        masks = {name: x[:, queries.at] for name, x in given(OF_QUERIES)}
        masks |= {name: next(numbers)[:, keys.at] for name, _ in given(OF_KEYS)}
        masks |= {name: (x.long() - keys.begin).clamp(min=0) for name, x in given(("key_lengths", "prefix"))}
        return a._replace(
            k=k, v=v, same=same[0] if same else None, offset=offset, first_query=queries.begin, first_key=keys.begin,
            return_lse=True, **masks, **by_distance(q, terms, self.scale),
        )  # fmt: skip


def pairs(a: Arguments, of_queries: list[Span], of_keys: list[Span]) -> list[tuple[Span, Span]]:
    """The stretches of which some query sees some key, by the band; where a prefix ends is not looked up."""
    found = ((q, k) for q in of_queries for k in of_keys if q.begin < q.end and k.begin < k.end)
    sees = lambda q, k: -a.left <= k.end - 1 - q.begin and k.begin - (q.end - 1) <= a.right
    return [(q, k) for q, k in found if a.prefix is not None or sees(q, k)]


class Blocks(torch.autograd.Function):
    """(call, q, k, v, same, *learned) → out and lse, by turns. learned: `learned_by` the call's position."""

    @staticmethod
    def forward(ctx, call: Call, q: Tensor, k: Tensor, v: Tensor, same: Tensor | None, *learned: Tensor):
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = q.new_zeros(q.shape, dtype=wide), q.new_full(q.shape[:3], -torch.inf, dtype=wide)
        ctx.call, ctx.surroundings = call, Surroundings(q.device)
        for rank, block in call.turns(k, v):
            for queries, keys in call.pairs(rank):
                x = _of_pair(queries, keys, q, *block[:2], same)
                part = attention(call.block(queries, keys, x, block[2:]))
                _merge(out[:, :, queries.at], lse[:, :, queries.at], *part)
            block = x = None  # the next one's memory may be theirs
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, same, out, lse, *learned)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad: Tensor | None, grad_lse: Tensor | None):
        if torch.is_grad_enabled():
            raise BackendError("attention over several ranks is differentiable once; leave create_graph out")
        q, k, v, same, out, lse, *learned = ctx.saved_tensors
        call, results = ctx.call, (torch.zeros_like(out) if grad is None else grad, grad_lse, out, lse)
        sums, coming = _Sums(q, k, v, same, learned, lse.dtype), None
        with ctx.surroundings.again():
            for step, (rank, block) in enumerate(call.turns(k, v)):
                of_keys = None if block is None else sums.zeros(*block[:2])
                for queries, keys in call.pairs(rank):
                    x = _of_pair(queries, keys, q, *block[:2], same)
                    found = _gradients(call, queries, keys, x, block[2:], learned, results)
                    sums.add(queries, keys, of_keys, found)
                if coming is not None:
                    sums.add_keys(coming.arrived())
                if step == 0:
                    sums.add_keys(of_keys)
                else:
                    of_keys = of_keys and tuple(total.to(x.dtype) for total, x in zip(of_keys, (k, v), strict=True))
                    coming = call.exchange.give_back(step, of_keys, (k, v))
                block = x = of_keys = None
        if coming is not None:
            sums.add_keys(coming.arrived())
        return None, *sums.in_dtypes()


class _Sums:
    """Gradients as they add up, in fp32 or fp64: of q, k, v, same and what is learned, None where nothing came."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, same: Tensor | None, learned: list[Tensor], wide: torch.dtype):
        self.wide, self.like = wide, (q, k, v, same, *learned)
        self.q, self.k, self.v = self.zeros(q, k, v)
        self.same = None if same is None else self.zeros(same)[0]
        self.learned = [None] * len(learned)

    def zeros(self, *like: Tensor) -> Tensors:
        return tuple(torch.zeros(x.shape, dtype=self.wide, device=x.device) for x in like)

    def add(self, queries: Span, keys: Span, of_keys: Tensors, found: list[Tensor | None]) -> None:
        """A pair's gradients, in the order of `like`; of_keys: the sums of the keys' rank."""
        totals = [self.q[:, :, queries.at], *(total[:, :, keys.at] for total in of_keys)]
        totals += [] if self.same is None else [self.same[:, :, queries.at]]
        for total, x in zip(totals, found, strict=False):
            total += x
        for i, x in enumerate(found[len(totals) :]):
            if x is not None:
                self.learned[i] = x.to(self.wide, copy=True) if self.learned[i] is None else self.learned[i].add_(x)

    def add_keys(self, of_keys: Tensors | None) -> None:
        """Of this rank's keys and values, from one rank."""
        for total, x in zip((self.k, self.v), of_keys or (), strict=False):
            total += x

    def in_dtypes(self) -> list[Tensor | None]:
        made = (self.q, self.k, self.v, self.same, *self.learned)
        return [None if x is None else x.to(like.dtype) for x, like in zip(made, self.like, strict=True)]


def _gradients(
    call: Call, queries: Span, keys: Span, x: Tensors, numbers: Tensors, learned: list[Tensor], results: tuple
) -> list[Tensor | None]:
    """Of x (q, k, v, and same if there is one) and what is learned, in one block. results: grad, grad_lse, out, lse."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in x]
        a = call.block(queries, keys, leaves, numbers)
    wanted = {name: t for name in LEARNED if (t := getattr(a, name)) is not None and t.requires_grad}
    rows = (None if t is None else t[:, :, queries.at].contiguous() for t in results)
    made = attention_backward(*rows, a, [name in wanted for name in LEARNED])
    made = [x for name, x in zip(LEARNED, made, strict=True) if name in wanted]
    return torch.autograd.grad(tuple(wanted.values()), [*leaves, *learned], made, allow_unused=True)


def _of_pair(queries: Span, keys: Span, q: Tensor, k: Tensor, v: Tensor, same: Tensor | None) -> Tensors:
    """q, k, v, and same if there is one, of two stretches."""
    return (
        q[:, :, queries.at], k[:, :, keys.at], v[:, :, keys.at], *(() if same is None else (same[:, :, queries.at],))
    )  # fmt: skip


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """out and lse of some keys become those of part's keys too."""
    both = torch.logaddexp(lse, part_lse)
    share = lambda x: (x - both).masked_fill(both == -torch.inf, 0.0).exp()[..., None]
    out.mul_(share(lse)).add_(share(part_lse) * part)
    lse.copy_(both)


class Surroundings:
    """What a computation depends on besides its arguments: autocast, and torch's generators."""

    def __init__(self, device: torch.device):
        self.device, kind = device, device.type
        self.autocast = dict(enabled=torch.is_autocast_enabled(kind), dtype=torch.get_autocast_dtype(kind))
        self.states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if kind == "cuda" else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside the `with` block they are what they were; afterwards generators go on from where they are now."""
        of_host, of_device = self.states
        with (
            torch.random.fork_rng([] if of_device is None else [self.device]),
            torch.autocast(self.device.type, **self.autocast),
        ):
            torch.set_rng_state(of_host)
            if of_device is not None:
                torch.cuda.set_rng_state(of_device, self.device)
            yield


# ---------------------------------------------------------------------------------------------------------------------
# Schemes


def acts_by_distance(position: Position | None) -> bool:
    """Whether a scheme does more than to turn queries and keys."""
    methods = ("bias", "vectors")
    return position is not None and any(getattr(type(position), m) is not getattr(Position, m) for m in methods)


def learned_by(position: Position | None, query: Tensor) -> list[Tensor]:
    """What has a gradient of what a scheme adds by distance: its parameters, and other leaves that it computes with."""
    if not acts_by_distance(position):
        return []
    terms = terms_of(position, 2, 2, 0, query)  # a query ahead, at and behind a key
    made = [x for x in (terms.table, *terms.vectors) if isinstance(x, Tensor) and x.requires_grad]
    found = {id(p): p for p in position.parameters() if p.requires_grad}
    found |= {id(x): x for x in made if x.is_leaf}
    nodes = [x.grad_fn for x in made if not x.is_leaf]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            found[id(leaf)] = leaf
        more = {other for other, _ in node.next_functions if other is not None} - seen
        nodes += more
        seen |= more
    return list(found.values())
