"""Learning-rate schedules: the values of their papers and of the libraries that people know them from."""

import itertools
import math

import pytest
import torch
import transformers
from runs import config, fail

from fastlm.trainer.options.config import Config
from fastlm.trainer.schedule import SCHEDULES, Moment, defaults

STEPS, WARMUP = 60, 12


def factors(name: str, steps: int = STEPS, warmup: int = WARMUP, floor: float = 0.0, **options) -> list[float]:
    return [SCHEDULES[name](Moment(s, s + 1, steps, warmup, floor), **options) for s in range(steps)]


def scheduled(make) -> list[float]:
    """The rates of a scheduler of torch's over a peak rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(STEPS):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step(), scheduler.step()
    return rates


def of_transformers(make, **options):
    """Their climb is ours one update later; what follows it is the same."""
    theirs = scheduled(lambda optimizer: make(optimizer, num_warmup_steps=WARMUP, **options))
    return [*theirs[1:WARMUP], 1.0, *theirs[WARMUP:]]


TOTAL = dict(num_training_steps=STEPS)
THEIRS = {
    "constant": (transformers.get_constant_schedule_with_warmup, {}, {}),
    "linear": (transformers.get_linear_schedule_with_warmup, TOTAL, {}),
    "cosine": (transformers.get_cosine_schedule_with_warmup, TOTAL, {}),
    "cosine to a floor": (
        transformers.get_cosine_with_min_lr_schedule_with_warmup,
        TOTAL | dict(min_lr_rate=0.1),
        dict(floor=0.1),
    ),
    "polynomial": (
        transformers.get_polynomial_decay_schedule_with_warmup,
        TOTAL | dict(power=3.0, lr_end=0.05),
        dict(power=3.0, floor=0.05),
    ),
    "cosine-restarts": (
        transformers.get_cosine_with_hard_restarts_schedule_with_warmup,
        TOTAL | dict(num_cycles=3),
        dict(cycles=3),
    ),
    "inverse-sqrt": (transformers.get_inverse_sqrt_schedule, {}, {}),
    "inverse-sqrt of a timescale": (
        transformers.get_inverse_sqrt_schedule, dict(timescale=40), dict(timescale=40.0)
    ),
    "wsd": (transformers.get_wsd_schedule, TOTAL | dict(num_decay_steps=15, decay_type="linear"), dict(decay=0.25)),
    "wsd by a root": (
        transformers.get_wsd_schedule,
        TOTAL | dict(num_decay_steps=15, decay_type="1-sqrt"),
        dict(decay=0.25, shape="sqrt"),
    ),
    "wsd by a cosine": (
        transformers.get_wsd_schedule,
        TOTAL | dict(num_decay_steps=15, decay_type="cosine"),
        dict(decay=0.25, shape="cosine"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", THEIRS)
def test_after_the_climb_it_is_transformers(case):
    make, theirs, ours = THEIRS[case]
    assert factors(case.split(" ")[0], **ours) == pytest.approx(of_transformers(make, **theirs), abs=1e-12)


def test_exponential_and_step_are_torchs():
    optim = torch.optim.lr_scheduler
    theirs = scheduled(lambda optimizer: optim.ExponentialLR(optimizer, gamma=0.02 ** (1 / STEPS)))
    assert factors("exponential", warmup=0, end=0.02) == pytest.approx(theirs)
    theirs = scheduled(lambda optimizer: optim.StepLR(optimizer, step_size=15, gamma=0.3))
    assert factors("step", warmup=0, every=0.25, factor=0.3) == pytest.approx(theirs)


def test_noam_is_its_paper():
    """lr = dim^-½ · min(n^-½, n · warmup^-1.5), over its peak."""
    paper = [min(n**-0.5, n * WARMUP**-1.5) / WARMUP**-0.5 for n in range(1, STEPS + 1)]
    assert factors("noam") == pytest.approx(paper)


def test_t5_is_level_and_then_an_inverse_root():
    assert factors("t5") == pytest.approx([math.sqrt(WARMUP / max(n, WARMUP)) for n in range(STEPS)])


def test_bert_and_electra_decay_from_the_first_update():
    """Their code: one overrides a line from update 0 on by the climb, the other multiplies both."""
    line = [1 - n / STEPS for n in range(STEPS)]
    climb = [min(1.0, (n + 1) / WARMUP) for n in range(STEPS)]
    assert factors("bert") == pytest.approx([*climb[:WARMUP], *line[WARMUP:]])
    assert factors("electra") == pytest.approx([a * b for a, b in zip(climb, line, strict=True)])


def test_slanted_triangular_is_its_paper():
    ratio, cut = 32, WARMUP
    p = [t / cut if t < cut else 1 - (t - cut) / (cut * (STEPS / cut - 1)) for t in range(STEPS)]
    paper = [(1 + x * (ratio - 1)) / ratio for x in p]
    assert factors("slanted-triangular", floor=1 / ratio) == pytest.approx(paper)


def test_gpt3s_cosine_ends_before_the_run():
    """Warmup over 375 million tokens, the cosine to 10 % by 260 of 300 billion."""
    at = lambda billions: SCHEDULES["cosine"](Moment(billions, billions, 300, 0.375, 0.1), until=260 / 300)
    assert [at(x) for x in (0.1, 0.375, 260, 280, 300)] == pytest.approx([0.1 / 0.375, 1.0, 0.1, 0.1, 0.1])
    middle = (0.375 + 260) / 2
    assert at(middle) == pytest.approx(0.55)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("steps, warmup", ((1, 0), (1, 1), (5, 5), (100, 7)))
def test_every_schedule_stays_between_floor_and_peak(name, steps, warmup):
    found = factors(name, steps, warmup, 0.1)
    assert all(0 < f <= 1 for f in found) and all(f >= 0.1 for f in found[warmup:])
    if name != "cosine-restarts":
        assert found[warmup:] == sorted(found[warmup:], reverse=True)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_it_does_not_matter_what_is_counted(name):
    """Updates, or tokens of which each update has a thousand."""
    in_tokens = [SCHEDULES[name](Moment(1000.0 * s, 1000.0 * s + 1000, 6e4, 12e3, 0.1)) for s in range(STEPS)]
    assert factors(name, floor=0.1) == pytest.approx(in_tokens, abs=1e-3)


@pytest.mark.parametrize("argv, words", (
    (["cosine", "power=2"], "--schedule-options power is unknown of --schedule cosine; choose from until"),
    (["constant", "until=1"], "until is unknown of --schedule constant, which has no options"),
    (["wsd", "decay"], "--schedule-options decay is no NAME=VALUE"),
    (["wsd", "decay=many"], "--schedule-options decay many is not a number"),
    (["wsd", "decay=2"], "--schedule wsd --schedule-options decay=2: decay is 2.0; give a share, from 0 to 1"),
    (["wsd", "shape=round"], "shape is 'round'; choose from 'linear', 'sqrt', 'cosine'"),
    (["cosine-restarts", "cycles=1.5"], "cycles 1.5 is not a whole number"),
))  # fmt: skip
def test_options_that_do_not_fit_are_refused(capsys, argv, words):
    name, *options = argv
    assert words in fail(capsys, "pretrain", "--schedule", name, "--schedule-options", *options)


def test_every_option_has_a_default_and_a_value_is_read_as_its_kind(text):
    assert all(value is not None for name in SCHEDULES for value in defaults(name).values())
    found = config(text, schedule="wsd", schedule_options=("decay=1", "shape=sqrt"))
    assert found.curve()(Moment(25, 26, 100, 0, 0.0)) == pytest.approx(0.5)
    assert Config.from_json(found.to_json()) == found


def test_curves_differ():
    """No two names are one curve."""
    curves = {name: factors(name, floor=0.1) for name in SCHEDULES}
    assert all(curves[a] != pytest.approx(curves[b], abs=1e-3) for a, b in itertools.combinations(curves, 2))
