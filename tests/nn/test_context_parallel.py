"""A sequence that ranks hold parts of is attended to as in one process, whatever scheme, mask and division."""

import weakref

import pytest
import torch
import torch.distributed as dist
from cases import position
from sharded import on
from tolerance import CHANNELS, ORDERS, Yardstick, assert_accurate, max_and_rms, nth_order
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastlm
from fastlm.nn.arguments import arguments
from fastlm.nn.context_parallel import zigzag
from fastlm.ops.attention import attention, scores, values

B, H, HK, L, D = 2, 4, 2, 97, 16
LENGTHS = {2: (61, 36), 3: (20, 45, 32)}
# documents, over the ends of ranks
PACKED = fastlm.masks.segments_from_cu_seqlens(torch.tensor([0, 13, 50, 70, 90]), L).expand(B, -1)


def integers(high, *shape):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high))


def reals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CASES = {  # name → a scheme's name in cases.py or None, and attention's options for the whole sequence
    "plain": (None, {}),
    "causal": (None, dict(causal=True)),
    "window": (None, dict(window=(9, 30))),
    "narrow": (None, dict(causal=True, window=(7, 0))),
    "scale": (None, dict(scale=0.4)),
    **{name: (name, dict(causal=True)) for name in ("rope", "rope yarn", "rope partial", "alibi learned", "t5")},
    **{f"{name}, both ways": (name, {}) for name in ("t5", "kerple", "shaw near", "transformer-xl", "deberta v3")},
    "shaw": ("shaw", dict(causal=True, window=(40, 0))),
    "transformer-xl": ("transformer-xl", dict(causal=True)),
    "transformer-xl clamped": ("transformer-xl clamped", {}),
    "deberta": ("deberta", dict(key_lengths=torch.tensor([97, 40]))),
    "lengths": ("t5", dict(key_lengths=torch.tensor([70, 0]))),
    "prefix": ("alibi learned", dict(causal=True, prefix=torch.tensor([30, 80]))),
    "packed": ("alibi learned", dict(causal=True, segments=PACKED)),
    "packed, both ways": ("rope", dict(segments=integers(3, B, L).sort(-1).values)),
    "order and groups": (
        "transformer-xl",
        dict(order=(integers(L, B, L), integers(L - 1, B, L)), group_bias=(reals(B, H, L), *integers(2, 2, B, L))),
    ),
    "dropout": ("t5", dict(causal=True, dropout=0.3, seed=2**62 + 5)),
    "softcap": ("t5", dict(causal=True, softcap=0.8)),
    "every mask": (
        "kerple",
        dict(
            causal=True, window=(25, 0), prefix=torch.tensor([5, 40]), key_lengths=torch.tensor([90, 61]),
            segments=integers(3, B, L).sort(-1).values, order=(integers(L, B, L),) * 2, dropout=0.1, seed=7,
        ),
    ),
}  # fmt: skip


def contiguous(world):
    ends = [0, *torch.tensor(LENGTHS[world]).cumsum(0).tolist()]
    return [[(ends[i], ends[i + 1])] for i in range(world)]


def tokens(stretches):
    return torch.cat([torch.arange(begin, end) for begin, end in stretches])


def leaves_of(name, dtype, of=None):
    """q, k, v and what the case's scheme learns, of the tokens `of`, and the scheme."""
    scheme_name, options = CASES[name]
    scheme = None if scheme_name is None else position(scheme_name, H, D, bool(options.get("causal")))
    if isinstance(scheme, fastlm.positions.TransformerXL):  # of scores of tens lse loses digits
        scheme.project.weight.data /= 4
    scheme = scheme.double() if scheme is not None and dtype == torch.float64 else scheme
    of = torch.arange(L) if of is None else of
    x = [
        reals(B, heads, L, D, seed=seed)[:, :, of].to(dtype).requires_grad_() for seed, heads in enumerate((H, HK, HK))
    ]
    learned = {} if scheme is None else dict(scheme.named_parameters())
    return dict(zip("qkv", x, strict=True)) | learned, scheme


