"""Who competes in models: one of ours against transformers' with the same weights, through fastlm.interop, and against
that one swapped, whose modules are its own and whose attention, RMS norms and loss are ours.

Timed are forward, cross entropy of every token and backward to every parameter; a batch is one row of L tokens; ours
makes no logits, as in training.

transformers attends by torch's scaled_dot_product_attention where its model can, and eagerly where it cannot. Dropout
is off. Every model has a vocabulary of 32,000, for the head's product is the same on both sides. "products" is our
step's matrix products alone, on operands that are there already: what would be left if attention, norms and all else
cost nothing. transformers' ratio over that one is therefore the most that any model with these products can reach.

    python benchmarks/models.py t5 1024 fastlm < config.json      # the memory of one side, in a process of its own
"""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import peak_growth, resident
from timing import compare
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout built in place, unless fastlm is installed
import fastlm
from fastlm.interop import from_huggingface
from fastlm.interop.families import FAMILIES
from fastlm.models import Transformer

VOCABULARY = 32000
SIDES = OURS, THEIRS, SWAPPED = "fastlm", "transformers", "swapped"
_DECODER = dict(bos_token_id=None, eos_token_id=None)
_BERT = dict(max_position_embeddings=1024, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
_XLNET = dict(d_model=768, n_layer=12, n_head=12, d_inner=3072, dropout=0.0, mem_len=None)
MODELS: dict[str, tuple[str, dict]] = {  # name → transformers' class, its config
    "bert": ("BertForMaskedLM", _BERT),
    "gpt2": ("GPT2LMHeadModel", _DECODER | dict(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)),
    "t5": ("T5ForConditionalGeneration", dict(d_model=512, num_layers=6, dropout_rate=0.0)),
    "t5-base": (
        "T5ForConditionalGeneration", dict(d_model=768, d_ff=3072, num_layers=12, num_heads=12, dropout_rate=0.0)
    ),
    "bloom": ("BloomForCausalLM", _DECODER | dict(hidden_size=768, n_layer=12, n_head=12)),
    "deberta-v3": (
        "DebertaV2ForMaskedLM",
        _BERT | dict(hidden_size=768, num_hidden_layers=6, num_attention_heads=12, intermediate_size=3072,
                     relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False,
                     position_buckets=256, max_relative_positions=512, share_att_key=True, norm_rel_ebd="layer_norm"),
    ),
    "xlnet": ("XLNetLMHeadModel", _XLNET),
    "xlnet-two-streams": ("XLNetLMHeadModel", _XLNET),
}  # fmt: skip
SHIFTED = ("gpt2", "bloom")  # their labels are the tokens themselves: transformers' loss asks for each next one
# Options of which configs have some: how many layers, and what makes them tiny.
LAYERS = "num_hidden_layers n_layer num_layers num_decoder_layers"
TINY = {
    2: LAYERS + " num_attention_heads n_head num_heads", 16: "hidden_size n_embd d_model", 8: "d_kv d_head",
    32: "intermediate_size d_ff d_inner",
}  # fmt: skip

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)

Run = Callable[[], object]


def shape(name: str, layers: int | None = None, smoke: bool = False) -> tuple[type, object]:
    """transformers' class and config. layers: how many; None for the config's own. smoke: whether it is tiny."""
    import transformers

    architecture, options = MODELS[name]
    kind = getattr(transformers, architecture)
    config = kind.config_class(vocab_size=VOCABULARY, **options)
    changes = {option: size for size, names in TINY.items() for option in names.split()} if smoke else {}
    changes |= dict.fromkeys(LAYERS.split(), layers) if layers else {}
    known = config.to_dict()
    changes = {option: value for option, value in changes.items() if option in known}
    return kind, kind.config_class(**known | changes)


def described(name: str, **size) -> dict:
    """The entries of its config.json."""
    kind, config = shape(name, **size)
    return config.to_dict() | {"architectures": [kind.__name__]}


def attending(kind: type, config: object) -> nn.Module:
    """transformers' model, attending in the fastest way that it has."""
    return kind._from_config(config, attn_implementation="sdpa" if kind._supports_sdpa else "eager")


