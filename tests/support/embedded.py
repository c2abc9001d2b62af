"""How right an embedding is: the rule of tolerance.py for y and the gradient of weight, beside eager PyTorch."""

import torch
import torch.nn.functional as F
from tolerance import Yardstick, assert_accurate, max_and_rms

from fastlm.ops.embedding import NO_PADDING, embedding


def results(f, ids: torch.Tensor, weight: torch.Tensor, padding: int) -> dict[str, torch.Tensor]:
    weight = weight.detach().requires_grad_()
    y = f(ids, weight, padding)
    return {"y": y.detach(), "dweight": torch.autograd.grad(y, weight, gradient_for(y))[0]}


def gradient_for(y: torch.Tensor) -> torch.Tensor:
    """Numbers that bf16 holds, so that they are the same in each dtype."""
    drawn = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return drawn.to(torch.bfloat16).to(y)


def plain(ids: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
    return F.embedding(ids, weight, None if padding == NO_PADDING else padding)


def assert_embedding_accurate(case, dtype: torch.dtype, device: torch.device) -> None:
    ids, weight, padding = case.make(dtype, device)
    truth = results(plain, ids, weight.double(), padding)
    errors = {name: max_and_rms(got, truth[name]) for name, got in results(plain, ids, weight, padding).items()}
    for name, got in results(embedding, ids, weight, padding).items():
        assert_accurate(name, got, Yardstick(truth, errors))
