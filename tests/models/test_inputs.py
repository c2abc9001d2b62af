"""What a model is given: what does not fit is refused, in words that name it, before anything is computed."""

import re

import pytest
import torch

from fastlm.models import Memory, ModelConfig, Transformer
from fastlm.nn import KVCache

SMALL = dict(vocab_size=50, context=16, dim=32, heads=4, layers=2)
TOKENS = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(0))
ONES = torch.ones(2, 8, dtype=torch.int64)


def model(**fields) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**SMALL | fields)).eval()


@pytest.mark.parametrize(
    "tokens", [TOKENS[0], TOKENS[:, :0], TOKENS.float(), TOKENS.tolist(), None], ids=lambda x: type(x).__name__
)
def test_tokens(tokens):
    with pytest.raises(ValueError, match=r"tokens must be \[B, L\] int64, with at least one in a row; got"):
        model()(tokens)


@pytest.mark.parametrize(
    "fields, options, message",
    [
        ({}, dict(attention_mask=ONES[:, :5]), "the attention mask must be [2, 8] bool or int"),
        ({}, dict(attention_mask=torch.zeros(2, 8)), "got [2, 8] torch.float32"),
        ({}, dict(token_types=ONES), "config.token_types is 0"),
        (dict(token_types=2), dict(token_types=ONES[:1]), "token_types must be [2, 8], as the tokens are; got [1, 8]"),
        (dict(position="learned"), dict(positions=ONES[:, :1]), "positions must be [8] or [2, 8]; got [2, 1]"),
        (dict(position="learned"), dict(positions=torch.tensor(0)), "positions must be [8] or [2, 8]; got []"),
        ({}, dict(caches=[KVCache()] * 2), "caches must be 2, one for each layer of the decoder"),
        ({}, dict(caches=[KVCache()]), "caches must be 2"),
        ({}, dict(caches=[KVCache() for _ in range(3)]), "caches must be 2"),
        ({}, dict(predicted=ONES), "predicted tokens need ranks"),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, dict) else None,
)
def test_options_of_a_decoder(fields, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**fields)(TOKENS, **options)


def test_options_of_an_encoder_and_decoder():
    both = model(kind="encoder-decoder")
    memory = both.encode(TOKENS)
    for options in (dict(ranks=ONES), dict(predicted=ONES), dict(recurrence=1)):
        with pytest.raises(ValueError, match="are for a decoder or an encoder that stands alone"):
            both(TOKENS, TOKENS, **options)
    for options in (dict(attention_mask=ONES), dict(segments=ONES), dict(token_types=ONES)):
        with pytest.raises(ValueError, match=r"memory is given, .* leave these out"):
            both(None, TOKENS, memory=memory, **options)
    with pytest.raises(ValueError, match="memory is given"):
        both(TOKENS, TOKENS, memory=memory)
    with pytest.raises(ValueError, match=r"memory.real must be \[2, 8\], as its states are; got \[2, 5\]"):
        both(None, TOKENS, memory=Memory(memory.states, ONES[:, :5].bool()))
    for wrong in (Memory(memory.states[:1]), memory.states):
        with pytest.raises(ValueError, match="memory must be what encode made of 2 rows of tokens"):
            both(None, TOKENS, memory=wrong)
    torch.testing.assert_close(both(None, TOKENS, memory=memory), both(TOKENS, TOKENS))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(norm_eps=-1.0), "norm_eps is -1.0"),
        (dict(memory=-1), "memory is -1"),
        (dict(memory=1.5), "memory is 1.5"),
        (dict(memory=4, kind="encoder-decoder"), "a decoder or an encoder alone has one"),
        (dict(memory=4, memory_reuse=-1), "memory_reuse is -1"),
        (dict(position_options={"heads": 3}), "position_options has 'heads', which other fields of the config say"),
        (dict(kind="encoder", layers=1, mask_decoder=True, conv_width=3), "give 2 layers"),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, dict) else None,
)
def test_configs_that_contradict_themselves(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**SMALL | fields)
