"""Rows by distance: copies of a table give its values, and its gradient by short sums."""

import pytest
import torch

from fastlm.positions import deberta_bucket
from fastlm.positions.bias import t5_bucket
from fastlm.positions.rows import WALK, _rows_of, copies_of

L = 4096
DISTANCE = torch.arange(1 - L, L)
INDICES = {  # scheme → (rows of its table, the row of each distance)
    "t5": (32, t5_bucket(DISTANCE, causal=True)),
    "t5, both sides": (32, t5_bucket(DISTANCE, causal=False)),
    "shaw": (33, DISTANCE.clamp(-16, 16) + 16),
    "deberta": (512, (deberta_bucket(-DISTANCE, 256, 512) + 256).clamp(0, 511)),
}


@pytest.mark.parametrize("scheme", INDICES)
def test_no_sum_is_long(scheme):
    """What a GPU adds one after the other: the far distances alone, without copies."""
    rows, index = INDICES[scheme]
    copies = copies_of(rows, len(index))
    assert index.bincount().max() > L / 2
    assert (index * copies + torch.arange(len(index)) % copies).bincount().max() <= max(WALK + 1, rows)
    assert copies * rows <= len(index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", INDICES)
def test_copies_change_neither_values_nor_gradient(scheme, dtype):
    rows, index = INDICES[scheme]
    g = torch.Generator().manual_seed(0)
    table, grad = (torch.randn(n, 6, generator=g).to(dtype) for n in (rows, len(index)))
    truth = torch.zeros(rows, 6, dtype=torch.float64).index_add_(0, index, grad.double())
    errors = {}
    for copies in (1, copies_of(rows, len(index))):
        leaf = table.clone().requires_grad_()
        out = _rows_of(leaf, index, copies)
        assert torch.equal(out, table[index])
        out.backward(grad)
        errors[copies] = (leaf.grad.double() - truth).abs().max()
    of_one, of_copies = errors.values()
    assert of_copies <= 2 * of_one + torch.finfo(dtype).eps * truth.abs().max()
