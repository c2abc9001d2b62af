"""The gradient of an embedding: rows of one token added up, sorted by token. Formulas: fastlm/ops/embedding.py.

Tokens are sorted with their places. A program takes BLOCK_N channels of a place, and has something to do if the place
is its token's first: it adds the rows of all the token's places, BLOCK_M at a time, and writes the sum once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.launch import launch, looks
from fastlm.kernels.tile import cast
from fastlm.kernels.tiles import Tiles, cdiv, power_of_two

# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def embedding_backward_kernel(
    p_dy, p_ids, p_places, p_ends, p_dweight, padding,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """p_ids [n] sorted, p_places where they stood, p_ends after each one's last equal."""
    blocks = (D + BLOCK_N - 1) // BLOCK_N
    first, o_d = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    m_d, token = o_d < D, tl.load(p_ids + first)
    begins = (first == 0) | (tl.load(p_ids + tl.maximum(first - 1, 0)) != token)
    if begins & (token != padding):
        end = tl.load(p_ends + first)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in range(first, end, BLOCK_M):
            o = i + tl.arange(0, BLOCK_M)
            row = tl.load(p_places + o, mask=o < end, other=0)
            m = (o < end)[:, None] & m_d[None, :]
            sums += tl.load(p_dy + row[:, None] * D + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        tl.store(p_dweight + token * D + o_d, cast(tl.sum(sums, 0), p_dweight.dtype.element_ty), mask=m_d)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers


def backward(dy: Tensor, ids: Tensor, words: int, padding_idx: int) -> Tensor:
    """Launch the kernel. Arguments and result: the op `embedding_backward`."""
    dy, D = dy.contiguous(), dy.shape[-1]
    dweight = dy.new_zeros(words, D)
    if dy.numel() == 0:
        return dweight
    ids, places = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(ids, ids, right=True, out_int32=True)
    columns = min(128, power_of_two(D))
    tiles = Tiles(32, columns, num_warps=4, num_stages=1)
    with torch.cuda.device_of(dy):
        launch(
            embedding_backward_kernel, len(ids) * cdiv(D, columns), tiles, looks(dy, ids, places, dweight, padding_idx),
            dy, ids, places, ends, dweight, padding_idx, D, *tiles[:2],
        )  # fmt: skip
    return dweight
