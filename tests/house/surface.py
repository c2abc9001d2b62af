"""The public surface as a user's type checker sees it. mypy reads this file (test_types.py); nobody runs it."""

from typing import assert_type

import torch
from torch import Tensor, nn

import fastlm
import fastlm.interop
from fastlm import amp, optim, positions
from fastlm.models import ModelConfig, Transformer
from fastlm.models.heads import RowClassifier, SpanReader

q = k = v = torch.zeros(1, 2, 8, 16)
bias = positions.T5Bias(2)
assert_type(fastlm.attention(q, k, v, position=bias, causal=True), Tensor)
assert_type(fastlm.attention(q, k, v, window=(4, None), dropout=0.1, seed=1), Tensor)
assert_type(fastlm.attention(q, k, v, return_lse=True), tuple[Tensor, Tensor])
assert_type(fastlm.context_parallel_attention(q, k, v, position=bias, causal=True), Tensor)
assert_type(fastlm.rotate(q, q[0, 0], q[0, 0], layout="interleaved"), Tensor)
assert_type(bias.weight, nn.Parameter)
assert_type(positions.make("alibi", heads=2), positions.Position)

assert_type(fastlm.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), Tensor)
assert_type(positions.from_score_mod(lambda score, b, h, q_idx, kv_idx: score, heads=2, length=8), positions.Position)

block = fastlm.nn.Attention(32, 2, position="rope", causal=False)
assert_type(block.forward(torch.zeros(1, 8, 32), key_lengths=torch.tensor([3])), Tensor)

scaler = amp.GradScaler("cpu")
for optimizer in (
    optim.SGD(block.parameters(), lr=0.1, momentum=0.9),
    optim.Adam(block.parameters(), lr=1e-3, betas=(0.9, 0.99)),
    optim.AdamW(block.parameters(), lr=1e-3, max_grad_norm=1.0, master="fp32"),
    optim.LAMB(block.parameters(), lr=1e-3),
    optim.Adafactor(block.parameters(), lr=None, variant="t5"),
):
    scaler.step(optimizer)
    fits: torch.optim.Optimizer = optimizer

assert_type(optim.decay_groups(block, 0.1), list[dict])
with fastlm.use_backend("reference"), fastlm.use_backend(attention="cpp"):
    pass

model = Transformer(ModelConfig(dim=64, heads=2))
assert_type(model.generate(torch.zeros(1, 1, dtype=torch.int64), 3), Tensor)
assert_type(fastlm.interop.from_huggingface("folder"), Transformer)
assert_type(fastlm.interop.to_huggingface(model, "folder"), str)
report = fastlm.swap(model, loss=False)
assert_type(report.swapped, list[tuple[str, str]])
fastlm.unswap(model)
assert_type(fastlm.interop.head_from_huggingface("folder"), RowClassifier | SpanReader)
assert_type(fastlm.interop.head_to_huggingface(SpanReader(model), "folder"), str)
