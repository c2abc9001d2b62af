"""fastlm's optimizers and loss scaler in a plain loop with torch.amp, in fp16; a GPU if there is one, else a CPU, a few
seconds.

    python examples/plain_amp_loop.py                 Adafactor, the steps of transformers.Adafactor
    python examples/plain_amp_loop.py adamw           AdamW, the steps of torch.optim.AdamW

Unscaling, the overflow check, clipping and the update are one pass inside scaler.step(); nothing waits for the GPU.
"""

import sys
from collections.abc import Callable

import torch
from torch import nn

import fastlm

CLIP = 1.0
OPTIMIZERS = {
    "adafactor": lambda params: fastlm.optim.Adafactor(params, lr=3e-3, scale_parameter=False, max_grad_norm=CLIP),
    "adamw": lambda params: fastlm.optim.AdamW(params, lr=3e-3, weight_decay=0.1, max_grad_norm=CLIP),
}


def train(
    make_optimizer: Callable, steps: int = 20, clip: float | None = None, Scaler=fastlm.amp.GradScaler
) -> list[float]:
    """The loss of every step. clip: None leaves unscaling and clipping to the optimizer; a number does both by hand, as
    torch's optimizers need."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(32, 32), nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32)).to(
        device
    )
    # each row counts in its own step
    ids = ((torch.arange(16) * torch.arange(1, 9)[:, None] + torch.arange(8)[:, None]) % 32).to(device)
    optimizer, scaler, losses = make_optimizer(net.parameters()), Scaler(device), []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = nn.functional.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "adafactor"
    if name not in OPTIMIZERS:
        sys.exit(f"optimizer {name!r} is unknown; choose from {', '.join(OPTIMIZERS)}")
    losses = train(OPTIMIZERS[name])
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
