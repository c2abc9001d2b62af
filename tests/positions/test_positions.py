"""Every positional scheme, whatever it is: on a grid, on the meta device, in every dtype, and new ones."""

import inspect
from functools import partial

import pytest
import torch
from cases import POSITIONS, position

import fastlm
from fastlm import positions
from fastlm.positions import (
    SCHEMES,
    ALiBi,
    DeBERTa,
    Kerple,
    Position,
    RoPE,
    Shaw,
    Sinusoidal,
    T5Bias,
    TransformerXL,
    XLNet,
    alibi_slopes,
    deberta_bucket,
    t5_bucket,
)


def on_a_grid(q, k, v, scheme, causal):
    """Attention with everything that a scheme says of a distance laid out for each query and key: L×L tensors."""
    (H, Lq, D), Lk = q.shape[1:], k.shape[2]
    i, j = torch.arange(Lk - Lq, Lk)[:, None], torch.arange(Lk)
    distance, vectors = j - i, scheme.vectors((j - i).flatten())
    grid = lambda rows: rows.unflatten(1, distance.shape)
    each = lambda rows: grid(rows if vectors.buckets is None else rows[:, vectors.buckets])
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    angles = scheme.angles(j.double())
    if angles is not None:
        cos, sin = scheme.magnitude * angles.cos(), scheme.magnitude * angles.sin()
        q = fastlm.rotate(q, cos[Lk - Lq :], sin[Lk - Lq :], layout=scheme.layout)
        k = fastlm.rotate(k, cos, sin, layout=scheme.layout)
    content, positional = (q if b is None else q + b[:, None] for b in (vectors.content_bias, vectors.position_bias))
    score = content @ k.mT
    if vectors.query_vectors is not None:
        score = score + torch.einsum("bhid,hijd->bhij", positional, each(vectors.query_vectors))
    if vectors.key_vectors is not None:
        score = score + torch.einsum("bhjd,hijd->bhij", k, each(vectors.key_vectors))
    score = score / (vectors.terms * D) ** 0.5
    bias = scheme.bias(distance.flatten())
    score = score if bias is None else score + grid(bias)
    p = score.masked_fill(causal & (distance > 0), -torch.inf).softmax(-1)
    out = p @ v
    return (
        out if vectors.value_vectors is None else out + torch.einsum("bhij,hijd->bhid", p, each(vectors.value_vectors))
    )


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", POSITIONS)
def test_every_scheme_and_its_gradients_on_a_grid(name, causal, backend):
    scheme = position(name, 4, 8, causal)
    shapes = ((4, 20), (2, 33), (2, 33), (4, 20))  # heads and lengths of q, k, v and out
    q, k, v, grad = (
        torch.randn(2, h, L, 8, generator=torch.Generator().manual_seed(i)) for i, (h, L) in enumerate(shapes)
    )
    leaves = [x.requires_grad_() for x in (q, k, v, *scheme.parameters())]
    expected = on_a_grid(*leaves[:3], scheme, causal)
    got = fastlm.attention(*leaves[:3], position=scheme, causal=causal)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(out, leaves, grad, materialize_grads=True) for out in (got, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 * (1 + theirs.abs().max().item()))


@pytest.mark.parametrize("scheme", [ALiBi(12), Kerple(4)], ids=["alibi", "kerple"])
def test_a_model_cast_to_16_bits_keeps_its_distances(scheme):
    with torch.no_grad():
        for p in scheme.parameters():
            p.copy_(p.bfloat16())
    exact = scheme.terms(1024, 1024).table
    assert torch.equal(scheme.bfloat16().terms(1024, 1024).table, exact)


MAKERS = {name: partial(position, name, 4, 8, True) for name in POSITIONS}


