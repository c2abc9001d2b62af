"""Rows of logits: what their cross entropy is made of, and its gradient, in their place. Formulas:
fastlm/ops/linear_cross_entropy.py.

A program takes a row, BLOCK_M × BLOCK_N words at a time. Each of BLOCK_M lanes keeps the largest z that it has met and
Σ exp(z - largest), so that exponentials are one for each word and one for every BLOCK_N; lanes meet at the row's end,
always in the same order. The gradient goes through the row backwards, for its end is what the cache still holds.

Rows lie `pitch` words apart, of which the last may be none. Memory is bounded by the pitch, a multiple of whole vectors
where whoever made the rows saw to it, and not by V, which may be odd; what is no word weighs nothing.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastlm.kernels.gate import curve
from fastlm.kernels.launch import launch
from fastlm.kernels.tile import cast
from fastlm.kernels.tiles import Tiles, power_of_two

# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def scores(p_x, p_bias, o, V, pitch, into, out):
    """(z, dz/dx) of the words o, z -∞ past the last. z = out · tanh(into · x), or out · x where into is None."""
    x = tl.load(p_x + o, mask=o < pitch, other=0.0).to(tl.float32)
    if p_bias is not None:
        x += tl.load(p_bias + o, mask=o < pitch, other=0.0)
    if into is None:
        z, slope = x * out, out
    else:
        y, steepness = curve(x * into, "tanh")
        z, slope = y * out, steepness * (into * out)
    return tl.where(o < V, z, float("-inf")), slope


@triton.jit
def tile_of_words(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]


@triton.jit
def measured(p_x, p_bias, label, V, words, pitch, into, out, smoothing, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(lse, (1 - ε) z_label + ε / words Σ z) of a row. A label that is no word here adds nothing."""
    here = (label >= 0) & (label < V)
    wanted, _ = scores(p_x, p_bias, tl.where(here, label, 0), V, pitch, into, out)
    wanted = tl.where(here, wanted, 0.0)
    o_word = tile_of_words(BLOCK_M, BLOCK_N)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    shares = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for begin in range(0, V, BLOCK_M * BLOCK_N):
        o = begin + o_word
        z, _slope = scores(p_x, p_bias, o, V, pitch, into, out)
        larger = tl.maximum(largest, tl.max(z, 1))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # -∞ - -∞ would be NaN
        shares = shares * tl.exp(largest - base) + tl.sum(tl.exp(z - base[:, None]), 1)
        largest = larger
        if smoothing is not None:
            total += tl.sum(tl.where(o < V, z, 0.0), 1)
    base = tl.max(largest, 0)
    base = tl.where(base == float("-inf"), 0.0, base)
    lse = base + tl.log(tl.sum(shares * tl.exp(largest - base), 0))
    if smoothing is not None:
        wanted = (1.0 - smoothing) * wanted + smoothing * (tl.sum(total, 0) / words)
    return lse, wanted


