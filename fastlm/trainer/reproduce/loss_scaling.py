"""Gradients that fp16 cannot hold, and what multiplying the loss does for them."""

import torch
from torch import Tensor

from fastlm.amp import GradScaler
from fastlm.trainer.evaluation import autocast
from fastlm.trainer.reproduce.experiment import Claim, Experiment, Finding, Setting
from fastlm.trainer.reproduce.learning import draw_curves, learned, learner, losses_of, spread
from fastlm.trainer.step import Trainer

STEPS = 100
SCALE = 2.0**16  # with which torch's scaler begins
LEAST = 2.0**-25  # up to it, rounding to the nearest makes 0; 2⁻²⁴ is the smallest number of fp16


class LossScaling(Experiment, name="loss-scaling"):
    of = "Micikevicius et al. 2018, fig. 3 and sec. 3.2: small gradients become zero in fp16 unless the loss is scaled"
    limits = (
        "Gradients are of a small model's activations over a few hundred tokens; a larger batch makes them smaller, "
        "for each is a share of the mean. Whether training suffers depends on the model: many lose nothing."
    )

    def run(self, setting: Setting) -> Finding:
        steps = setting.steps(STEPS)
        ways = {"fp32": ("fp32", True), "fp16, scaled": ("fp16", True), "fp16, not scaled": ("fp16", False)}
        runs = {name: [] for name in ways}
        lost: dict[str, list[float]] = {name: [] for name in ("fp16, scaled", "fp16, not scaled")}
        for seed in setting.seeds:
            for name, (dtype, scales) in ways.items():
                trainer = learner(setting, steps, seed, dtype=dtype)
                if not scales:
                    trainer.scaler = GradScaler("cpu", enabled=False)
                runs[name].append(learned(trainer))
                setting.say(f"{name}, seed {seed}: {runs[name][-1].held_out:.3f}")
            sizes = activations(runs["fp32"][-1].trainer)
            lost["fp16, not scaled"].append(_lost(sizes))
            lost["fp16, scaled"].append(_lost(sizes * SCALE))
        found = {name: losses_of(several) for name, several in runs.items()}
        rows = [
            (name, f"{spread([100 * x for x in lost[name]], 2)} %" if name in lost else "-", spread(found[name]))
            for name in ways
        ]
        held, bare = max(lost["fp16, scaled"]), min(lost["fp16, not scaled"])
        near = max(abs(a - b) for a, b in zip(found["fp16, scaled"], found["fp32"], strict=True))
        claims = [
            Claim(f"Without scaling, fp16 loses a hundredth or more of the gradients ({bare:.1%}).", bare > 0.01),
            Claim(f"With it, it loses less than a tenth of that ({held:.2%}).", held < bare / 10),
            Claim(f"Scaled fp16 ends within 0.05 nats of fp32 ({near:.3f}).", near < 0.05),
            Claim(
                "Without scaling the held-out loss of every seed is higher than with it.",
                all(a > b for a, b in zip(found["fp16, not scaled"], found["fp16, scaled"], strict=True)),
            ),
        ]
        columns = ("arithmetic", "gradients of activations that become 0", "held-out loss, nats per token")

        def draw(figure) -> None:
            left, right = figure.subplots(1, 2)
            _histogram(left, sizes)
            draw_curves(right, runs)

        return Finding(columns, rows, claims, draw, {"lost": lost, "losses": found})


def activations(trainer: Trainer) -> Tensor:
    """Sizes of the gradients that the outputs of linear layers get in the next update, but for those that are 0."""
    sizes: list[Tensor] = []
    hooks = [
        module.register_full_backward_hook(lambda module, into, of: sizes.append(of[0].detach().abs().flatten()))
        for module in trainer.model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    config, objective = trainer.config, trainer.train
    batch = objective.batch(config.seed, trainer.course.rows_before(trainer.step), config.batch)
    with autocast("fp32", trainer.device):
        objective.means(objective.loss(trainer.model.train(), batch), objective.targets(batch))["loss"].backward()
    for hook in hooks:
        hook.remove()
    found = torch.cat(sizes)
    return found[found > 0]


def _lost(sizes: Tensor) -> float:
    return (sizes <= LEAST).float().mean().item()


def _histogram(axes, sizes: Tensor) -> None:
    axes.hist(sizes.log2().tolist(), bins=60, density=True, color="0.7")
    axes.axvline(-24, color="C3", label="2⁻²⁴, the least of fp16")
    axes.axvline(-40, color="C0", linestyle="--", label="2⁻⁴⁰, the least that 2¹⁶ saves")
    axes.set(xlabel="log₂ of a gradient's size", ylabel="share")
    axes.legend()
