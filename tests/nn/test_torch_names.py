"""What has torch's names and arguments: scaled_dot_product_attention and MultiheadAttention, beside torch's own."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlm
from fastlm.nn import MultiheadAttention
from fastlm.nn.functional import scaled_dot_product_attention
from fastlm.positions import ALiBi, T5Bias

# ---------------------------------------------------------------------------------------------------------------------
# scaled_dot_product_attention


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SHAPES = {  # of query, key, value
    "four dimensions": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "three": ((3, 5, 8), (3, 7, 8), (3, 7, 8)),
    "two": ((5, 8), (7, 8), (7, 8)),
    "five": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8)),
    "one row of keys": ((2, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8)),
    "one head of keys": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "one row of queries": ((1, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "narrow values": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "wide values": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 12)),
    "one query": ((2, 4, 1, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
}
PLAIN = SHAPES["four dimensions"]
BOOL = draw(2, 4, 5, 7, seed=9) > -0.5
MASKS = {
    "pairs": BOOL,
    "of all heads": BOOL[:, :1],
    "of all rows": BOOL[:1, :1],
    "two dimensions": BOOL[0, 0],
    "padding": torch.arange(7) < torch.tensor([7, 3])[:, None, None, None],
    "padding on the left": torch.arange(7) >= torch.tensor([0, 3])[:, None, None, None],
    "padding, expanded": (torch.arange(7) < torch.tensor([7, 3])[:, None, None, None]).expand(2, 4, 5, 7),
    "queries that see nothing": BOOL & (torch.arange(5) != 2)[:, None],
    "floats": draw(2, 4, 5, 7, seed=8),
    "floats of keys": draw(2, 1, 1, 7, seed=8),
    "floats of all rows": draw(4, 5, 7, seed=8),
    "padding by floats": torch.where(torch.arange(7) < torch.tensor([7, 3])[:, None, None, None], 0.0, -torch.inf),
}  # fmt: skip


def check(shapes, dtype=torch.float32, **options):
    """Output and gradients of query, key, value and a mask that wants one."""
    made = []
    for function in (F.scaled_dot_product_attention, scaled_dot_product_attention):
        leaves = [draw(*shape, seed=i).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]
        given = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        if torch.is_tensor(mask := given.get("attn_mask")) and mask.is_floating_point() and mask.isfinite().all():
            leaves.append(mask.to(dtype).requires_grad_())
            given["attn_mask"] = leaves[-1]
        out = function(*leaves[:3], **given)
        out.float().square().sum().backward()
        made.append([out.detach(), *(x.grad for x in leaves)])
    close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(made[1], made[0], **close)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.7}, {"dropout_p": 0.0}], ids=str)
def test_shapes_and_options(shapes, options):
    check(shapes, **options)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks(mask, dtype):
    check(PLAIN, dtype, attn_mask=mask.to(dtype) if mask.is_floating_point() else mask)


def test_masks_of_other_dimensions():
    check(SHAPES["three"], attn_mask=BOOL[0, :3])
    check(SHAPES["three"], attn_mask=BOOL[0, :1])
    check(SHAPES["two"], attn_mask=BOOL[0, 0])
    check(SHAPES["five"], attn_mask=BOOL[:, None, :, :])
    check(SHAPES["five"], attn_mask=BOOL[0])


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_grouped_heads(heads):
    check((PLAIN[0], (2, heads, 7, 8), (2, heads, 7, 8)), enable_gqa=True)
    check((PLAIN[0], (2, heads, 7, 8), (2, heads, 7, 8)), enable_gqa=True, attn_mask=BOOL)


def test_dropout_drops():
    q, k, v = (draw(*shape, seed=i) for i, shape in enumerate(((1, 2, 64, 8), (1, 2, 64, 8), (1, 2, 64, 8))))
    torch.manual_seed(0)
    first = scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(first, scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    torch.manual_seed(0)
    assert torch.equal(first, scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    many = torch.stack([scaled_dot_product_attention(q, k, v, dropout_p=0.5) for _ in range(200)]).mean(0)
    torch.testing.assert_close(many, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=0.25)


def test_padding_is_recognised(monkeypatch):
    seen = []
    monkeypatch.setattr(fastlm.nn.functional, "attention", lambda q, *_, **given: seen.append(given) or q)
    q = draw(2, 4, 5, 8)
    for name in ("padding", "padding, expanded", "padding by floats", "padding on the left", "pairs"):
        mask = MASKS[name][..., :5]
        scaled_dot_product_attention(q, q, q, attn_mask=mask)
    names = [{*given} - {"scale", "dropout"} for given in seen]
    assert names == [{"key_lengths"}] * 3 + [{"segments"}, {"bias"}]


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(attn_mask=torch.ones(5, 7).bool(), is_causal=True), "attn_mask is given and is_causal is True"),
        (dict(attn_mask=torch.ones(3, 5, 7).bool()), r"attn_mask \[3, 5, 7\] do not broadcast"),
        (dict(attn_mask=torch.ones(3, 2, 4, 5, 7).bool()), "do not broadcast"),
        (dict(is_causal=1), "is_causal is 1; give True or False"),
        (dict(dropout_p=1.5), "dropout is 1.5"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_does_not_fit(given, words):
    with pytest.raises(ValueError, match=words):
        scaled_dot_product_attention(*(draw(*shape) for shape in PLAIN), **given)


def test_heads_that_do_not_fit():
    q, k = draw(2, 4, 5, 8), draw(2, 2, 7, 8)
    with pytest.raises(ValueError, match="enable_gqa=True for other numbers"):
        scaled_dot_product_attention(q, k, k)
    with pytest.raises(ValueError, match="heads"):
        scaled_dot_product_attention(draw(2, 3, 5, 8), k, k, enable_gqa=True)


def test_samples_of_torchs_own_tests():
    """Every sample that PyTorch tests it with."""
    pytest.importorskip("expecttest", reason="torch.testing._internal imports expecttest: pip install expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    op = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
    count = 0
    for sample in op.sample_inputs("cpu", torch.float32):
        if sample.kwargs.get("dropout_p"):
            continue
        want = F.scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)
        got = scaled_dot_product_attention(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        count += 1
    assert count > 10


# ---------------------------------------------------------------------------------------------------------------------
# MultiheadAttention

E, H, LQ, LK, B = 16, 4, 5, 7, 3
MODULES = {
    "plain": {},
    "batch first": dict(batch_first=True),
    "no bias": dict(bias=False),
    "bias_k and bias_v": dict(add_bias_kv=True, batch_first=True),
    "zero attention": dict(add_zero_attn=True),
    "both": dict(add_bias_kv=True, add_zero_attn=True),
    "other widths": dict(kdim=6, vdim=10, batch_first=True),
    "other widths, no bias": dict(kdim=6, bias=False),
}
PADDED = torch.arange(LK) >= torch.tensor([7, 3, 5])[:, None]
PAIRS = draw(LQ, LK, seed=3) > 0.8
CALLS = {
    "nothing": {},
    "padding": dict(key_padding_mask=PADDED),
    "padding by floats": dict(key_padding_mask=torch.zeros(B, LK).masked_fill(PADDED, -torch.inf)),
    "floats for keys": dict(key_padding_mask=draw(B, LK, seed=4)),
    "pairs": dict(attn_mask=PAIRS),
    "pairs by floats": dict(attn_mask=draw(LQ, LK, seed=5)),
    "pairs of each head": dict(attn_mask=draw(B * H, LQ, LK, seed=6) > 0.8),
    "both": dict(attn_mask=PAIRS, key_padding_mask=PADDED),
    "both by floats": dict(attn_mask=draw(LQ, LK, seed=5), key_padding_mask=draw(B, LK, seed=4)),
    "a causal hint": dict(attn_mask=torch.ones(LQ, LK).bool().triu(1), is_causal=True),
    "a causal hint and padding": dict(attn_mask=torch.ones(LQ, LK).bool().triu(1), is_causal=True,
                                      key_padding_mask=PADDED),
}  # fmt: skip


def pair(**options) -> tuple[nn.Module, MultiheadAttention]:
    """torch's and ours, with the same weights."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
    ours = MultiheadAttention(E, H, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tensors(module, kind="cross"):
    of = lambda n, width, seed: draw(*((B, n) if module.batch_first else (n, B)), width, seed=seed).requires_grad_()
    if kind == "self":
        return (of(LK, E, 0),) * 3
    key = of(LK, module.kdim, 1)
    return of(LQ, E, 0), key, key if kind == "memory" else of(LK, module.vdim, 2)


def same(got: list, want: list) -> None:
    largest = max(x.abs().max().item() for x in want)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * largest)