def results(leaves, out, lse, of=None):
    of = torch.arange(L) if of is None else of
    grads = reals(B, H, L, D, seed=3)[:, :, of].to(out.dtype), reals(B, H, L, seed=4)[:, :, of].to(lse.dtype)
    seen = lse > -torch.inf  # the rest of it has no gradient
    found = torch.autograd.grad((out, lse), list(leaves.values()), (grads[0], grads[1] * seen), allow_unused=True)
    made = zip(leaves.items(), found, strict=True)
    grads = {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in made}
    return {"out": out.detach(), **grads}


def in_one_process(name, dtype, how):
    leaves, scheme = leaves_of(name, dtype)
    a = arguments(*(leaves[x] for x in "qkv"), position=scheme, **CASES[name][1])
    return results(leaves, *how(a))


def eagerly(a):
    score = scores(a, a.q.dtype)
    return values(score.softmax(-1).nan_to_num(0.0), a), score.logsumexp(-1)


def by_reference(a):
    with fastlm.use_backend("reference"):
        return attention(a)


def in_order(how, i):
    """How a call is computed, its channels in the i-th order of tolerance.py, which every sum over them follows."""

    def compute(a):
        order = nth_order(i, D)
        given = {name: getattr(a, name) for name in CHANNELS}
        out, lse = how(a._replace(**{name: x[..., order] for name, x in given.items() if x is not None}))
        return out[..., order.argsort()], lse

    return compute


PLAIN = [in_order(how, i) for how in (eagerly, by_reference) for i in range(ORDERS)]


def options_of(options, of):
    """What is of tokens, of some of them."""
    picks = {"segments": lambda x: x[:, of], "order": lambda x: tuple(each[:, of] for each in x)}
    picks["group_bias"] = lambda x: (x[0][:, :, of], x[1][:, of], x[2][:, of])
    return {name: picks[name](x) if name in picks else x for name, x in options.items()}


def on_ranks(rank, name, dtype, stretches, given=True):
    of = tokens(stretches[rank])
    leaves, scheme = leaves_of(name, dtype, of)
    out, lse = fastlm.context_parallel_attention(
        *(leaves[x] for x in "qkv"), position=scheme, return_lse=True, stretches=stretches if given else None,
        **options_of(CASES[name][1], of),
    )  # fmt: skip
    return results(leaves, out, lse, of)


def whole(name, x, stretches):
    """A result of all ranks: side by side in their places, or, of what a scheme learns, added up in their order."""
    parts = [None] * len(stretches)
    dist.all_gather_object(parts, x)
    if name not in ("out", "q", "k", "v"):
        return sum(part.double() for part in parts).to(x.dtype)
    made = x.new_full((*x.shape[:2], L, D), torch.nan)
    for part, each in zip(parts, stretches, strict=True):
        made[:, :, tokens(each)] = part
    return made


def equals_one_process(rank, world, name, dtype, stretches, given):
    truth = in_one_process(name, torch.float64, attention.definition)
    plain = [in_one_process(name, dtype, how) for how in PLAIN]
    got = on_ranks(rank, name, dtype, stretches, given)
    for result, x in got.items():
        kind = result if result in ("out", "q", "k", "v") else "table"  # a long reduction
        errors = [max_and_rms(each[result], truth[result]) for each in plain]
        yardstick = Yardstick({kind: truth[result]}, {kind: tuple(map(max, zip(*errors, strict=True)))})
        assert_accurate(kind, whole(result, x, stretches), yardstick, ulps=4)  # of blocks' weights, exp of fp32


@on(2, 3)
@pytest.mark.parametrize("name", CASES)
def test_it_is_attention_of_the_whole_sequence(ranks, name):
    ranks.run(equals_one_process, name, torch.float32, contiguous(ranks.world), False)


FEW = ("rope", "alibi learned", "t5, both ways", "shaw", "transformer-xl", "packed", "order and groups", "dropout")


@on(2)
@pytest.mark.parametrize("name", FEW)
def test_in_16_bits(ranks, name):
    ranks.run(equals_one_process, name, torch.bfloat16, contiguous(2), False)