def swapped(model: nn.Module) -> nn.Module:
    """transformers' model with our attention, RMS norms and loss."""
    report = fastlm.swap(model)
    assert report.swapped and not report.kept, report
    return model


def theirs(name: str, **size) -> nn.Module:
    """transformers' model, its weights drawn wider than at the start of training, so that what a token sees shows."""
    kind, config = shape(name, **size)
    torch.manual_seed(0)
    model = attending(kind, config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.copy_(torch.randn(p.shape) * 0.5 * p.shape[-1] ** -0.5)
    return model.train()


def in_fp64(model: nn.Module) -> nn.Module:
    """A copy, each module of which widens what it is given: XLNet's positions are fp32 whatever its weights are."""
    wide = lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
    copied = copy.deepcopy(model).double()
    for module in copied.modules():
        module.register_forward_pre_hook(
            lambda _, args, options: (tuple(map(wide, args)), {name: wide(x) for name, x in options.items()}),
            with_kwargs=True,
        )
    return copied


def batch(name: str, L: int) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """transformers' arguments, ours, and the labels. T5 writes a quarter of what it reads; XLNet's query stream guesses
    a sixth of the tokens.
    """
    drawn = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(VOCABULARY, (1, n), generator=drawn)
    tokens = draw(L)
    if name.startswith("t5"):
        answer = draw(L // 4)
        return (
            {"input_ids": tokens, "decoder_input_ids": answer, "use_cache": False},
            {"tokens": tokens, "decoder_tokens": answer},
            draw(L // 4),
        )
    if name == "xlnet-two-streams":
        predicted = torch.randperm(L, generator=drawn)[: L // 6][None]
        ranks = torch.full((1, L), -1).scatter(1, predicted, torch.arange(L // 6)[None])
        own = torch.zeros(1, L, dtype=torch.long).scatter(1, predicted, 1)
        hidden = (ranks[:, None, :] > ranks[:, :, None] - own[:, :, None]).float()
        mapping = F.one_hot(predicted, L).float()
        return (
            {"input_ids": tokens, "perm_mask": hidden, "target_mapping": mapping, "use_mems": False},
            {"tokens": tokens, "ranks": ranks, "predicted": predicted},
            draw(L // 6),
        )
    more = {"gpt2": {"use_cache": False}, "bloom": {"use_cache": False}, "xlnet": {"use_mems": False}}.get(name, {})
    return {"input_ids": tokens, **more}, {"tokens": tokens}, draw(L)


def loss(name: str, L: int, side: str, model: nn.Module, by_logits: bool = False) -> Callable[[], Tensor]:
    """The forward pass of a training step. by_logits: whether ours makes logits too."""
    of_theirs, of_ours, labels = batch(name, L)

    def of_states() -> Tensor:
        states = model.states(**of_ours)
        scored, words = (states[:, :-1], labels[:, 1:]) if name in SHIFTED else (states, labels)
        if by_logits:
            return F.cross_entropy(model.head(scored).flatten(0, 1), words.flatten())
        hidden, weight, bias = model.head.factors(scored)
        return fastlm.linear_cross_entropy(hidden.flatten(0, 1), weight, words.flatten(), bias)

    return of_states if side == OURS else lambda: model(**of_theirs, labels=labels)[0]


def step(name: str, L: int, side: str, model: nn.Module, by_logits: bool = False) -> Run:
    """A training step, which leaves gradients and returns the loss."""
    forward = loss(name, L, side, model, by_logits)

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        made = forward()
        made.backward()
        return made.detach()

    return run


class Products(TorchDispatchMode):
    """Notes every matrix product of a step: the operator, and its operands' shapes and strides."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[Callable, list[tuple]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            self.seen.append((func, [(x.shape, x.stride()) for x in args if isinstance(x, Tensor)]))
        return func(*args, **(kwargs or {}))

    def alone(self) -> Run:
        """What computes them again, on operands of its own."""
        operands = {form: torch.empty_strided(*form).fill_(1e-3) for _, forms in self.seen for form in forms}
        calls = [(func, [operands[form] for form in forms]) for func, forms in self.seen]

        def run() -> None:
            for func, given in calls:
                func(*given)

        return run


Gradients = dict[str, Tensor]  # by transformers' names


def gradients_of_ours(ours: nn.Module, other: nn.Module) -> Gradients:
    """ours: the model that transformers' other was opened as."""
    of, known = dict(ours.named_parameters()), gradients(other)
    parts = FAMILIES[other.config.model_type].parts(ours.config)
    return {part.theirs: part.of(of[part.ours].grad) for part in parts if part.theirs in known}


def gradients(model: nn.Module) -> Gradients:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(losses: dict[str, Tensor], found: dict[str, Gradients], truth: Gradients) -> None:
    """Raise AssertionError where losses differ, or where the gradients of all parameters together are farther from the
    truth than twice as far as transformers' are, and than 1e-5.
    """
    for loss in losses.values():
        torch.testing.assert_close(loss, losses[THEIRS], rtol=1e-4, atol=0)
    errors = {side: distance(made, truth) for side, made in found.items()}
    assert max(errors.values()) <= max(1e-5, 2 * errors[THEIRS]), f"gradients are off by {errors}"


def distance(made: Gradients, truth: Gradients) -> float:
    """Of all gradients that are in both, as a share of the truth's length."""
    differ = total = 0.0
    for name, gradient in made.items():
        differ += (gradient.double() - truth[name]).square().sum().item()
        total += truth[name].square().sum().item()
    return (differ / total) ** 0.5


def measure(name: str, L: int, clock: str = "clock", smoke: bool = False, layers: int | None = None, **limits) -> dict:
    """One row of results: a training step."""
    other = theirs(name, smoke=smoke, layers=layers)
    models = {OURS: from_huggingface(other).train(), THEIRS: other, SWAPPED: swapped(copy.deepcopy(other))}
    runs = {side: step(name, L, side, model) for side, model in models.items()}
    losses = {side: run() for side, run in runs.items()}
    exact = in_fp64(other)
    step(name, L, THEIRS, exact)()
    found = {OURS: gradients_of_ours(models[OURS], other)}
    found |= {side: gradients(models[side]) for side in (THEIRS, SWAPPED)}
    check(losses, found, gradients(exact))
    del exact, found
    with Products() as products:  # it does not see those inside the loss
        step(name, L, OURS, models[OURS], by_logits=True)()
    runs["products"] = products.alone()
    row = compare({side: lambda run=run: [run] for side, run in runs.items()}, clock, **limits)
    del other, models, runs, products
    peak = memory(name, L, smoke, layers)
    return row.row(kind="models", step="train", model=name, B=1, L=L, peak=peak)


def memory(name: str, L: int, smoke: bool = False, layers: int | None = None) -> dict[str, dict[str, int | None]]:
    """Of each side, in a process of its own, bytes: the "peak" of the whole process that makes a model and its first
    step, and by how much it "grows" in that step, gradients included.
    """
    entries = json.dumps(described(name, layers=layers, smoke=smoke))
    command = [sys.executable, __file__, name, str(L)]
    run = lambda side: subprocess.run([*command, side], check=True, input=entries, capture_output=True, text=True)
    return {side: json.loads(run(side).stdout) for side in SIDES}


def fresh(side: str, entries: dict) -> nn.Module:
    """A side's model by the entries of config.json, its weights as they are first drawn."""
    if side == OURS:
        return Transformer(FAMILIES[entries["model_type"]].config(entries)).train()
    import transformers

    kind = getattr(transformers, *entries["architectures"])
    model = attending(kind, kind.config_class(**entries)).train()
    return swapped(model) if side == SWAPPED else model


def main() -> None:
    name, L, side = sys.argv[1:]
    model = fresh(side, json.loads(sys.stdin.read()))
    print(json.dumps({"grows": peak_growth(step(name, int(L), side, model)), "peak": resident("VmHWM")}))


if __name__ == "__main__":
    main()