def run(module, given, options):
    out, weights = module(*given, need_weights=False, **options)
    assert weights is None
    grads = torch.autograd.grad(out.square().sum(), [*{id(x): x for x in given}.values(), *module.parameters()])
    return [out.detach(), *grads]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_module(options, call):
    theirs, ours = pair(**options)
    if call.get("is_causal") and {*options} & {"add_bias_kv", "add_zero_attn"} and "key_padding_mask" not in call:
        call = call | dict(is_causal=False)  # torch's mask hides the keys that are added then
    same(*(run(m, tensors(theirs), call) for m in (ours, theirs)))


@pytest.mark.parametrize("kind", ["self", "memory", "cross"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_tensors_that_are_one(kind, batch_first):
    theirs, ours = pair(batch_first=batch_first)
    same(*(run(m, tensors(theirs, kind), {}) for m in (ours, theirs)))


def test_one_row():
    theirs, ours = pair(batch_first=True)
    q, k = draw(LQ, E), draw(LK, E, seed=1)
    for call in ({}, dict(key_padding_mask=PADDED[1]), dict(attn_mask=draw(H, LQ, LK, seed=2) > 0.8)):
        got, want = (m(q, k, k, need_weights=False, **call)[0] for m in (ours, theirs))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_weights_are_torchs_and_a_warning_says_so():
    theirs, ours = pair()
    given = tensors(theirs)
    for options in ({}, dict(need_weights=True, average_attn_weights=False)):
        with pytest.warns(UserWarning, match="need_weights is True, as it is unless it is given: torch computes"):
            got = ours(*given, **options)
        assert all(torch.equal(*both) for both in zip(got, theirs(*given, **options), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(*given, need_weights=False)


def test_a_position():
    ours = MultiheadAttention(E, H, batch_first=True, position="alibi")
    x = draw(B, LK, E)
    out, weights = ours(x, x, x)  # no weights then, unless they are asked for
    assert weights is None
    plain = nn.MultiheadAttention(E, H, batch_first=True)
    plain.load_state_dict({name: p for name, p in ours.state_dict().items() if not name.startswith("position")})
    bias = torch.stack([ALiBi(H).bias(torch.arange(LK) - i) for i in range(LK)], 1)
    want = plain(x, x, x, attn_mask=bias.repeat(B, 1, 1), need_weights=False)[0]
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="need_weights is True, and with a position"):
        ours(x, x, x, need_weights=True)
    for options, words in (
        (dict(position="sinusoidal"), "adds to token embeddings"),
        (dict(position=T5Bias(H), add_bias_kv=True), "stand at no distance"),
    ):
        with pytest.raises(ValueError, match=words):
            MultiheadAttention(E, H, **options)
    with pytest.raises(ValueError, match="attn_mask is None; give it too"):
        ours(x, x, x, is_causal=True)


@pytest.mark.parametrize("training", [True, False])
def test_in_torchs_encoder_layer(training):
    """Which has a fused function that sees no position."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    layer.self_attn = MultiheadAttention(E, H, batch_first=True, position=T5Bias(H, causal=False))
    with torch.no_grad():
        layer.self_attn.position.weight.normal_(std=3.0)
    layer.train(training)
    x = draw(B, LK, E)
    want = layer(x, src_key_padding_mask=PADDED)  # with gradients
    with torch.no_grad():
        torch.testing.assert_close(layer(x, src_key_padding_mask=PADDED), want)
        stack = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).train(training)
        torch.testing.assert_close(stack(x, src_key_padding_mask=PADDED), want)
        layer.self_attn.position.weight.zero_()
        assert not torch.allclose(layer(x, src_key_padding_mask=PADDED), want)


def test_nested_rows_are_refused_with_a_position():
    """As torch's encoder makes them, in evaluation, unless it is told not to when it is made."""
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, batch_first=True), 1).eval()
    x = draw(B, LK, E)
    with torch.no_grad():
        want = stack(x, src_key_padding_mask=PADDED)
        plain = MultiheadAttention(E, H, batch_first=True).eval()
        plain.load_state_dict(stack.layers[0].self_attn.state_dict())
        stack.layers[0].self_attn = plain
        torch.testing.assert_close(stack(x, src_key_padding_mask=PADDED), want)
        stack.layers[0].self_attn = MultiheadAttention(E, H, batch_first=True, position="alibi").eval()
        with pytest.raises(ValueError, match=r"query is nested, .* made with enable_nested_tensor=False"):
            stack(x, src_key_padding_mask=PADDED)


@pytest.mark.parametrize("norm_first", [True, False])
def test_swap_in_torchs_transformer(norm_first):
    torch.manual_seed(0)
    model = nn.Transformer(E, H, 2, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    source, target = draw(B, LK, E), draw(B, LQ, E, seed=1)
    masks = dict(
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(LQ), tgt_is_causal=True,
        src_key_padding_mask=PADDED, memory_key_padding_mask=PADDED,
    )  # fmt: skip
    cases = list(itertools.product([True, False], [True, False]))

    def made() -> list:
        outs = []
        for training, gradients in cases:
            model.train(training)
            with torch.set_grad_enabled(gradients):
                outs.append(model(source, target, **masks).detach())
        model.zero_grad()
        model.train()(source, target, **masks).square().sum().backward()
        return outs + [p.grad.clone() for p in model.parameters()]

    want, state = made(), copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fastlm.swap(model)
        assert len(report.swapped) == 6 and not report.kept
    torch.testing.assert_close(made(), want, rtol=1e-3, atol=1e-4)
    fastlm.unswap(model)
    assert all(torch.equal(*both) for both in zip(made(), want, strict=True))
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
