"""Transformer-XL over segments with memory: against its equations in fp64, and against transformers' own, which version
5 has no longer: FASTLM_TRANSFORMERS_4 names a folder that 4.57.6 is installed in (pip install --target).
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from parity import spread

from fastlm.models import ModelConfig, Remembering, Transformer
from fastlm.models.presets import preset
from fastlm.positions import SCHEMES

L = 9
SHAPE = dict(vocab_size=61, dim=24, layers=3, heads=4, hidden=40, dropout=0.0, final_dropout=0.0)
CASES = {
    "memory of 6": dict(memory=6),
    "untied, clamped": dict(memory=16, position_options={"untie": True, "clamp": 5}),
    "same length, heads of 5": dict(memory=7, windows=(6,), heads=3, head_dim=5),
    "pre-norm": dict(memory=12, norm_place="pre", final_norm=False, norm_eps=1e-3),
}


def make(options):
    torch.manual_seed(0)
    model = Transformer(preset("transformer-xl", **SHAPE | dict(position_options={}) | options)).eval()
    spread(model)
    return model


def text(segments=3):
    drawn = torch.Generator().manual_seed(1)
    draw = lambda: torch.randint(61, (segments, 2, L), generator=drawn)
    return draw(), draw()


def formula(model: Transformer, tokens: torch.Tensor, mems: list[torch.Tensor], hidden: torch.Tensor | None = None):
    """Dai et al. 2019, sec. 3.3, term by term: logits and the inputs of the layers. hidden: [L, M + L] bool, other keys
    than later ones and those out of the window.
    """
    c, inputs, L = model.config, [], tokens.shape[1]
    h = model.embedding.weight[tokens] * c.dim**0.5
    heads = lambda x: x.unflatten(-1, (c.heads, -1)).transpose(1, 2)
    M = mems[0].shape[1] if mems else 0
    back = M + torch.arange(L)[:, None] - torch.arange(M + L)
    reach = c.position_options.get("clamp") or M + L
    angles = back.clamp(-reach, reach)[..., None] / 10000 ** (torch.arange(0, c.dim, 2, dtype=h.dtype) / c.dim)
    r = torch.cat((angles.sin(), angles.cos()), -1)  # [L, M + L, dim]
    if hidden is None:
        hidden = (back < 0) | (back > (c.windows[0] if c.windows else M + L))
    for i, block in enumerate(model.decoder.blocks):
        inputs.append(h)
        mlp_in, whole = None, torch.cat((mems[i].detach(), h), 1) if mems else h
        pre = c.norm_place == "pre"
        q, k, v = block.attention.qkv(block.attention_norm(whole) if pre else whole).chunk(3, -1)
        q, k, v = heads(q[:, M:]), heads(k), heads(v)
        scheme = block.attention.position
        biases = scheme if scheme.content_bias is not None else model.decoder.position
        u, w = biases.content_bias[:, None], biases.position_bias[:, None]
        places = scheme.project(r).unflatten(-1, (c.heads, -1))
        score = torch.einsum("bhid,bhjd->bhij", q + u, k) + torch.einsum("bhid,ijhd->bhij", q + w, places)
        p = (score * c.head_width**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        attended = h + block.attention.out((p @ v).transpose(1, 2).flatten(2))
        attended = attended if pre else block.attention_norm(attended)
        mlp_in = block.mlp_norm(attended) if pre else attended
        h = attended + block.mlp.out(block.mlp.inner(mlp_in).relu())
        h = h if pre else block.mlp_norm(h)
    return h @ model.embedding.weight.T + model.head.bias, inputs


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_segments_match_the_equations(options):
    model, exact = make(options), make(options).double()
    recurrence, mems = model.new_recurrence(), []
    for tokens, targets in zip(*text(), strict=True):
        logits = model(tokens, recurrence=recurrence)
        expected, inputs = formula(exact, tokens, mems)
        whole = [torch.cat((old, new), 1) for old, new in zip(mems, inputs, strict=True)] if mems else inputs
        mems = [x[:, -model.config.memory :] for x in whole]
        torch.testing.assert_close(logits, expected.float(), rtol=1e-5, atol=1e-5)
        for mine, yours in zip(recurrence.states, mems, strict=True):
            torch.testing.assert_close(mine, yours.float(), rtol=1e-5, atol=1e-5)
            assert not mine.requires_grad
        for made in (logits, expected):
            F.cross_entropy(made.flatten(0, 1), targets.flatten()).backward()
    for (name, mine), yours in zip(model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, yours.grad.float(), rtol=1e-4, atol=1e-4, msg=name)


THEIRS = """
import sys, torch
sys.modules["kernels"] = None  # that package wants transformers 5
as_other = torch.Tensor.type_as  # which they call with dtype= alone
torch.Tensor.type_as = lambda x, other=None, dtype=None: x.to(dtype) if other is None else as_other(x, other)
from transformers.models.deprecated.transfo_xl.configuration_transfo_xl import TransfoXLConfig
from transformers.models.deprecated.transfo_xl.modeling_transfo_xl import TransfoXLLMHeadModel
for folder in sys.argv[1:]:
    given = torch.load(f"{folder}/given")
    model = TransfoXLLMHeadModel(TransfoXLConfig(**given["config"])).eval()
    missing = model.load_state_dict(given["state"], strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= set(given["computed"]), missing
    mems, made = [torch.zeros(0, 2, model.config.d_model)] * model.config.n_layer, []
    for tokens, targets in zip(*given["text"]):
        out = model(tokens, mems=mems)
        mems = out.mems
        torch.nn.functional.nll_loss(out.logits.flatten(0, 1), targets.flatten()).backward()
        made.append((out.logits.detach(), [x.transpose(0, 1) for x in mems]))
    torch.save(dict(made=made, grads={n: p.grad for n, p in model.named_parameters()}), f"{folder}/made")
"""


def names(c: ModelConfig) -> dict[str, str]:
    """Their tensors' names → ours."""
    made = {"transformer.word_emb.emb_layers.0.weight": "embedding.weight", "crit.out_layers.0.bias": "head.bias"}
    layer = {
        "dec_attn.qkv_net": "attention.qkv", "dec_attn.o_net": "attention.out", "dec_attn.layer_norm": "attention_norm",
        "dec_attn.r_net": "attention.position.project", "pos_ff.CoreNet.0": "mlp.inner", "pos_ff.CoreNet.3": "mlp.out",
        "pos_ff.layer_norm": "mlp_norm",
    }  # fmt: skip
    biases = {"r_w_bias": "content_bias", "r_r_bias": "position_bias"}
    untied = c.position_options.get("untie", False)
    if not untied:
        made |= {f"transformer.{theirs}": f"decoder.position.{ours}" for theirs, ours in biases.items()}
    for i in range(c.layers):
        theirs, ours = f"transformer.layers.{i}", f"decoder.blocks.{i}"
        for a, b in layer.items():
            made |= {f"{theirs}.{a}.{kind}": f"{ours}.{b}.{kind}" for kind in ("weight", "bias")}
        if untied:
            made |= {f"{theirs}.dec_attn.{a}": f"{ours}.attention.position.{b}" for a, b in biases.items()}
    return made


def known(c: ModelConfig, state: dict) -> dict[str, str]:
    """`names` of what is in our state dict: all of it but the head's matrix, which is the embedding's."""
    found = {theirs: ours for theirs, ours in names(c).items() if ours in state}
    assert set(found.values()) == set(state) - {"head.weight"}
    return found


def given(options: dict) -> dict:
    """What THEIRS makes the same model of."""
    model = make(options)
    c, state = model.config, model.state_dict()
    return dict(
        config=dict(
            vocab_size=c.vocab_size, cutoffs=[], d_model=c.dim, d_embed=c.dim, n_head=c.heads, d_head=c.head_width,
            d_inner=c.hidden, div_val=1, pre_lnorm=c.norm_place == "pre", n_layer=c.layers, mem_len=c.memory,
            clamp_len=c.position_options.get("clamp") or -1, same_length=bool(c.windows), dropout=0.0,
            untie_r=c.position_options.get("untie", False), layer_norm_epsilon=c.norm_eps,
        ),
        state={theirs: state[ours] for theirs, ours in known(c, state).items()},
        computed=["transformer.pos_emb.inv_freq", "crit.out_layers.0.weight"]
        + [f"transformer.layers.{i}.dec_attn.{b}" for i in range(c.layers) for b in ("r_w_bias", "r_r_bias")],
        text=text(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def of_transformers(tmp_path_factory) -> dict[str, dict]:
    """What THEIRS makes of every case, in one process."""
    folders = {name: tmp_path_factory.mktemp("case") for name in CASES}
    for name, folder in folders.items():
        torch.save(given(CASES[name]), folder / "given")
    environment = os.environ | {"PYTHONPATH": os.environ["FASTLM_TRANSFORMERS_4"], "TRUST_REMOTE_CODE": "1"}
    subprocess.run([sys.executable, "-c", THEIRS, *folders.values()], check=True, env=environment)
    return {name: torch.load(folder / "made") for name, folder in folders.items()}


@pytest.mark.skipif("FASTLM_TRANSFORMERS_4" not in os.environ, reason="FASTLM_TRANSFORMERS_4 names no folder")
@pytest.mark.parametrize("name", CASES)
def test_segments_match_transformers(name, of_transformers):
    model, theirs = make(CASES[name]), of_transformers[name]
    recurrence = model.new_recurrence()
    for tokens, targets, (expected, mems) in zip(*text(), theirs["made"], strict=True):
        logits = model(tokens, recurrence=recurrence)
        torch.testing.assert_close(logits.log_softmax(-1), expected, rtol=1e-5, atol=1e-5)
        for mine, yours in zip(recurrence.states, mems, strict=True):
            torch.testing.assert_close(mine, yours, rtol=1e-5, atol=1e-5)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    mine = dict(model.named_parameters())
    for name, ours in known(model.config, model.state_dict()).items():
        torch.testing.assert_close(mine[ours].grad, theirs["grads"][name], rtol=1e-4, atol=1e-4, msg=name)


def test_a_segment_at_a_time_is_the_text_at_once():
    """Where memory holds all that came before, and where a cache does."""
    model = make(dict(memory=3 * L))
    tokens = text()[0]
    whole = model(torch.cat(tuple(tokens), 1))
    recurrence, caches = model.new_recurrence(), model.new_caches()
    for state in (dict(recurrence=recurrence), dict(caches=caches)):
        torch.testing.assert_close(torch.cat([model(x, **state) for x in tokens], 1), whole, rtol=1e-4, atol=1e-5)
    assert len(recurrence) == len(caches[0]) == 3 * L


def test_segments_are_one_text_whose_tokens_see_a_segment_back():
    """A memory as long as a segment: the whole segment before is seen, and what its states saw through them."""
    model, exact, tokens = make(dict(memory=L)), make(dict(memory=L)).double(), text(4)[0]
    place = torch.arange(4 * L)
    back = place[:, None] // L - place // L
    banded = (place > place[:, None]) | (back > 1)
    whole, _ = formula(exact, torch.cat(tuple(tokens), 1), [], banded)
    remembering = Remembering(model, model.new_recurrence())
    made = torch.cat([remembering(x) for x in tokens], 1)
    torch.testing.assert_close(made, whole.float(), rtol=1e-5, atol=1e-5)
    far = (made[:, 3 * L :] - model(torch.cat(tuple(tokens), 1))[:, 3 * L :]).abs()
    assert far.max() > 1e-2  # the band hides something


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if not scheme.embeds()])
def test_every_scheme_in_attention_remembers(name):
    sizes = dict(vocab_size=61, dim=24, layers=2, heads=2, context=L, memory=3 * L)
    torch.manual_seed(0)
    model = Transformer(preset("llama", position=name, **sizes)).eval()
    spread(model)
    tokens, remembering = text()[0], Remembering(model, model.new_recurrence())
    made = torch.cat([remembering(x) for x in tokens], 1)
    torch.testing.assert_close(made, model(torch.cat(tuple(tokens), 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(side):
    model, (tokens, _) = make(dict(memory=L)), text(1)
    tokens = tokens[0]
    real = torch.ones(2, L, dtype=torch.long)
    real[0, slice(0, 3) if side == "left" else slice(6, None)] = 0
    first = model(tokens, attention_mask=real, recurrence=model.new_recurrence())
    alone = model(tokens[:1][:, real[0].bool()])
    torch.testing.assert_close(first[0][real[0].bool()], alone[0], rtol=1e-4, atol=1e-5)


def test_a_recurrence_is_saved_reordered_and_continued():
    model, (tokens, _) = make(dict(memory=6)), text()
    recurrence, copied = model.new_recurrence(), model.new_recurrence()
    model(tokens[0], recurrence=recurrence)
    copied.load_state_dict(recurrence.state_dict())
    swapped = model.new_recurrence()
    swapped.load_state_dict(recurrence.state_dict())
    swapped.reorder(torch.tensor([1, 0]))
    branch = recurrence.copy()
    expected = model(tokens[1], recurrence=recurrence)
    assert torch.equal(model(tokens[1], recurrence=copied), expected)
    assert torch.equal(Remembering(model, branch)(tokens[1]), expected)
    torch.testing.assert_close(model(tokens[1].flip(0), recurrence=swapped).flip(0), expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, r: m(torch.zeros(3, L, dtype=torch.long), recurrence=r), "takes a new_recurrence"),
        (lambda m, r: m(torch.zeros(2, L, dtype=torch.long), recurrence=r, caches=m.new_caches()), "give one of them"),
        (lambda m, r: m.new_recurrence(0), "the length is 0"),
        (
            lambda m, r: m(torch.zeros(2, L, dtype=torch.long), recurrence=r, segments=torch.zeros(2, L).long()),
            "segments are for rows that continue nothing",
        ),
    ],
)
def test_what_does_not_fit_a_recurrence_is_refused(call, message):
    model = make(dict(memory=6))
    recurrence = model.new_recurrence()
    model(text()[0][0], recurrence=recurrence)
    with pytest.raises(ValueError, match=message):
        call(model, recurrence)
