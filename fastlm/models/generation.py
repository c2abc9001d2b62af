"""Writing text: greedily, by sampling, or by beam search, for every decoder and encoder–decoder and every scheme.

`generate` holds the three; `Texts` is what they write to: rows of tokens, the caches that go with them, and the logits
of what comes next.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlm.checks import each, finite, number, whole
from fastlm.models.inputs import Memory, shape_of

if TYPE_CHECKING:
    from fastlm.models.transformer import Transformer

LEAST_TEMPERATURE = 1e-4  # below it logits overflow
NEVER = -1e9  # the score of a beam that is not there; finite, so that it can be divided


@torch.no_grad()
def generate(
    model: "Transformer",
    tokens: Tensor,
    n: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    attention_mask: Tensor | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    eos: int | Sequence[int] | None = None,
    pad: int = 0,
    start: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue texts, or with an encoder–decoder answer them, token by token.

    Past `context` tokens, a decoder reads on from the last half of them, so that no scheme is asked for distances it
    did not train.

    Args:
        model: a decoder or an encoder–decoder.
        tokens: [B, L] int64, the texts; an encoder–decoder's encoder reads them.
        n: how many tokens to write at most.
        temperature: of the softmax that is sampled from, at least 10⁻⁴; 0 takes the likeliest token. Default 1.
        generator: of the random numbers, on the tokens' device. None: torch's own.
        attention_mask: [B, L] bool or int, which tokens are real, for texts of different lengths padded on any side.
            None: all.
        top_k: sample from the k likeliest tokens only. None: from all.
        top_p: sample from the likeliest tokens that have this probability together (Holtzman et al. 2020), in (0, 1].
            None: from all.
        beams: texts kept in a beam search, which takes the likeliest whole; 1 for none. It samples nothing.
        length_penalty: a beam's score is its log-probability / length^length_penalty. Default 1.
        eos: the token that ends a text, or several that do; None for none.
        pad: what is written after that. Default 0.
        start: the decoder's first token, of an encoder–decoder. None: pad.
        on_token: called with each step's new tokens, [B] int64, as they are written; not in a beam search.

    Returns:
        [B, L + m] int64, the texts given and what was added; of an encoder–decoder [B, m], what the decoder wrote. m is
        n, or fewer where every text ended.

    Raises:
        ValueError: for an encoder, for values out of range, for a mask that is not the tokens', and for beams past a
            decoder's context.
    """
    _check_texts(model, tokens, attention_mask, n if beams > 1 else 0)
    _check_choice(n, temperature, top_k, top_p, beams, length_penalty)
    start = pad if start is None else start
    ends = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
    for end in ends:
        _tokens(model.config.vocab_size, eos=end)
    _tokens(model.config.vocab_size, pad=pad, start=start)
    eos = torch.tensor(ends, dtype=torch.int64, device=tokens.device)
    prompt = tokens
    texts = Texts.begin(model, tokens, attention_mask, start)
    if beams > 1:
        written = _beam_search(texts, n, beams, length_penalty, eos, pad)
    else:
        pick = lambda logits: _pick(logits, temperature, top_k, top_p, generator)
        written = _write(texts, n, pick, eos, pad, on_token)
    return written if texts.memory is not None else torch.cat((prompt, written), 1)