@triton.jit
def write_gradient(
    p_x, p_bias, label, lse, scale, g, V, words, pitch, into, out, smoothing,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of scale · lse - g · wanted, in the row's place."""
    o_word = tile_of_words(BLOCK_M, BLOCK_N)
    label, of_label, even = label.to(tl.int32), g, 0.0
    if smoothing is not None:
        of_label, even = g * (1.0 - smoothing), g * (smoothing / words)
    last = (V - 1) // (BLOCK_M * BLOCK_N) * (BLOCK_M * BLOCK_N)
    for passed in range(0, V, BLOCK_M * BLOCK_N):
        o = last - passed + o_word
        z, slope = scores(p_x, p_bias, o, V, pitch, into, out)
        dz = tl.exp(z - lse) * scale - even - tl.where(o == label, of_label, 0.0)
        tl.store(p_x + o, cast(dz * slope, p_x.dtype.element_ty), mask=o < pitch)


@triton.jit(do_not_specialize=["V", "words"])
def logits_measure_kernel(
    p_x, p_bias, p_labels, p_lse, p_wanted, V, words, pitch, into, out, smoothing,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(p_labels + row)
    lse, wanted = measured(
        p_x + row * pitch, p_bias, label, V, words, pitch, into, out, smoothing, BLOCK_M, BLOCK_N
    )  # fmt: skip
    tl.store(p_lse + row, lse)
    tl.store(p_wanted + row, wanted)


@triton.jit(do_not_specialize=["V", "words"])
def logits_gradient_kernel(
    p_x, p_bias, p_labels, p_lse, p_scale, p_g, V, words, pitch, into, out, smoothing,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, lse, scale, g = (
        tl.load(p_labels + row), tl.load(p_lse + row), tl.load(p_scale + row), tl.load(p_g + row)
    )  # fmt: skip
    write_gradient(
        p_x + row * pitch, p_bias, label, lse, scale, g, V, words, pitch, into, out, smoothing, BLOCK_M, BLOCK_N
    )  # fmt: skip


@triton.jit(do_not_specialize=["V", "words", "ignore_index"])
def logits_lose_kernel(
    p_x, p_bias, p_labels, p_loss, z_loss, ignore_index, V, words, pitch, into, out, smoothing,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Both, of a loss lse - wanted + z_loss · lse² that weighs 1, or 0 where the label is ignore_index."""
    row = tl.program_id(0).to(tl.int64)
    p_x += row * pitch
    label = tl.load(p_labels + row)
    lse, wanted = measured(p_x, p_bias, label, V, words, pitch, into, out, smoothing, BLOCK_M, BLOCK_N)
    has_target = label != ignore_index
    tl.store(p_loss + row, tl.where(has_target, lse - wanted + z_loss * lse * lse, 0.0))
    g = tl.where(has_target, 1.0, 0.0)
    tl.debug_barrier()  # every thread has read the label's logit
    write_gradient(
        p_x, p_bias, label, lse, g * (1.0 + 2.0 * z_loss * lse), g, V, words, pitch, into, out, smoothing,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Launchers: what the functions of `Rows` in fastlm/ops/linear_cross_entropy.py do, `a` their arguments


def measure(x: Tensor, labels: Tensor, a: tuple) -> tuple[Tensor, Tensor]:
    lse, wanted = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
    _launch(logits_measure_kernel, x, a, labels, lse, wanted)
    return lse, wanted


def gradient(x: Tensor, labels: Tensor, of_rows: tuple[Tensor, ...], a: tuple) -> Tensor:
    """of_rows: lse, scale, g."""
    _launch(logits_gradient_kernel, x, a, labels, *of_rows)
    return x


def lose(x: Tensor, labels: Tensor, a: tuple) -> tuple[Tensor, Tensor]:
    loss = x.new_empty(len(x), dtype=torch.float32)
    _launch(logits_lose_kernel, x, a, labels, loss, a.z_loss, a.ignore_index)
    return loss, x


def _launch(kernel, x: Tensor, a: tuple, *of_rows: Tensor | float | int) -> None:
    (rows, V), pitch = x.shape, x.stride(0)
    bias = None if a.bias is None else F.pad(a.bias.float(), (0, pitch - V))
    of_rows = [value.contiguous() if isinstance(value, Tensor) else value for value in of_rows]
    into, out = (1 / a.softcap, a.softcap / a.temperature) if a.softcap else (None, 1 / a.temperature)
    numbers = V, a.words, pitch, into, out, a.label_smoothing or None
    tiles = _tiles(V)
    # how many rows there are, Triton does not look at
    seen = x.dtype, *(t.data_ptr() % 16 if isinstance(t, Tensor) else t for t in (x, bias, *of_rows)), *numbers
    with torch.cuda.device_of(x):
        launch(kernel, rows, tiles, seen, x, bias, *of_rows, *numbers, *tiles[:2])


def _tiles(V: int) -> Tiles:
    """Eight words, 16 bytes of 16 bits, for a lane, and two lanes for a thread."""
    num_warps = min(16, max(4, power_of_two(V) // 512))
    return Tiles(64 * num_warps, 8, num_warps, num_stages=1)
