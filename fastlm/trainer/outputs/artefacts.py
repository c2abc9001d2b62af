"""The files a finished run leaves: weights that open elsewhere, loss.png, sample.txt, and report.md as the last."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from fastlm.interop import head_to_huggingface, model_type, to_huggingface
from fastlm.interop.heads import architecture_of
from fastlm.models import Transformer
from fastlm.models.heads import Headed, RowClassifier
from fastlm.objectives import Objective
from fastlm.optim import memory_table
from fastlm.trainer.data.tokenizer import EOS, PAD
from fastlm.trainer.disk import write_file
from fastlm.trainer.material import Material
from fastlm.trainer.outputs.metrics import Metrics
from fastlm.trainer.patience import Patience
from fastlm.trainer.plan import Plan
from fastlm.trainer.step import Trainer
from fastlm.trainer.words import clock, size, utf8

BEST = "best"  # the folder of the weights with the least held-out loss
FILES = "loss.png metrics.jsonl model.safetensors config.json tokenizer.json sample.txt report.md state/"


def write_weights(model: Transformer | Headed, objective: Objective, folder: Path) -> None:
    """config.json, model.safetensors, and tokenizer_config.json, which transformers' AutoTokenizer wants beside
    tokenizer.json.
    """
    tokens = {"eos_token_id": EOS, "pad_token_id": PAD}
    if model.config.kind == "encoder-decoder":
        tokens |= {"decoder_start_token_id": PAD, "forced_eos_token_id": None}  # BART's config has its own for both
    write = to_huggingface if isinstance(model, Transformer) else head_to_huggingface
    write(model, folder, **tokens, **objective.entries())
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": objective.context,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    write_file(folder / "tokenizer_config.json", json.dumps(values, indent=1))


def write_best(model: Transformer | Headed, objective: Objective, tokenizer_file: Path, folder: Path) -> None:
    """What of a run's folder opens elsewhere, in best/."""
    best = folder / BEST
    best.mkdir(exist_ok=True)
    shutil.copyfile(tokenizer_file, best / "tokenizer.json")
    write_weights(model, objective, best)


def opened_by(model: Transformer | Headed, folder: Path) -> str:
    """The call that opens the weights: fastlm's own where transformers has no such model."""
    shape = model.config
    head = {"decoder": "CausalLM", "encoder": "MaskedLM", "encoder-decoder": "Seq2SeqLM"}[shape.kind]
    head = "PreTraining" if shape.head == "detection" or shape.pair_labels else head
    ours, known = "fastlm.interop.from_huggingface", model_type(shape) != "fastlm"
    if not isinstance(model, Transformer):
        head = "SequenceClassification" if isinstance(model, RowClassifier) else "QuestionAnswering"
        ours, known = "fastlm.interop.head_from_huggingface", architecture_of(model) is not None
    opener = f"transformers.AutoModelFor{head}.from_pretrained" if known else ours
    return f"{opener}({json.dumps(str(folder), ensure_ascii=False)})"


def write_samples(metrics: Metrics, path: Path) -> None:
    """sample.txt: every text the model made on the way, with the step."""
    write_file(path, "\n".join(f"── step {step} ──\n{text}\n" for step, text in metrics.series("step", "sample")))


def write_plot(metrics: Metrics, material: Material, objective: Objective, path: Path) -> None:
    """loss.png: the loss that is compared against tokens with reference lines, and below it speed and learning rate."""
    from matplotlib.figure import Figure  # without pyplot, nothing looks for a display

    term = objective.compared
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    seen, losses, rates, speeds = map(
        list, zip(*metrics.series("tokens", term, "lr", "tokens_per_second"), strict=True)
    )
    width = max(1, len(losses) // 50)
    above.plot(seen, losses, color="0.85", linewidth=0.7)
    above.plot(seen, smooth(losses, width), color="C0", label="train")
    above.plot(
        *zip(*metrics.series("tokens", f"held_out_{term}"), strict=True),
        "o-",
        color="C1",
        markersize=4,
        label="held out",
    )
    for i, (name, loss) in enumerate(material.references().items()):
        above.axhline(loss, color=f"C{i + 2}", linestyle="--", linewidth=1, label=f"{name} {loss:.2f}")
    above.set_ylabel(f"{objective.unit} per {objective.per}")
    above.legend()
    below.plot(seen, smooth(speeds, width), color="C0")
    below.set(xlabel="tokens", ylabel="tokens per second", ylim=(0, None))
    right = below.twinx()
    right.plot(seen, rates, color="C3", linewidth=1)
    right.set_ylabel("learning rate", color="C3")
    made = path.with_name(f".tmp-{path.name}")
    figure.savefig(made, dpi=120)
    made.replace(path)


def write_report(
    plan: Plan,
    material: Material,
    trainer: Trainer,
    exported: Transformer | Headed,
    metrics: Metrics,
    patience: Patience,
    path: Path,
) -> None:
    """report.md: a table of results, and the tables one needs to get them again."""
    bits = metrics.last.get("held_out_bits_per_byte")
    objective = trainer.held_out
    unit = f"{objective.unit} per {objective.per}"
    result = {
        "objective": objective.name,
        "held-out loss": f"{metrics.last['held_out_loss']:.4f} {objective.unit}",
        f"held-out {objective.compared}": f"{metrics.last[f'held_out_{objective.compared}']:.4f} {unit}",
        **{f"held-out {name}": objective.worded(name, metrics.last[f"held_out_{name}"]) for name in objective.shares},
        "held-out bits per byte": None if bits is None else f"{bits:.4f}",
        **material.result(),
        "best held-out loss": patience.loss and f"{patience.loss:.4f} at step {patience.step:,}, in {BEST}/",
        "steps": f"{trainer.step:,}" + f" of {plan.steps:,}, ended by --patience" * patience.over,
        "clipped updates": None if metrics.clipped is None else f"{metrics.clipped:.1%}",
        "tokens": f"{metrics.last['tokens']:,}",
        "time": clock(metrics.last["seconds"]),
        "weights open with": f"`{opened_by(exported, path.parent)}`",
    }
    model = {"parameters": f"{exported.parameter_count():,}"} | asdict(exported.config)
    table = memory_table(trainer.model, chosen=trainer.optimizer)
    memory = {
        f"{row.optimizer}{', chosen' * row.chosen}": f"{size(row.total)}, of which states {size(row.states)}"
        for row in table
    }
    environment = {"fastlm": plan.fastlm, "command": f"`{plan.command}`", **plan.environment, "threads": plan.threads}
    sections = {
        "Result": result,
        "Data": material.described(),
        "Model": model,
        "Memory without activations": memory,
        "Settings": plan.config.to_json(),
    }
    sections["Environment"] = environment
    tables = "\n".join(_table(*section) for section in sections.items())
    write_file(path, utf8(f"# fastlm run\n\n{tables}\n![loss](loss.png)\n"))


def _table(heading: str, rows: dict) -> str:
    rows = {name: str(value).replace("|", "\\|") for name, value in rows.items() if value is not None}
    lines = [f"| {name} | {value} |\n" for name, value in rows.items()]
    return f"## {heading}\n\n| | |\n|---|---|\n{''.join(lines)}"


def smooth(values: list[float], width: int) -> list[float]:
    """Exponential moving average over about `width` values, corrected for its start."""
    keep, mean, out = 1 - 1 / width, 0.0, []
    for i, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep**i))
    return out
