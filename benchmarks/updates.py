"""Who competes in a whole update of a model: forward, cross entropy, backward, unscaling, clipping, AdamW.

    fastlm          ours, whose loss makes no logits; fastlm's GradScaler and AdamW, in one pass over memory
    transformers    the same weights, torch's best of everything: sdpa, GradScaler.unscale_, clip_grad_norm_ over lists,
                    the fused AdamW
    compiled        that with its model in torch.compile

One row of L tokens, in fp32, or with products in bf16 by torch.autocast, whose scaler a CPU needs as little as in fp32:
it is there because the passes that it costs are.

    python benchmarks/updates.py gpt2 512 float32 fastlm     # the memory of one side, in a process of its own
"""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import models
import torch
from machine import peak_growth, resident
from models import OURS, THEIRS
from timing import compare
from torch import Tensor, nn

import fastlm
from fastlm.interop import from_huggingface

MODELS = ("gpt2", "bert", "t5-base")
COMPILED = "compiled"
SIDES = OURS, THEIRS, COMPILED
LR, CLIP = 1e-4, 1.0


def update(name: str, L: int, dtype: torch.dtype, side: str, model: nn.Module) -> Callable[[], Tensor]:
    """What trains the model by one batch, and returns the loss."""
    precision = nullcontext if dtype == torch.float32 else partial(torch.autocast, "cpu", dtype)
    forward = models.loss(name, L, side, torch.compile(model, dynamic=False) if side == COMPILED else model)
    if side == OURS:
        optimizer = fastlm.optim.AdamW(model.parameters(), lr=LR, max_grad_norm=CLIP)
        scaler = fastlm.amp.GradScaler("cpu")
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
        scaler = torch.amp.GradScaler("cpu")

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with precision():
            loss = forward()
        scaler.scale(loss).backward()
        if side != OURS:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return run


def measure(name: str, L: int, dtype: torch.dtype, clock: str = "clock", smoke: bool = False, **limits) -> dict:
    """One row of results. Losses are compared first, over some updates."""
    other = models.theirs(name, smoke=smoke)
    of = {OURS: from_huggingface(other).train(), THEIRS: other, COMPILED: copy.deepcopy(other)}
    runs = {side: update(name, L, dtype, side, model) for side, model in of.items()}
    losses = {side: torch.stack([run() for _ in range(3)]) for side, run in runs.items()}
    for side in (THEIRS, COMPILED):
        rtol = 1e-3 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(losses[OURS], losses[side], rtol=rtol, atol=0, check_dtype=False)
    row = compare({side: lambda run=run: [run] for side, run in runs.items()}, clock, **limits)
    del other, of, runs
    peak = {side: memory(name, L, dtype, side) for side in SIDES} if not smoke else {}
    kind = str(dtype).removeprefix("torch.")
    return row.row(kind="models", step="train", model=f"{name}, whole update, {kind}", B=1, L=L, peak=peak)


def memory(name: str, L: int, dtype: torch.dtype, side: str) -> dict[str, int | None]:
    """Bytes: the "peak" of a process that makes a model and updates it twice, and by how much it "grows" in the second
    update, beyond weights and the optimizer's states.
    """
    command = [sys.executable, __file__, name, str(L), str(dtype).removeprefix("torch."), side]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    name, L, dtype, side = sys.argv[1:]
    model = models.fresh(THEIRS if side == COMPILED else side, models.described(name))
    run = update(name, int(L), getattr(torch, dtype), side, model)
    run()
    model.zero_grad(set_to_none=True)
    print(json.dumps({"grows": peak_growth(run), "peak": resident("VmHWM")}))


if __name__ == "__main__":
    main()
