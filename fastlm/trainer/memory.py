"""What a run will take of memory, reckoned before anything is made, so that one that does not fit is refused in words
instead of being killed without one.
"""

import os
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from fastlm.models import ModelConfig, Remembering
from fastlm.objectives import Batch, Objective
from fastlm.optim import memory_table
from fastlm.trainer.data.tokenizer import most_ids
from fastlm.trainer.evaluation import autocast
from fastlm.trainer.options.config import Config
from fastlm.trainer.options.training import Training
from fastlm.trainer.words import Refusal, size

# Linux keeps a container's limit, what it uses, and how much of that are files that may be dropped; versions 2 and 1
CGROUPS = [
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
]


@dataclass(frozen=True)
class Need:
    """Bytes. model: parameters, gradients, the optimizer's states, what --pull draws back to. ids: of all rows of an
    update. rows: activations of a micro-batch's rows, and what is remembered of those before.
    """

    model: int
    ids: int
    rows: int

    @property
    def total(self) -> int:
        return self.model + self.ids + self.rows


def check(config: Config, text_size: int) -> None:
    """Raises Refusal, naming the flags and the cure, for a run over a text of so many bytes that takes more memory than
    there is.
    """
    vocab_size = most_ids(config.vocab, text_size)
    shape = config.sketch(vocab_size)
    if shape.context > 2 * text_size:  # a byte and an <eos> make two ids at most
        cure = "give more text or a smaller --context"
        raise Refusal(f"--context {shape.context} is longer than the text, which has {size(text_size)}; {cure}")
    check_fits(config, vocab_size)


def check_fits(config: Training, vocab_size: int) -> None:
    """Raises Refusal, naming the flags and the cure, for a run that takes more memory than there is."""
    room = available_bytes(config.torch_device())
    try:
        need = reckon(config, vocab_size)
    except RuntimeError:  # a plugin looks at numbers, which a reckoning has not
        return
    if room is not None and need.total > room:
        accumulate = config.accumulate if config.tokens_at_once is None else 1
        one = reckon(replace(config, batch=1, accumulate=accumulate), vocab_size)
        raise Refusal(_cure(config, config.sketch(vocab_size), need, room, one))


def _cure(config: Training, shape: ModelConfig, need: Need, room: int, one: Need) -> str:
    """What takes too much, in words. one: the need of a single row."""
    there = f"and {size(room)} are free"
    if need.model > room and config.shape is not None:
        return f"the model of {config.source} takes {size(need.model)} to train, {there}; give a smaller one"
    if need.model > room:
        flags = f"--dim {shape.dim}, --layers {shape.layers} and --vocab {config.vocab}"
        return f"{flags} make a model that takes {size(need.model)} to train, {there}; give a smaller one of them"
    if need.model + need.ids > room:
        flags = f"--batch {config.batch} times --accumulate {config.accumulate}"
        return f"{flags} are rows whose ids take {size(need.ids)}, {there}; give a smaller one of them"
    context = f"rows of {shape.context} ids" if config.shape is not None else f"of --context {shape.context}"
    said = f"--batch {config.batch}" if config.tokens_at_once is None else f"--max-tokens {config.tokens_at_once} in"
    asked = f"{said} {context} takes {size(need.total)}, {there}"
    at_once = config.rows_at_once(shape.context)
    fitting = int((room - need.model - need.ids) / max(one.rows, need.rows / at_once))
    if fitting < 1:
        cure = "a smaller model" if config.shape is not None else "a smaller --context, --dim or --vocab"
        return f"{asked}; give {cure}"
    if config.tokens_at_once is not None:
        return f"{asked}; give --max-tokens {fitting * shape.context}"
    rows = config.batch * config.accumulate
    return f"{asked}; --batch {fitting} --accumulate {-(-rows // fitting)} makes an update of as many rows"


def reckon(config: Training, vocab_size: int) -> Need:
    """What training takes at its peak, in the backward pass. Nothing is allocated, whatever the size: the tensors are
    fake, and of the layers a few are looked at. Raises RuntimeError for a model that looks at its own numbers.
    """
    shape = config.sketch(vocab_size)
    objective = config.objective_on_rows(shape.context, vocab_size)
    # a rate of hidden tokens may fall or rise
    begin, end = (objective.at(progress).batch(config.seed, 0, 1) for progress in (0.0, 1.0))
    row = max(begin, end, key=lambda batch: sum(ids.numel() for ids in batch.values()))
    with torch.device("meta"):
        # in twos, for a second model may have half as many
        two, four = (_reckon(config, replace(shape, layers=layers), objective, row) for layers in (2, 4))
    more = lambda few, many: few + (shape.layers - 2) * (many - few) // 2
    return Need(more(two.model, four.model), two.ids, more(two.rows, four.rows))


def _reckon(config: Training, shape: ModelConfig, objective: Objective, row: Batch) -> Need:
    """row: a batch of one."""
    kept: dict[int, torch.UntypedStorage] = {}  # what the backward pass will look at

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    model = objective.model(shape)
    at_once = config.rows_at_once(shape.context)
    batch = {name: torch.empty(at_once, *ids.shape[1:], dtype=ids.dtype) for name, ids in row.items()}
    remembered = 0
    if config.remembers(shape):
        model = Remembering(model, model.new_recurrence())
        objective.loss(model, batch)
        held = [x.new_empty(x.shape[0], shape.memory, x.shape[2]) for x in model.recurrence.states]
        model.recurrence.states, remembered = held, config.accumulate * sum(x.nbytes for x in held)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast(config.dtype, torch.device("cpu")):
        objective.loss(model, batch)
    totals = {row.optimizer: row.total for row in memory_table(model)}
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    sizes = [storage.nbytes() for key, storage in kept.items() if key not in parameters]
    ids = config.batch * config.accumulate * sum(x.nbytes for x in batch.values()) // at_once
    # while the gradient of the largest is made, there are two more of its size
    rows = remembered + sum(sizes) + 2 * max(sizes)
    starts = sum(p.nbytes for p in model.parameters()) if config.pull else 0
    trained = totals.get(config.optimizer, max(totals.values()))  # of a plugin's nobody knows
    return Need(trained + starts, ids, rows)


def available_bytes(device: torch.device) -> int | None:
    """Memory that this process may still take on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = [*_meminfo(), *chain.from_iterable(_cgroup(*files) for files in CGROUPS)]
    return min(known, default=None)


def _meminfo() -> list[int]:
    """What Linux says is available, or all there is on other systems."""
    path = Path("/proc/meminfo")
    if path.exists():
        rows = dict(line.split(":") for line in path.read_text().splitlines())
        return [int(rows["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in rows else []
    pages = os.sysconf_names if hasattr(os, "sysconf") else {}  # Windows has neither
    return [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if "SC_PHYS_PAGES" in pages else []


def _cgroup(folder: Path, limit: str, used: str, files: str) -> list[int]:
    try:
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [int(most) - now + int(stat.get(files, 0))] if most.isdigit() else []  # or "max"