@on(2, 3)
@pytest.mark.parametrize("name", FEW)
def test_in_a_zigzag(ranks, name):
    ranks.run(equals_one_process, name, torch.float32, zigzag(L, ranks.world), True)


@on(3)
@pytest.mark.parametrize("name", FEW)
def test_a_rank_may_hold_nothing_or_stretches_of_any_length(ranks, name):
    stretches = [[(90, 97), (0, 1), (60, 90)], [(1, 1)], [(1, 60)]]
    ranks.run(equals_one_process, name, torch.float32, stretches, True)


def test_a_zigzag_gives_every_rank_the_same_to_do():
    """Under causal, of pairs of a query and a key, with as many tokens for each rank."""
    for world in (1, 2, 3, 5):
        stretches = zigzag(60 * world, world)
        assert [len(tokens(each)) for each in stretches] == [60] * world
        pairs = [int((tokens(each) + 1).sum()) for each in stretches]
        assert pairs == [60 * world * (60 * world + 1) // 2 // world] * world


def bits_repeat(rank, world):
    for name in FEW:
        stretches = zigzag(L, world)
        first, *others = (on_ranks(rank, name, torch.float32, stretches) for _ in range(3))
        for other in others:
            for result, x in other.items():
                assert torch.equal(x, first[result]), f"{name}: {result}"


@on(3)
def test_bits_repeat(ranks):
    ranks.run(bits_repeat)


def of_a_group(rank, world):
    group = dist.new_group([0, 2])  # every process makes it
    if rank == 1:
        return
    at = slice(0, 40) if rank == 0 else slice(40, L)
    q, k, v = (reals(B, heads, L, D, seed=seed).requires_grad_() for seed, heads in enumerate((H, HK, HK)))
    scheme = fastlm.positions.RoPE(D)
    expected = fastlm.attention(q, k, v, position=scheme, causal=True)
    dk = torch.autograd.grad(expected.sum(), k)[0]
    parts = [x.detach()[:, :, at].requires_grad_() for x in (q, k, v)]
    out = fastlm.context_parallel_attention(*parts, position=scheme, causal=True, group=group)
    torch.testing.assert_close(out, expected[:, :, at], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), parts[1])[0], dk[:, :, at], rtol=1e-5, atol=1e-5)


@on(3)
def test_of_a_group(ranks):
    ranks.run(of_a_group)


class Peak(TorchDispatchMode):
    """most: bytes of tensors that were made inside the `with` block and lived at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def freed(self, size):
        self.now -= size


def memory_is_of_blocks(rank, world):
    """A fourth rank of 64 tokens adds nothing ahead, and on the way back no more than that gradients of one block are
    on their way while others are made.
    """
    three = dist.new_group([0, 1, 2])
    for name in ("rope", "t5, both ways", "shaw", "transformer-xl", "deberta"):
        found = []
        for group in [three, None] if rank < 3 else [None]:
            q, k, v = (reals(B, heads, 64, D, seed=seed).requires_grad_() for seed, heads in enumerate((H, HK, HK)))
            scheme = position(CASES[name][0], H, D, False)
            with Peak() as peak:
                out = fastlm.context_parallel_attention(q, k, v, position=scheme, group=group)
                ahead = peak.most
                out.sum().backward()
            found.append((ahead, peak.most))
            del out
        block = 2 * k.nbytes
        assert found[-1][0] <= found[0][0] + 100 and found[-1][1] <= found[0][1] + block + 100, f"{name}: {found}"


@on(4)
def test_memory_is_that_of_blocks(ranks):
    ranks.run(memory_is_of_blocks)


def learns_what_is_no_parameter(rank, world):
    """A score_mod's own numbers, and whatever a parameter is made of beforehand."""
    slope = torch.tensor(0.3, requires_grad=True)
    scheme = fastlm.positions.from_score_mod(lambda score, b, h, i, j: score - slope * (i - j).abs(), H, L)
    q, k, v = (reals(B, heads, L, D, seed=seed) for seed, heads in enumerate((H, HK, HK)))
    expected = fastlm.attention(q, k, v, position=scheme)
    at = tokens(contiguous(world)[rank])
    out = fastlm.context_parallel_attention(*(x[:, :, at] for x in (q, k, v)), position=scheme)
    found = torch.autograd.grad(out.square().sum(), slope)[0]
    dist.all_reduce(found)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), slope)[0])


