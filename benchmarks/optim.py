"""Who competes beside fp32 AdamW (adamw.py): Adafactor, LAMB, SGD, and AdamW over bf16 parameters. One step after the
gradients are there.

    adafactor   fastlm.optim.Adafactor               torch's and transformers' Adafactor; torch's fused AdamW
    lamb        fastlm.optim.LAMB                    the same formula in torch._foreach_* calls
    sgd         fastlm.optim.SGD(momentum)           torch.optim.SGD(fused=True)
    bf16        AdamW(state_dtype="bf16")            torch.optim.AdamW(fused=True) over bf16 parameters
    libraries   AdamW, fp32 parameters               of torch (fused), DeepSpeed, bitsandbytes, torchao; 8-bit states
    masters     AdamW(master="fp32", max_grad_norm)  clip_grad_norm_, to fp32, fused step of fp32 copies, and back

Bytes a parameter are the ideal ones: Adafactor 12 (reads g, p; writes p; the second pass from the cache), LAMB 28, SGD
20, bf16 14, fp32 AdamW 28, masters 32 with the norm's read. A library that is not installed is left out, with the
reason.
"""

from collections.abc import Callable

import torch
from adamw import buffers, make_params
from shapes import Shapes, elements
from timing import compare
from torch import Tensor, nn

from fastlm import optim, use_backend

BYTES = {"adafactor": 12, "lamb": 28, "sgd": 20, "bf16": 14, "libraries": 28, "masters": 32}
BF16 = torch.bfloat16
LR, MAX_NORM, DECAY = 1e-3, 1.0, 0.01

Step = Callable[[], None]


def cast(params: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    out = [nn.Parameter(p.detach().to(dtype, copy=True)) for p in params]
    for p, q in zip(params, out, strict=True):
        q.grad = p.grad.to(dtype, copy=True)
    return out


def foreach_lamb(params: list[Tensor], betas=(0.9, 0.999), eps=1e-6) -> Step:
    """LAMB as one would write it for speed in PyTorch: every line one foreach call, no host sync."""
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    t = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal t
        t += 1
        grads = [p.grad for p in params]
        torch._foreach_lerp_(m, grads, 1 - betas[0])
        torch._foreach_mul_(v, betas[1])
        torch._foreach_addcmul_(v, grads, grads, 1 - betas[1])
        r = torch._foreach_sqrt(v)
        torch._foreach_div_(r, (1 - betas[1] ** t) ** 0.5)
        torch._foreach_add_(r, eps)
        r = torch._foreach_div(m, r)
        torch._foreach_div_(r, 1 - betas[0] ** t)
        torch._foreach_add_(r, params, alpha=DECAY)
        ratios = [a / b for a, b in zip(torch._foreach_norm(params), torch._foreach_norm(r), strict=True)]
        torch._foreach_mul_(r, ratios)
        torch._foreach_add_(params, r, alpha=-LR)

    return step


def torch_adamw(params: list[Tensor]) -> Step:
    return torch.optim.AdamW(params, lr=LR, fused=True, capturable=params[0].is_cuda).step


def torch_masters(params: list[Tensor]) -> Step:
    masters = [nn.Parameter(p.detach().float()) for p in params]
    for p in masters:
        p.grad = torch.empty_like(p)
    fused = torch_adamw(masters)

    @torch.no_grad()
    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        torch._foreach_copy_([p.grad for p in masters], [p.grad for p in params])
        fused()
        torch._foreach_copy_(params, masters)

    return step


def hugging_face(params: list[Tensor]) -> Step:
    from transformers.optimization import Adafactor

    return Adafactor(params).step


def deepspeed(params: list[Tensor]) -> Step:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, lr=LR, weight_decay=DECAY).step


def bitsandbytes(name: str) -> Callable[[list[Tensor]], Step]:
    def make(params: list[Tensor]) -> Step:
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(params, lr=LR, weight_decay=DECAY).step

    return make


def torchao(name: str) -> Callable[[list[Tensor]], Step]:
    def make(params: list[Tensor]) -> Step:
        import torchao.optim

        return getattr(torchao.optim, name)(params, lr=LR, weight_decay=DECAY).step

    return make


