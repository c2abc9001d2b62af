"""Every architecture of transformers computes under attn_implementation="fastlm" what it computes under eager, or is
refused in words: the best known ones here, all that can be made tiny with `pytest -m sweep`.
"""

import pytest
import torch
from families import KINDS, batches, make, outputs, parameter_count, served

import fastlm.interop
from fastlm.interop import attention as door

SERVED = {
    "causal": "llama gpt2 gpt_neox opt qwen2 qwen3 phi phi3 gemma gemma2 olmo2 stablelm starcoder2 mixtral granite "
    "biogpt gpt_bigcode ctrl jetmoe cohere bamba qwen3_next whisper bigbird_pegasus mistral gemma3_text "
    "gpt_oss cohere2 deepseek_v3 llama4_text",
    "masked": "bert roberta electra albert distilbert xlm-roberta mobilebert esm eurobert modernbert",
    "seq2seq": "t5 longt5 bart mbart pegasus marian m2m_100 nllb-moe pegasus_x blenderbot",
    "base": "splinter dpr clip_text_model",
}
COMPUTES, DENSE = "which computes attention itself", "takes no dense mask"
REFUSED = {
    ("causal", "bloom mpt codegen xglm gptj gpt_neo falcon gpt_neox_japanese trocr mvp xlnet roformer git"): COMPUTES,
    ("masked", "deberta deberta-v2 longformer mpnet"): COMPUTES,
    ("seq2seq", "led prophetnet"): COMPUTES,
    ("masked", "layoutlm"): DENSE,
    ("causal", "doge"): "computes with its mask itself",
    ("seq2seq", "bigbird_pegasus"): "(computes with its mask itself|takes no dense mask)",
}
# No attention at all, or none in two layers.
WITHOUT = ("mamba", "mamba2", "falcon_mamba", "fnet", "xlstm", "sam3_lite_text_text_model")
LARGEST = 6_000_000  # parameters that a model may have which its config does not make small

shown = [(kind, name) for kind, names in SERVED.items() for name in names.split()]
refused = [(kind, name, why) for (kind, names), why in REFUSED.items() for name in names.split()]
known = {*shown, *((kind, name) for kind, name, _ in refused)}
others = [(kind, name) for kind, (_, names) in KINDS.items() for name in names if (kind, name) not in known]


@pytest.fixture(autouse=True)
def registered():
    fastlm.interop.register()
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch):
    """One entry for each call of our attention."""
    made = []
    monkeypatch.setattr(
        door, "attention", lambda *args, real=door.attention, **given: made.append(1) or real(*args, **given)
    )
    return made


def compare(eager, ours, calls):
    for what, (ids, mask) in batches().items():
        for want, got in zip(outputs(eager, ids, mask), outputs(ours, ids, mask), strict=True):
            scale = want.std()
            torch.testing.assert_close(
                got / scale, want / scale, rtol=2e-4, atol=2e-4, msg=lambda m, w=what: f"{w}: {m}"
            )
    assert calls


@pytest.mark.parametrize("kind, name", shown)
def test_as_under_eager(kind, name, calls):
    if name not in KINDS[kind][1]:
        pytest.skip("this transformers has none")
    with served():
        compare(make(kind, name, "eager"), make(kind, name, "fastlm"), calls)


@pytest.mark.parametrize("kind, name, why", refused)
def test_refused_in_words(kind, name, why):
    with pytest.raises((NotImplementedError, AttributeError), match=f"attn_implementation='fastlm' .*{why}.* 'eager'"):
        outputs(make(kind, name, "fastlm"), *batches()["no mask"])


@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.filterwarnings("default::fastlm.backends.dispatch.SlowPathWarning")  # heads of more than 256 channels
@pytest.mark.parametrize("kind, name", others)
def test_as_under_eager_or_refused_in_words(kind, name, calls):
    try:
        if parameter_count(kind, name) > LARGEST:
            pytest.skip("does not become tiny")
        eager = make(kind, name, "eager")
        for ids, mask in batches().values():
            outputs(eager, ids, mask)
    except Exception as error:
        pytest.skip(f"has no tiny config that reads tokens: {error}")
    try:
        compare(eager, make(kind, name, "fastlm"), [1] if name in WITHOUT else calls)
    except (NotImplementedError, AttributeError) as refusal:
        assert "attn_implementation='fastlm'" in str(refusal)
