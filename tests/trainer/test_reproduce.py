"""Papers' tables and figures at a small size, and here at a smaller one still: each claim is looked at, those that are
exact hold, and what an experiment says comes from what it measured.
"""

import math
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from runs import fail, write_text

from fastlm.objectives import Masked
from fastlm.trainer import cli
from fastlm.trainer.commands import reproducing
from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.tokenizer import load_tokenizer, vocabulary
from fastlm.trainer.data.tokens import tokenize
from fastlm.trainer.options.choices import choices
from fastlm.trainer.reproduce import (
    EXPERIMENTS,
    Claim,
    Setting,
    batch_size,
    clean_text,
    detection,
    memory_length,
    optimizers,
)  # fmt: skip
from fastlm.trainer.reproduce.accumulation import gradient, of_means, of_sums
from fastlm.trainer.reproduce.albert_sizes import PAPER
from fastlm.trainer.reproduce.clean_text import ABOVE, AGAIN, BELOW, cleaned, cut, encoded, lines_of, spoilt
from fastlm.trainer.reproduce.extrapolation import at_length
from fastlm.trainer.reproduce.learning import clearly_below, held_out, learned, learner, lower_in_mean, shape, spread
from fastlm.trainer.reproduce.loss_scaling import LEAST, activations
from fastlm.trainer.reproduce.memory_length import with_memory
from fastlm.trainer.reproduce.next_sentence import FULL, LABEL, PAIRS, begun, of_full_rows
from fastlm.trainer.reproduce.rope_decay import decay
from fastlm.trainer.tasks.rows import Row


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Two documents of a grammar that a few updates learn."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "text").mkdir()
    for seed in range(4):
        write_text(folder / "text" / f"{seed}.txt", seed, lines=700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return tokenize(find((folder / "text",)), 320)


@pytest.fixture(autouse=True)
def quick(threads, monkeypatch):
    threads(1)
    monkeypatch.setattr("fastlm.trainer.reproduce.learning.LOOKED_AT", 8)


def setting(tokens, effort: float, seeds: int = 1) -> Setting:
    return Setting(tokens, tuple(range(seeds)), effort)


def found(tokens, name: str, effort: float, seeds: int = 1):
    """What an experiment finds, its table rectangular and its figure drawn."""
    finding = EXPERIMENTS[name]().run(setting(tokens, effort, seeds))
    assert finding.claims and finding.rows and {len(row) for row in finding.rows} == {len(finding.columns)}
    figure = Figure()
    finding.draw(figure)
    assert figure.axes
    return finding


# ---------------------------------------------------------------------------------------------------------------------
# Exact ones


def test_parameters_of_albert_are_counted(tokens):
    finding = found(tokens, "albert-sizes", 1)
    counts = finding.values["counts"]
    # of each the paper's table, in millions; what its code makes of xxlarge is 223, not 235
    assert {name: round(n / 1e6) for name, n in counts.items()} == PAPER | {
        "bert-base": 109, "bert-large": 335, "albert-xlarge": 59, "albert-xxlarge": 223,
    }  # fmt: skip
    V, E, H = 30000, 128, 768
    layer = 4 * (H * H + H) + 2 * 4 * H * H + 4 * H + H + 2 * 2 * H
    embeddings = (V + 512 + 2) * E + 2 * E + E * H + H
    assert counts["albert-base"] == embeddings + layer + H * H + H == 11_683_584
    assert [claim.holds for claim in finding.claims] == [False, True, True]


def test_rotary_decay_is_its_definition(tokens):
    finding = found(tokens, "rope-decay", 1)
    assert [claim.holds for claim in finding.claims] == [True, False]
    m, channels = 37, 16
    sums, total = [], 0j
    for i in range(channels // 2):
        angle = m * 10000.0 ** (-2 * i / channels)
        total += complex(math.cos(angle), math.sin(angle))
        sums.append(abs(total))
    assert decay(torch.tensor([m, 0]), channels, 10000.0).tolist() == pytest.approx([sum(sums) / len(sums), 4.5])


def test_micro_batches_make_one_gradient_and_means_of_means_another(tokens):
    finding = found(tokens, "accumulation", 1, seeds=2)
    assert all(claim.holds for claim in finding.claims)
    trainer = learner(setting(tokens, 1), 2, 0, preset="bert", batch=16, context=64)
    assert torch.equal(gradient(trainer, 1, of_sums), gradient(trainer, 1, of_means))


def test_adafactor_keeps_rows_and_columns(tokens):
    finding = found(tokens, "adafactor", 0.02)
    assert [claim.holds for claim in finding.claims[:2]] == [True, True]
    assert set(finding.values["states"]) == {"gpt2", "t5-base", "bert-large"}


# ---------------------------------------------------------------------------------------------------------------------
# Those that learn


def test_fp16_loses_gradients_unless_the_loss_is_scaled(tokens):
    finding = found(tokens, "loss-scaling", 0.01)
    assert [claim.holds for claim in finding.claims[:2]] == [True, True]
    sizes = torch.tensor([LEAST, 1.001 * LEAST, 1.0])
    assert sizes.half().tolist() == [0.0, 2.0**-24, 1.0]
    assert (activations(learner(setting(tokens, 1), 2, 0)) > 0).all()


def test_sgd_is_beside_the_adam_family(tokens, monkeypatch):
    """Who is ahead after a few updates of a grammar is no claim; what is said of it is what was measured."""
    rates = {"sgd": (0.3,), "adam": (3e-3,), "adamw": (3e-3,), "lamb": (3e-2,), "adafactor": (6e-2,)}
    monkeypatch.setattr(optimizers, "RATES", rates)
    finding = found(tokens, "optimizers", 0.03)
    sgd, *others = (losses[0] for losses in finding.values["losses"].values())
    assert [claim.holds for claim in finding.claims] == [loss < sgd for loss in others]
    assert finding.values["rates"] == {name: rate for name, (rate,) in rates.items()}


def test_longer_rows_are_asked_of_every_scheme(tokens):
    finding = found(tokens, "extrapolation", 0.01)
    losses = finding.values["losses"]
    assert losses.keys() == {
        "sinusoidal",
        "rope",
        "alibi",
        "t5",
        "kerple",
        "rope, interpolated",
        "rope, interpolated and tuned",
    }
    assert all(math.isfinite(x) for several in losses.values() for lengths in several for x in lengths)
    assert losses["rope"][0][0] == losses["rope, interpolated"][0][0] and len(finding.claims) == 10


def test_a_length_is_the_same_text_in_other_rows(tokens):
    """With positions that say nothing, and attention to a row's last token alone, rows of any length are alike."""
    run = learned(learner(setting(tokens, 1), 2, 0, position="none", context=32))
    losses = [at_length(run.trainer, length) for length in (32, 64)]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)


@pytest.mark.parametrize("name", ("warmup", "masking"))
def test_the_others_are_done(tokens, name):
    finding = found(tokens, name, 0.02)
    assert all(math.isfinite(x) for values in finding.values["losses"].values() for x in values)


@pytest.mark.parametrize("goal", (1.0, 0.0))
def test_updates_to_a_loss_are_counted(tokens, monkeypatch, goal):
    """The loss of guessing by frequency is reached soon; a loss of 0 never is, and then no claim holds."""
    monkeypatch.setattr(batch_size, "GOAL", goal)
    monkeypatch.setattr(batch_size, "ROWS", (4, 8, 16))
    finding = found(tokens, "batch-size", 0.04 if goal else 0.01)
    needed = finding.values["needed"]
    assert needed["linear"][4] is needed["square root"][4] and list(needed["linear"]) == [4, 8, 16]
    means = [needed["linear"][rows][0] for rows in (4, 8, 16)]
    if goal:
        assert all(n % batch_size.EVERY == 0 and n <= 24 for n in means)
        falls, less, diminish = (claim.holds for claim in finding.claims[3:])
        assert falls == (means[2] < means[1] < means[0]) and less == (4 * means[2] > means[0])
        assert diminish == (means[1] * means[1] < means[0] * means[2])
    else:
        assert means == [math.inf] * 3 and not any(claim.holds for claim in finding.claims)
        assert finding.rows[0][1] == "not there in 1 of 1"


def test_a_goal_is_looked_at_every_few_updates(tokens):
    seen, trainer = [], learner(setting(tokens, 1), 3 * batch_size.EVERY, 0)
    while trainer.step < trainer.steps:
        trainer.update()
        seen += [held_out(trainer)] if trainer.step % batch_size.EVERY == 0 else []
    assert seen[0] > seen[1] > seen[2]
    again = lambda goal: batch_size.updates_to(learner(setting(tokens, 1), 3 * batch_size.EVERY, 0), goal)
    assert again(seen[1]) == 2 * batch_size.EVERY and again(seen[2] - 1e-3) == math.inf


def test_memory_is_asked_in_every_length(tokens, monkeypatch):
    monkeypatch.setattr(memory_length, "LOOKED_AT", 1024)
    finding = found(tokens, "memory-length", 0.01)
    losses = finding.values["losses"]
    of = lambda trained, asked: losses[f"{trained}"][0][memory_length.ASKED.index(asked)]
    starts = {name: memory_length.begun(setting(tokens, 0.01), name, 0).train.rows for name in losses}
    in_order = [hasattr(rows, "streams") for rows in starts.values()]
    assert in_order == [False, True, True, True] and losses["0"] != losses[memory_length.SHUFFLED]
    assert all(len(set(each[0])) == len(memory_length.ASKED) for each in losses.values())  # memory says something
    assert [claim.holds for claim in finding.claims] == [
        of(64, 64) < of(16, 16) < of(0, 0),
        of(16, 16) < of(0, 0),
        of(64, 64) < of(0, 0),
        of(64, 64) < of(64, 32) < of(64, 16) < of(64, 0),
        of(16, 64) < of(16, 16),
    ]


def test_a_memory_as_long_as_the_text_is_one_long_row(tokens, monkeypatch):
    """A model that remembers all rows before says what it says of one row that holds them all."""
    monkeypatch.setattr(memory_length, "LOOKED_AT", 128)
    monkeypatch.setattr(memory_length, "SIDE_BY_SIDE", 1)
    sizes = shape(setting(tokens, 1), position="transformer-xl", context=16)
    trainer = learner(setting(tokens, 1), 2, 0, shape=sizes)
    monkeypatch.setattr(memory_length, "ROW", 16)
    remembered, none = with_memory(trainer, 128), with_memory(trainer, 0)
    monkeypatch.setattr(memory_length, "ROW", 128)
    at_once = with_memory(trainer, 0)
    assert remembered == pytest.approx(at_once, abs=1e-5) and none != pytest.approx(at_once, abs=1e-5)


def test_pairs_are_learned_with_and_without_their_label(tokens):
    finding = found(tokens, "next-sentence", 0.01)
    pairs, rows = finding.values["pairs"], finding.values["rows"]
    assert pairs.keys() == {LABEL, PAIRS} and rows.keys() == {LABEL, PAIRS, FULL}
    assert [c.holds for c in finding.claims] == [pairs[PAIRS] <= pairs[LABEL], rows[FULL] <= rows[LABEL]]
    trainers = {name: begun(setting(tokens, 0.01), name, 0) for name in (LABEL, PAIRS)}
    gradients = {}
    for name, trainer in trainers.items():
        batch = trainer.train.batch(0, 0, 4)
        trainer.train.means(trainer.train.loss(trainer.model, batch), trainer.train.targets(batch))["loss"].backward()
        gradients[name] = trainer.model.pair_head.out.weight.grad.abs().max().item()
    assert gradients[LABEL] > 0 == gradients[PAIRS]


def test_full_rows_are_asked_of_a_model_of_pairs(tokens):
    """As the objective of full rows asks them, of the same text."""
    trainer = begun(setting(tokens, 0.01), FULL, 0)
    assert of_full_rows(trainer) == held_out(trainer)
    known = vocabulary(trainer.tokenizer)
    assert of_full_rows(trainer) != held_out(trainer, Masked(trainer.held_out.tokens, 64, known, rate=0.1))


def test_noises_are_followed_by_one_task(tokens):
    finding = found(tokens, "bart-noises", 0.01)
    tuned = finding.values["tuned"]
    anew, mask, delete, infill, permute, rotate, both = (losses[0] for losses in tuned.values())
    assert len({anew, mask, delete, infill, permute, rotate, both}) == 7  # each has learned something else
    assert [claim.holds for claim in finding.claims] == [
        max(mask, delete, infill, permute, rotate, both) < anew,
        max(mask, delete, infill) < min(permute, rotate),
        delete <= mask,
        infill <= min(mask, delete, permute, rotate),
    ]


def test_detection_is_as_much_work_as_hidden_tokens(tokens, monkeypatch):
    texts = {"odd": "Ada writes {} lines of code, and", "even": "and {} proofs are what Grace reads;"}
    rows = [Row(text.format(i), None, label, group=str(i)) for i in range(40) for label, text in texts.items()]
    monkeypatch.setattr(detection.library, "rows", lambda: ("rows", rows))
    finding = found(tokens, "detection", 0.02)
    work, updates = finding.values["work"], finding.values["updates"]
    layers, head, V, D, H = 2 * 12 * 64 * 64, 64 * 64, tokens.facts.vocab_size, 64, 16
    assert work[detection.HIDDEN] == layers + 0.25 * (head + V * D)
    assert work[detection.UNIFORM] == layers + head + D
    generator = D * H + 2 * 12 * H * H + 0.25 * (H * D + V * D)
    assert work[detection.LEARNED] == work[detection.UNIFORM] + generator
    spent = [work[name] * updates[name] for name in work]
    assert max(spent) - min(spent) <= max(work.values())
    of, ways = finding.values["right"], (detection.LEARNED, detection.HIDDEN, detection.UNIFORM, detection.ANEW)
    learned_, hidden, even, anew = (of[name][0] for name in ways)
    assert [c.holds for c in finding.claims] == [
        learned_ >= hidden, hidden >= even, learned_ >= even, min(learned_, hidden, even) > anew,
    ]  # fmt: skip


def test_a_model_is_fine_tuned_from_what_it_learned(tokens, monkeypatch):
    """Rows that one token tells apart are told apart; the trained model itself stays as it was."""
    rows = [Row(f"{word} {i}", None, word, group=str(i)) for i in range(60) for word in ("Ada", "Grace")]
    trained = detection.begun(setting(tokens, 1), detection.HIDDEN, 2, 0).model
    copy = lambda model: {name: value.clone() for name, value in model.state_dict().items()}
    before, first = copy(trained), {}
    monkeypatch.setattr(detection, "learned", lambda made: first.update(copy(made.model.model)) or learned(made))
    assert detection.accuracy(setting(tokens, 0.5), trained, rows, 0) == 1.0
    assert first and all(torch.equal(value, before[name]) for name, value in first.items())
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_rules_find_what_a_text_was_spoilt_with(tokens, monkeypatch):
    """Pages of a grammar are much alike, so that only here they are not compared by what is nearly the same."""
    monkeypatch.setattr(clean_text, "RULES", replace(clean_text.RULES, without=(*clean_text.PROSE, "near")))
    tokenizer = load_tokenizer(tokens.tokenizer_file)
    documents = lines_of(tokens.train[:4000], tokenizer)
    pages = [page for lines in documents for page in cut(lines)]
    noisy = spoilt(pages)
    assert len(noisy) == len(pages) + -(-len(pages) // AGAIN)
    assert all(page.startswith(ABOVE[0]) and page.endswith(BELOW[-1]) for page in noisy)
    # of what repeats the first stays, but for the lines that fall under a rule
    once = [line for line in (*ABOVE, *BELOW) if not any(word in line for word in ("JavaScript", "cookies", "terms"))]
    left = cleaned(noisy)
    assert left[0] == "\n".join((*ABOVE, pages[0], *once[len(ABOVE) :])) and left[1:] == pages[1:]
    decoded = lines_of(encoded(pages, tokenizer), tokenizer)
    assert ["\n".join(lines) for lines in decoded] == pages


def test_clean_text_is_beside_noisy_text(tokens):
    finding = found(tokens, "clean-text", 0.02)
    clean, noisy, again = (losses[0] for losses in finding.values["losses"].values())
    assert [claim.holds for claim in finding.claims] == [
        clean < noisy, again < noisy, clean < noisy and again - clean <= (noisy - clean) / 2,
    ]  # fmt: skip
    sizes = [int(row[2].replace(",", "")) for row in finding.rows]
    assert max(sizes[0], sizes[2]) < sizes[1]


# ---------------------------------------------------------------------------------------------------------------------
# What is said


def test_names_are_known_before_torch_is():
    assert set(choices("experiment")) == set(EXPERIMENTS)


def test_seeds_are_compared_as_they_lie():
    assert clearly_below([1.0, 2.0], [2.1, 3.0]) and not clearly_below([1.0, 2.2], [2.1, 3.0])
    assert lower_in_mean([1.0, 3.0], [2.0, 2.0]) and not lower_in_mean([1.0, 3.1], [2.0, 2.0])
    assert spread([1.0, 2.0]) == "1.500 ± 0.707" and spread([1.0]) == "1.000"
    assert spread([1.0, math.inf]) == "diverged in 1 of 2"


def test_a_run_that_diverges_is_reported(tokens):
    run = learned(learner(setting(tokens, 1), 12, 0, lr=1e30, clip=0.0, warmup=0.0, optimizer="sgd"))
    assert run.held_out == math.inf and len(run.losses) < 12


def test_the_command_writes_figure_and_report(tokens, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproducing, "_tokens", lambda say: tokens)
    for name in EXPERIMENTS.keys() - {"albert-sizes", "rope-decay"}:
        monkeypatch.delitem(EXPERIMENTS, name)
    assert cli.main(["reproduce", "--all", "--out", str(tmp_path / "out"), "--seeds", "2"]) == 0
    out, report = capsys.readouterr().out, (tmp_path / "out" / "report.md").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"albert-sizes.png", "rope-decay.png", "report.md"}
    for name, experiment in EXPERIMENTS.items():
        finding = experiment().run(setting(tokens, 1))
        assert f"## {name}" in report and experiment.limits in report and f"({name}.png)" in report
        for words, holds in finding.claims:
            assert f"* {words} **{'Holds' if holds else 'Does not hold here'}.**" in report
            assert f"{'holds' if holds else 'does not':<8} {words}" in out
        for row in finding.rows:
            assert f"| {' | '.join(row)} |" in report
    assert Claim("", True).holds


@pytest.mark.parametrize("argv, words", (
    (["warmpu"], "did you mean warmup?"),
    (["warmup", "--seeds", "0"], "--seeds is 0; it must be at least 1"),
    (["warmup", "--effort", "0"], "--effort is 0; it must be a finite number above 0"),
))  # fmt: skip
def test_what_no_experiment_can_be_is_refused(capsys, argv, words):
    assert words in fail(capsys, "reproduce", *argv)