# kind → (dtype, {who: parameters → step}); ours first, then the one whose numbers it is checked by
STEPS: dict[str, tuple[torch.dtype, dict[str, Callable[[list[Tensor]], Step]]]] = {
    "adafactor": (
        torch.float32,
        {
            "fastlm": lambda ps: optim.Adafactor(ps, variant="huggingface").step,
            "transformers": hugging_face,
            "torch": lambda ps: torch.optim.Adafactor(ps).step,
            "torch foreach": lambda ps: torch.optim.Adafactor(ps, foreach=True).step,
            "torch fused AdamW": torch_adamw,
        },
    ),
    "lamb": (
        torch.float32,
        {"fastlm": lambda ps: optim.LAMB(ps, lr=LR, weight_decay=DECAY).step, "torch foreach": foreach_lamb},
    ),
    "sgd": (
        torch.float32,
        {
            "fastlm": lambda ps: optim.SGD(ps, lr=LR, momentum=0.9).step,
            "torch fused": lambda ps: torch.optim.SGD(ps, lr=LR, momentum=0.9, fused=True).step,
        },
    ),
    "bf16": (
        BF16,
        {
            "fastlm": lambda ps: optim.AdamW(ps, lr=LR, state_dtype="bf16").step,
            "torch fused": torch_adamw,
        },
    ),
    "libraries": (
        torch.float32,
        {
            "fastlm": lambda ps: optim.AdamW(ps, lr=LR).step,
            "torch fused": torch_adamw,
            "deepspeed": deepspeed,
            "bitsandbytes": bitsandbytes("AdamW"),
            "bitsandbytes, 8 bits": bitsandbytes("AdamW8bit"),
            "torchao": torchao("_AdamW"),
            "torchao, 8 bits": torchao("AdamW8bit"),
        },
    ),
    "masters": (
        BF16,
        {
            "fastlm": lambda ps: optim.AdamW(ps, lr=LR, master="fp32", max_grad_norm=MAX_NORM).step,
            "torch": torch_masters,
        },
    ),
}


def by_definition(params: list[Tensor]) -> Step:
    """Adafactor's formula in plain PyTorch: transformers', which is timed beside ours, need not be installed."""
    optimizer = optim.Adafactor(params, variant="huggingface")

    def step() -> None:
        with use_backend("reference"):
            optimizer.step()

    return step


CHECKED_AGAINST = {"adafactor": by_definition}  # instead of the first opponent
# for the device within a step: no graph captures them
WAIT = {("adafactor", who) for who in ("transformers", "torch", "torch foreach")}


def check(shapes: Shapes, kind: str, device: torch.device) -> float:
    """‖ours - theirs‖ / ‖their change‖ after one step from the same start, theirs being the first opponent's or the
    definition's. Raises AssertionError where rounding cannot explain it.

    Dimensions are cut to 1024, because PyTorch's own norm on a CPU, of which Adafactor and LAMB are made, is wrong by
    0.2 % for the 38 million elements of the embedding. bf16 parameters move in whole ulps: most must be the same.
    """
    shapes = [tuple(min(size, 1024) for size in shape) for shape in shapes]
    dtype, who = STEPS[kind]
    start = cast(make_params(shapes, device, 0, 1.0), dtype)
    for p in start:
        with torch.no_grad():
            p.add_(0.02 * p.sign())  # norms and biases of zero would hide a ratio
    ends = []
    ours, theirs = list(who.values())[:2]
    for make in (ours, CHECKED_AGAINST.get(kind, theirs)):
        ends.append(cast(start, dtype))
        make(ends[-1])()
    far, moved = (
        sum((a.double() - b.double()).square().sum() for a, b in zip(x, y, strict=True)).sqrt()
        for x, y in ((ends[0], ends[1]), (start, ends[1]))
    )
    error, allowed = (far / moved).item(), 1e-4 if dtype == torch.float32 else 0.3
    assert error <= allowed, f"{kind}: fastlm is off by {error:.1e} of the change"
    return error


def contestants(shapes: Shapes, kind: str, device: torch.device) -> dict[str, Callable[[], list[Step]]]:
    """For timing.compare; steps over separate buffers."""
    dtype, who = STEPS[kind]
    start = lambda seed: cast(make_params(shapes, device, seed, 1e-2), dtype)
    return {
        name: lambda make=make: [make(start(seed)) for seed in buffers(shapes, device)] for name, make in who.items()
    }


def measure(name: str, shapes: Shapes, kind: str, clock: str, device: torch.device, copy: float, **limits) -> dict:
    """One row of results. copy: the machine's own copy rate in bytes per second."""
    facts = {
        "kind": kind,
        "shapes": name,
        "step": "bare",
        "tensors": len(shapes),
        "bytes": BYTES[kind] * elements(shapes),
        "copy": copy,
    }
    able = {
        name: set_up
        for name, set_up in contestants(shapes, kind, device).items()
        if clock != "graph" or (kind, name) not in WAIT
    }
    return compare(able, clock, **limits).row(**facts)
