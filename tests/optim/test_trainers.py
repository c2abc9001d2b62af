"""fastlm's optimizers inside other people's trainers, schedules, hooks and torch.compile: the same losses as the
optimizers they replace.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch
from formulas import KINDS
from torch import nn

from fastlm import optim
from fastlm.amp import GradScaler

ADAMW = next(choice for choice in KINDS if choice.optimizer == "adamw")
EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "huggingface_trainer": ("transformers", "accelerate"),
    "lightning_module": ("lightning",),
    "plain_amp_loop": ("transformers",),
}


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of trainers and compilers, about themselves


def example(name: str) -> dict:
    """What an example's file defines."""
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install {package}")
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def replaced(optimizer: str):
    if optimizer == "adamw":
        return lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1)
    import transformers

    return lambda params: transformers.optimization.Adafactor(
        params, lr=3e-3, scale_parameter=False, relative_step=False
    )


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
@pytest.mark.parametrize("name", NEEDS)
def test_loss_curves_equal_those_of_the_optimizer_replaced(name, optimizer):
    here = example(name)
    ours = here["train"](here["OPTIMIZERS"][optimizer])
    more = dict(Scaler=torch.amp.GradScaler) if name == "plain_amp_loop" else {}
    theirs = here["train"](replaced(optimizer), clip=here["CLIP"], **more)
    assert len(ours) == 20 and ours[-1] < 0.8 * ours[0]
    # weights that differ in the last bit of fp32 may be rounded to different fp16
    rtol = 1e-4 if name == "plain_amp_loop" else 1e-5
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=rtol, atol=0)


SCALERS = {"torch": torch.amp.GradScaler, "fastlm": GradScaler}


@pytest.mark.parametrize("precision", ["bf16", *SCALERS])
def test_lightning_clips_in_mixed_precision(precision):
    """In bf16, where there is no scaler, and in fp16 with torch's and fastlm's: our optimizer as torch's, whether
    Lightning clips or the optimizer does.
    """
    train = example("lightning_module")["train"]
    from lightning.pytorch.plugins.precision import MixedPrecision

    def losses(make, clip=None, **options):
        scaler = lambda: SCALERS[precision]("cpu", init_scale=2.0**10)
        mixed = dict(precision="bf16-mixed") if precision == "bf16" else None
        mixed = mixed or dict(plugins=MixedPrecision("16-mixed", "cpu", scaler()))
        return torch.tensor(train(lambda params: make(params, lr=3e-3, **options), steps=8, clip=clip, **mixed))

    theirs = losses(torch.optim.AdamW, clip=0.1)
    torch.testing.assert_close(losses(optim.AdamW, clip=0.1), theirs, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses(optim.AdamW, max_grad_norm=0.1), theirs, rtol=1e-4, atol=0)


def test_an_example_runs_as_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plain_amp_loop.py", "adamw"])
    runpy.run_path(str(EXAMPLES / "plain_amp_loop.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("loss 3.")


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_names_the_optimizers_it_has(name, monkeypatch):
    example(name)
    monkeypatch.setattr(sys, "argv", [name, "lion"])
    with pytest.raises(SystemExit, match="optimizer 'lion' is unknown; choose from adafactor, adamw"):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile, schedules, hooks

SCHEDULES = {
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "one_cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
    "chain": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
        ],
        [3],
    ),
}


def run(choice, compile=None, schedule=None, steps=12, **more):
    """Parameters after training steps of which all, the optimizer's included, are one function."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = optim.OPTIMIZERS[choice.optimizer](net.parameters(), **choice.options | more, max_grad_norm=0.5)
    seen = []
    if schedule is None:  # dynamo compiles again for each length of a list that a hook grows
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    schedule = None if schedule is None else SCHEDULES[schedule](optimizer)

    def step(x):
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step = torch.compile(step, backend=compile) if compile else step
    for i in range(steps):
        step(torch.randn(4, 6, generator=torch.Generator().manual_seed(i)))
        if schedule is not None:
            schedule.step()
    assert schedule is not None or seen == ["before", "after"] * steps
    return [p.detach() for p in net.parameters()]


def assert_close(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend, choices", [("eager", KINDS), ("inductor", KINDS[-2:])], ids=["eager", "inductor"])
def test_a_compiled_training_step_equals_the_plain_one(backend, choices):
    for choice in choices:
        torch._dynamo.reset()
        assert_close(run(choice, backend, steps=4), run(choice, steps=4))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_compiled_step_follows_a_schedule_without_compiling_again(schedule):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = run(ADAMW, "eager", schedule)
    assert_close(compiled, run(ADAMW, schedule=schedule))


@pytest.mark.parametrize("schedule", ["lambda", "chain"])
def test_schedules_that_write_into_a_tensor(schedule):
    for choice in KINDS:
        if isinstance(choice.options.get("lr"), float):
            assert_close(
                run(choice, schedule=schedule, lr=torch.tensor(choice.options["lr"])), run(choice, schedule=schedule)
            )


@pytest.mark.parametrize("options", [{}, dict(warmup_init=True), dict(scale_parameter=False)], ids=str)
def test_hugging_faces_schedule_of_adafactor(options):
    """It reports each step's size, and writes it into the groups, where a relative step takes no notice of it."""
    import transformers

    ends = []
    for make in (optim.Adafactor, transformers.optimization.Adafactor):
        torch.manual_seed(0)
        p, reported = nn.Parameter(torch.randn(6, 5)), []
        optimizer = make([p], **options)
        schedule = transformers.optimization.AdafactorSchedule(optimizer)
        for _ in range(5):
            p.grad = torch.randn(6, 5)
            optimizer.step()
            schedule.step()
            reported.append(float(schedule.get_last_lr()[0]))
        ends.append((p.detach(), torch.tensor(reported)))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-6, atol=1e-6)
    # theirs is of the parameter's size before the step
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=0.02, atol=0)
    again = optim.Adafactor([p], **options)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["relative_step"]


def test_an_lr_on_the_device_is_refused():
    p = nn.Parameter(torch.zeros(2))
    optimizer = optim.AdamW([p], lr=1e-3)
    p.grad, optimizer.param_groups[0]["lr"] = torch.ones(2), torch.zeros((), device="meta")
    with pytest.raises(ValueError, match="reading it would stall the step"):
        optimizer.step()


def test_a_subclass_without_a_name_is_no_new_optimizer():
    """Lightning wraps every optimizer in one."""
    before = dict(optim.OPTIMIZERS)
    type("Wrapped", (optim.AdamW,), {})
    assert before == optim.OPTIMIZERS
