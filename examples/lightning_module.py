"""fastlm's optimizers in Lightning, on a tiny language model and synthetic text; CPU, a few seconds.

    python examples/lightning_module.py               Adafactor, the steps of transformers.Adafactor
    python examples/lightning_module.py adamw         AdamW, the steps of torch.optim.AdamW

Needs: pip install fastlm lightning
"""

import sys
from collections.abc import Callable

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastlm

CLIP = 1.0
OPTIMIZERS = {
    "adafactor": lambda params: fastlm.optim.Adafactor(params, lr=3e-3, scale_parameter=False, max_grad_norm=CLIP),
    "adamw": lambda params: fastlm.optim.AdamW(params, lr=3e-3, weight_decay=0.1, max_grad_norm=CLIP),
}


class LanguageModel(lightning.LightningModule):
    def __init__(self, make_optimizer: Callable):
        super().__init__()
        self.make_optimizer, self.losses = make_optimizer, []
        middle = nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64)
        self.net = nn.Sequential(nn.Embedding(32, 32), *middle, nn.Linear(64, 32))

    def training_step(self, ids: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def train(make_optimizer: Callable, steps: int = 20, clip: float | None = None, **options) -> list[float]:
    """The loss of every step. clip: Lightning's own; None leaves it to the optimizer. options: more of its Trainer."""
    lightning.seed_everything(0, verbose=False)
    model = LanguageModel(make_optimizer)
    # each row counts in its own step
    ids = (torch.arange(16) * torch.arange(1, 9)[:, None] + torch.arange(8)[:, None]) % 32
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(accelerator="cpu", max_steps=steps, gradient_clip_val=clip, **quiet, **options)
    trainer.fit(model, DataLoader(ids.repeat(steps, 1), batch_size=8))
    return model.losses


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "adafactor"
    if name not in OPTIMIZERS:
        sys.exit(f"optimizer {name!r} is unknown; choose from {', '.join(OPTIMIZERS)}")
    losses = train(OPTIMIZERS[name])
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