MAKERS |= {
    "learned": partial(positions.Learned, 9, 32),
    "sinusoidal": partial(Sinusoidal, 32),
    "xlnet": partial(XLNet, 32, 4, 8),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_schemes_made_on_the_meta_device(make):
    """As FSDP2 has it: made on meta, emptied onto a device, then filled by reset_parameters or from a checkpoint."""
    exact = make()
    with torch.device("meta"):
        scheme = make()
        assert all(p.is_meta for p in scheme.parameters())
        if not scheme.embeds():
            assert all(x.is_meta for x in flat(scheme.terms(5, 9, device=torch.device("meta"))))
    scheme.to_empty(device="cpu")
    for p in scheme.parameters():
        torch.nn.init.constant_(p, torch.nan)
    for module in scheme.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(p.isfinite().all() and p.std() < 1 for p in scheme.parameters() if p.numel() > 4)
    scheme.load_state_dict(exact.state_dict())
    for mine, theirs in zip(flat(scheme.terms(5, 9)), flat(exact.terms(5, 9)), strict=True):
        assert torch.equal(mine, theirs)
    constants = [x.clone() for x in scheme.buffers()]
    assert all(
        torch.equal(x, y) for x, y in zip(scheme.to("meta").to_empty(device="cpu").buffers(), constants, strict=True)
    )


def flat(terms):
    return [
        x
        for x in torch.utils._pytree.tree_leaves((*terms[:2], terms.table, *terms.vectors))
        if isinstance(x, torch.Tensor)
    ]


LEARNED = [
    T5Bias,
    Shaw,
    TransformerXL,
    XLNet,
    partial(DeBERTa, span=16, buckets=8),
    partial(positions.Learned, context=64),
]


@pytest.mark.parametrize("scheme", LEARNED)
def test_what_is_learned_starts_small_and_biases_at_zero(scheme):
    facts = inspect.signature(scheme).parameters.keys() & {"dim", "heads", "head_dim"}
    for name, p in scheme(**{fact: {"dim": 32, "heads": 4, "head_dim": 8}[fact] for fact in facts}).named_parameters():
        assert not p.any() if name.endswith("bias") else 0.01 < p.std() < 0.03, name


def test_learned_slopes_start_as_alibis():
    scheme = ALiBi(6, learned=True)
    torch.nn.init.zeros_(scheme.slopes)
    scheme.reset_parameters()
    assert torch.equal(scheme.slopes, alibi_slopes(6)) and scheme.slopes.requires_grad
    buffer = ALiBi(6)
    buffer.reset_parameters()
    assert torch.equal(buffer.slopes, alibi_slopes(6))


@pytest.mark.parametrize("name", POSITIONS)
def test_fp64_schemes_pass_gradcheck(name):
    scheme = position(name, 2, 4, True).double()
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def attend(*leaves):
        return fastlm.attention(q, k, v, position=scheme.terms(5, 5, dtype=torch.float64), causal=True)

    with fastlm.use_backend("reference"):  # the one that takes fp64
        assert torch.autograd.gradcheck(attend, (q, k, v, *scheme.parameters()), fast_mode=True)


def test_terms_stand_where_the_scheme_does():
    meta, cpu = torch.device("meta"), torch.device("cpu")
    for scheme in (T5Bias(2), Shaw(2, 8), TransformerXL(16, 2, 8)):
        assert all(x.device == meta for x in flat(scheme.to(meta).terms(4, 4)))
    for scheme in (RoPE(8), ALiBi(2)):  # their constants stay behind
        assert all(x.device == cpu for x in flat(scheme.to(meta).terms(4, 4)))
        assert all(x.device == meta for x in flat(scheme.terms(4, 4, device=meta)))


def test_a_new_scheme_is_one_class():
    class Cliff(Position, name="cliff"):
        """Every key more than `reach` away costs the same."""

        def __init__(self, heads: int, reach: int = 4):
            super().__init__()
            self.drop, self.reach = torch.nn.Parameter(torch.ones(heads)), reach

        def bias(self, distance):
            return -self.drop[:, None] * (distance.abs() > self.reach)

    try:
        from fastlm.models import ModelConfig, Transformer

        model = Transformer(ModelConfig(position="cliff", dim=32, heads=2, layers=1, context=16))
        model(torch.zeros(1, 16, dtype=torch.long)).sum().backward()
        assert model.decoder.position.drop.grad is not None
    finally:
        del SCHEMES["cliff"]


def test_errors_name_the_cure():
    with pytest.raises(ValueError, match="position 'rpoe' is unknown; choose from alibi"):
        positions.make("rpoe", heads=1)
    with pytest.raises(ValueError, match="a scheme named 'rope' exists already"):

        class Other(Position, name="rope"):
            pass

    class Relative(RoPE):
        pass

    assert SCHEMES["rope"] is RoPE
    with pytest.raises(ValueError, match="head_dim 15"):
        RoPE(15)
    with pytest.raises(TypeError, match=r"asks for \['depth'\] without a default"):

        class Deep(Position, name="deep"):
            def __init__(self, depth):
                super().__init__()

    with pytest.raises(IndexError, match="129 positions, but the model learned 128"):
        positions.Learned(128, 4).embed(torch.arange(129))
    assert T5Bias(4).bias(torch.arange(-3, 1)).shape == (4, 4)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: T5Bias(2, max_distance=8),
            r"buckets is 32, of which 16 are exact, and max_distance 8; give buckets ≥ 2 and max_distance > ",
        ),
        (lambda: T5Bias(2, max_distance=12), "max_distance 12"),
        (lambda: T5Bias(2, max_distance=16), "max_distance 16"),
        (
            lambda: T5Bias(2, causal=False, max_distance=8),
            "of which 8 are exact, and max_distance 8; give buckets ≥ 4 and max_distance > buckets",
        ),
        (lambda: T5Bias(2, buckets=1), "buckets is 1, of which 0 are exact"),
        (lambda: T5Bias(2, causal=False, buckets=3), "buckets is 3, of which 0 are exact"),
        (lambda: t5_bucket(torch.arange(9), True, 32, 8), "buckets is 32, of which 16 are exact, and max_distance 8"),
        (
            lambda: deberta_bucket(torch.arange(9), 8, 5),
            r"buckets is 8, exact to 4, and span 5; give buckets ≥ 2 \(0 for none\) and span > ",
        ),
        (lambda: DeBERTa(32, 4, 8, span=5, buckets=8), "buckets is 8, exact to 4, and span 5"),
        (lambda: DeBERTa(32, 4, 8, buckets=-1), "buckets is -1"),
        (lambda: DeBERTa(32, 4, 8, buckets=1), "buckets is 1, exact to 0"),
        (lambda: DeBERTa(32, 4, 8, span=0), "span is 0; give the farthest distance told apart"),
        (
            lambda: TransformerXL(32, 4, 8, clamp=-3),
            "clamp is -3; give the farthest distance told apart, or 0 for no clamp",
        ),
        (lambda: TransformerXL(15, 2, 8), "dim must be even; got 15"),
        (lambda: XLNet(32, 4, 8, clamp=-1), "clamp is -1"),
        (lambda: Shaw(2, 8, reach=-1), "reach is -1; give the farthest distance with a vector of its own, ≥ 0"),
        (lambda: ALiBi(0), "heads is 0; give a whole number of at least 1"),
        (lambda: ALiBi(0, learned=True), "heads is 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