@on(2)
def test_what_a_scheme_learns_need_be_no_parameter(ranks):
    ranks.run(learns_what_is_no_parameter)


def draws_alike_both_ways(rank, world):
    """Vectors that a scheme drops while training are dropped on the way back as ahead; autocast is as it was."""
    scheme = fastlm.positions.TransformerXL(H * D, H, D, dropout=0.5)
    at = tokens(contiguous(world)[rank])
    q, k, v = (reals(1, heads, L, D, seed=seed)[:, :, at].requires_grad_() for seed, heads in enumerate((H, HK, HK)))
    weight, step = scheme.project.weight, 1e-3 * reals(H * D, H * D, seed=5)
    loss = lambda: fastlm.context_parallel_attention(q, k, v, position=scheme).double().square().sum()
    torch.manual_seed(rank)
    grad = torch.autograd.grad(loss(), weight)[0]
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step
            torch.manual_seed(rank)
            losses.append(loss())
            weight -= sign * step
    torch.testing.assert_close((grad.double() * step).sum(), (losses[0] - losses[1]) / 2, rtol=1e-2, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        out = fastlm.context_parallel_attention(q, k, v, position=scheme)
    assert out.dtype == torch.bfloat16 and torch.autograd.grad(out.float().sum(), weight)[0].dtype == torch.float32


@on(2)
def test_what_is_drawn_ahead_is_drawn_again_on_the_way_back(ranks):
    ranks.run(draws_alike_both_ways)


def refuses(rank, world):
    x = reals(1, 2, 8, D)
    attend = fastlm.context_parallel_attention
    scheme = fastlm.positions.RoPE(D)
    for error, message, given in (
        (ValueError, "takes no bias: an L×L tensor has no place on one rank", dict(bias=torch.zeros(1, 1, 8, 8))),
        (ValueError, "takes no offset: queries and keys are one sequence", dict(offset=3)),
        (ValueError, "terms are of one size, and blocks have others", dict(position=scheme.terms(8, 8))),
        (ValueError, "position is 'rope'; give a scheme", dict(position="rope")),
        (ValueError, "position 'sinusoidal' adds to token embeddings", dict(position=fastlm.positions.Sinusoidal(32))),
        (ValueError, "turns heads of 32 channels", dict(position=fastlm.positions.RoPE(32))),
        (TypeError, "attention takes no is_causal; give causal", dict(is_causal=True)),
        (ValueError, "stretches are of 1 ranks, and the group has 2", dict(stretches=[[(0, 16)]])),
        (ValueError, "where a stretch from 8 on is missing", dict(stretches=[[(0, 8)], [(9, 17)]])),
        (ValueError, rf"give rank {rank} 7 tokens, and its query has 8", dict(stretches=[[(0, 7)], [(7, 14)]])),
        (ValueError, r"segments of queries must be \[1, 8\] integers", dict(segments=torch.zeros(1, 16).long())),
    ):
        with pytest.raises(error, match=message):
            attend(x, x, x, **given)
    with pytest.raises(ValueError, match="query has 7 tokens and key 8; a rank holds both of the same tokens"):
        attend(x[:, :, 1:], x, x)
    with pytest.warns(UserWarning, match="made with causal=True"):
        attend(x, x, x, position=fastlm.positions.T5Bias(2))
    y = x.clone().requires_grad_()
    with pytest.raises(fastlm.BackendError, match="differentiable once; leave create_graph out"):
        torch.autograd.grad(attend(y, x, x).sum(), y, create_graph=True)


@on(2)
def test_it_refuses_in_words(ranks):
    ranks.run(refuses)
