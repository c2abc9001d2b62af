"""Who competes in AdamW: one step, bare or with all that a mixed-precision training loop does around it.

    bare     fastlm.optim.AdamW                                          torch.optim.AdamW(fused=True)
    chain    fastlm.amp.GradScaler + fastlm.optim.AdamW(max_grad_norm)   unscale_ + clip_grad_norm_ + the same

By ideal bytes a bare fp32 step moves 28 per parameter (reads p, g, m, v, writes p, m, v), and a chain 4 more for the
norm.
"""

from collections.abc import Callable

import torch
from shapes import Shapes, elements
from timing import compare
from torch import Tensor, nn

from fastlm import amp, optim

BYTES = {"bare": 28, "chain": 32}  # per parameter
LR, MAX_NORM = 1e-3, 1.0
COLD = 2**28  # bytes: more than four second-level caches of any GPU served


def make_params(shapes: Shapes, device: torch.device, seed: int, scale: float) -> list[Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=g, device=device)
    params = [nn.Parameter(0.02 * draw(shape)) for shape in shapes]
    for p in params:
        p.grad = scale * draw(p.shape)
    return params


def make_step(who: str, kind: str, params: list[Tensor], scale: float) -> Callable[[], None]:
    """One training step's worth of optimizer, after the gradients are there. Nothing in either waits for the device."""
    device = params[0].device.type
    if who == "fastlm":
        opt, make_scaler = (
            optim.AdamW(params, lr=LR, max_grad_norm=MAX_NORM if kind == "chain" else None),
            amp.GradScaler,
        )
    else:
        opt, make_scaler = (
            torch.optim.AdamW(params, lr=LR, fused=True, capturable=device == "cuda"),
            torch.amp.GradScaler,
        )
    if kind == "bare":
        return opt.step
    scaler = make_scaler(device, init_scale=scale, growth_interval=2**30)
    scaler.scale(torch.zeros((), device=device))  # makes the scale's tensor, as the first loss does

    def step() -> None:
        if who != "fastlm":
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(params, MAX_NORM)
        scaler.step(opt)
        scaler.update()

    return step


@torch.no_grad()
def check(shapes: Shapes, kind: str, device: torch.device) -> float:
    """‖ours - torch's‖ / ‖torch's change‖ after two steps from the same start. Raises AssertionError above 1e-4."""
    scale = 1024.0 if kind == "chain" else 1.0
    start, *ends = (make_params(shapes, device, 0, scale) for _ in range(3))
    for who, params in zip(("fastlm", "torch"), ends, strict=True):
        step = make_step(who, kind, params, scale)
        for _ in range(2):
            for p, p_start in zip(params, start, strict=True):
                p.grad.copy_(p_start.grad)  # torch unscales and clips in place
            step()
    far, moved = (
        sum((a - b).double().square().sum() for a, b in zip(x, y, strict=True)).sqrt()
        for x, y in ((ends[0], ends[1]), (start, ends[1]))
    )
    error = (far / moved).item()
    assert error <= 1e-4, f"AdamW {kind}: fastlm and torch differ by {error:.1e} of the change after two steps"
    return error


def buffers(shapes: Shapes, device: torch.device) -> range:
    """Seeds of as many copies of the parameters as keep a GPU from finding them in its cache."""
    return range(max(1, min(4, COLD // (16 * elements(shapes)))) if device.type == "cuda" else 1)


def contestants(shapes: Shapes, kind: str, device: torch.device) -> dict[str, Callable[[], list[Callable[[], None]]]]:
    """For timing.compare; steps over separate buffers. The scale is 1: torch divides gradients in place, again at every
    step.
    """
    make = lambda who: [
        make_step(who, kind, make_params(shapes, device, seed, 1.0), 1.0) for seed in buffers(shapes, device)
    ]
    return {"fastlm": lambda: make("fastlm"), "torch fused": lambda: make("torch")}


def measure(name: str, shapes: Shapes, kind: str, clock: str, device: torch.device, copy: float, **limits) -> dict:
    """One row of results. copy: the machine's own copy rate in bytes per second."""
    facts = {
        "kind": "adamw",
        "shapes": name,
        "step": kind,
        "tensors": len(shapes),
        "bytes": BYTES[kind] * elements(shapes),
        "copy": copy,
    }
    return compare(contestants(shapes, kind, device), clock, **limits).row(**facts)