class Texts:
    """Rows of tokens that a model has read, and what it needs to read on.

    Attributes:
        tokens: [B, L] int64, padded on the left.
        real: [B, L] bool, which are no padding; None for all.
        memory: what an encoder made, which the decoder attends to; None for a decoder alone.
        logits: [B, vocab_size] fp32, of what comes next.
    """

    def __init__(self, model: "Transformer", memory: Memory | None):
        self.model, self.memory = model, memory
        self.tokens: Tensor | None = None
        self.real: Tensor | None = None
        self._caches = model.new_caches()

    @classmethod
    def begin(cls, model: "Transformer", tokens: Tensor, real: Tensor | None, start: int) -> "Texts":
        """Read prompts, or have the encoder read them."""
        if real is not None and real.bool().all():
            real = None
        if model.encoder is not None:
            texts = cls(model, model.encode(tokens, real))
            texts.read(tokens.new_full((len(tokens), 1), start))
            return texts
        texts = cls(model, None)
        if real is not None:  # new tokens stand at the right, so padding moves to the left
            order = real.long().sort(dim=1, stable=True).indices
            tokens, texts.real = tokens.gather(1, order), real.bool().gather(1, order)
        texts._read(tokens)
        return texts

    def read(self, new: Tensor) -> None:
        """Append tokens [B, n] to the rows, and find what comes next."""
        if self.real is not None:
            self.real = torch.cat((self.real, torch.ones_like(new, dtype=torch.bool)), 1)
        self._read(new)

    def _read(self, new: Tensor) -> None:
        self.tokens = new if self.tokens is None else torch.cat((self.tokens, new), 1)
        if self.memory is None and len(self._caches[0]) + new.shape[1] > self.model.config.context:
            # start over on half a context: cheap, and within what was trained
            self._caches, half = self.model.new_caches(), max(1, self.model.config.context // 2)
            new, self.tokens = self.tokens[:, -half:], self.tokens[:, -half:]
            self.real = None if self.real is None else self.real[:, -half:]
        if self.memory is not None:
            states = self.model.states(None, new, memory=self.memory, caches=self._caches)
        else:
            places = None if self.real is None else (self.real.long().cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
            states = self.model.states(new, attention_mask=self.real, positions=places, caches=self._caches)
        self.logits = self.model.head(states[:, -1]).float()

    def reorder(self, rows: Tensor) -> None:
        """Make row b what row rows[b] was; rows [any number] int64."""
        pick = lambda x: None if x is None else x[rows]
        self.tokens, self.real, self.logits = map(pick, (self.tokens, self.real, self.logits))
        if self.memory is not None:
            self.memory = Memory(*map(pick, self.memory))
        for cache in self._caches:
            cache.reorder(rows)


def _write(texts: Texts, n: int, pick: Callable, eos: Tensor, pad: int, on_token: Callable | None) -> Tensor:
    """One token at a time: [B, m] int64. eos: [any number] int64."""
    written = texts.tokens.new_empty(len(texts.tokens), 0)
    ended = torch.zeros(len(written), dtype=torch.bool, device=written.device)
    while written.shape[1] < n:
        new = torch.where(ended, pad, pick(texts.logits))
        written = torch.cat((written, new[:, None]), 1)
        if on_token is not None:
            on_token(new)
        if len(eos):
            ended = ended | torch.isin(new, eos)
            if ended.all():
                break
        if written.shape[1] < n:
            texts.read(new[:, None])
    return written


def _pick(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """[B, vocab_size] → [B] int64."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None and top_p < 1:
        ascending, order = logits.sort(-1)
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        tail[:, -1] = False  # the likeliest always stays
        logits = logits.masked_fill(tail.gather(-1, order.argsort(-1)), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _beam_search(texts: Texts, n: int, beams: int, penalty: float, eos: Tensor, pad: int) -> Tensor:
    """The likeliest texts found by keeping the `beams` likeliest beginnings: [B, m] int64.

    A text is judged by its log-probability / length^penalty once it has ended, by eos or by being n tokens long. Twice
    as many continuations as beams are looked at, so that beams go on where likelier ones end. A row is done when it has
    `beams` ended texts and its best open one, at its present length, scores below the worst of them (the rule of
    transformers' early_stopping=False).
    """
    B, device = len(texts.tokens), texts.tokens.device
    texts.reorder(torch.arange(B, device=device).repeat_interleave(beams))
    first = torch.arange(B, device=device)[:, None] * beams  # of each row's beams
    open_scores = torch.full((B, beams), NEVER, device=device)
    open_scores[:, 0] = 0  # all beams begin alike, and one of them is enough
    open_texts = torch.full((B, beams, n), pad, device=device)
    best_scores, best_texts = torch.full_like(open_scores, NEVER), open_texts.clone()
    improvable = torch.ones(B, 1, dtype=torch.bool, device=device)
    for length in range(1, n + 1):
        continued = texts.logits.log_softmax(-1).unflatten(0, (B, beams)) + open_scores[:, :, None]
        vocab = continued.shape[-1]
        scores, places = continued.flatten(1).topk(2 * beams)
        parents, new = places // vocab, places % vocab
        candidates = open_texts.gather(1, parents[:, :, None].expand(-1, -1, n))
        candidates[:, :, length - 1] = new
        ends = torch.isin(new, eos) | (length == n)

        judged = scores[:, :beams] / length**penalty  # continuations beyond the first `beams` only keep beams open
        judged = judged.masked_fill(~(ends[:, :beams] & improvable), NEVER)
        best_scores, kept = torch.cat((best_scores, judged), 1).topk(beams)
        both = torch.cat((best_texts, candidates[:, :beams]), 1)
        best_texts = both.gather(1, kept[:, :, None].expand(-1, -1, n))

        open_scores, kept = scores.masked_fill(ends, NEVER).topk(beams)
        open_texts = candidates.gather(1, kept[:, :, None].expand(-1, -1, n))
        hope = open_scores[:, :1] / length**penalty
        worst = best_scores.min(1, keepdim=True).values
        improvable = improvable & ((worst <= NEVER / 2) | (hope > worst))
        if length == n or not improvable.any():
            break
        texts.reorder((first + parents.gather(1, kept)).flatten())
        texts.read(new.gather(1, kept).flatten()[:, None])
    best = best_texts[:, 0]
    ends = torch.isin(best, eos)
    lengths = torch.where(ends.any(1), ends.long().argmax(1) + 1, n)
    return best[:, : int(lengths.max())]


def _check_texts(model: "Transformer", tokens: Tensor, real: Tensor | None, beam_tokens: int) -> None:
    """Raise ValueError for a model that writes nothing, and for texts that it cannot read. beam_tokens: how many a beam
    search is to write.
    """
    if model.decoder is None or model.config.head != "lm":
        raise ValueError("an encoder writes no text; give a model of kind 'decoder' or 'encoder-decoder'")
    B, L = shape_of(tokens, (torch.int64,))
    whole(1, texts=B)
    if real is not None and (not isinstance(real, Tensor) or real.shape != tokens.shape or real.is_floating_point()):
        got = f"{list(real.shape)} {real.dtype}" if isinstance(real, Tensor) else type(real).__name__
        raise ValueError(f"attention_mask must be {list(tokens.shape)} bool or int, as the tokens are; got {got}")
    context = model.config.context
    if beam_tokens and model.encoder is None and L + beam_tokens > context:
        raise ValueError(
            f"a beam search of {beam_tokens} tokens after {L} goes past context {context}; "
            "give a smaller n, or a shorter text"
        )


def _check_choice(n: int, temperature: float, top_k, top_p, beams: int, length_penalty: float) -> None:
    whole(0, n=n)
    whole(1, beams=beams)
    if not finite(length_penalty):
        raise ValueError(f"length_penalty is {length_penalty!r}; give a finite number")
    if not (finite(temperature) and (temperature == 0 or temperature >= LEAST_TEMPERATURE)):
        raise ValueError(f"temperature is {temperature!r}; give 0, or a finite number of at least {LEAST_TEMPERATURE}")
    if top_k is not None:
        whole(1, top_k=top_k)
    if top_p is not None and not (number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p is {top_p!r}; give a share of the probability, in (0, 1]")


def _tokens(vocab: int, **ids: object) -> None:
    """Raise ValueError for what is no token of the vocabulary."""
    fits = lambda x: isinstance(x, Integral) and not isinstance(x, bool) and 0 <= x < vocab
    each(ids, fits, f"give a token of the vocabulary, from 0 to {vocab - 1}")
