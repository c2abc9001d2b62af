"""Modules, and the checked functions below them.

functional.py    attention, rotate; scaled_dot_product_attention, by torch's arguments
arguments.py     attention's, checked: schemes and masks turned into what an op takes
context_parallel.py  context_parallel_attention, over a sequence that ranks hold parts of
                 blocks.py: what they compute; exchange.py: what they hand one another
torch_forms.py   those of torch's masks, widths and dimensions in our terms
multihead.py     MultiheadAttention, by torch's arguments and state dict, with any scheme
linear.py        linear, of few rows too; Linear, torch's
loss.py          linear_cross_entropy, without a tensor of logits
attention.py     Attention, multi-head self-attention with any scheme; CrossAttention, to another sequence
cache.py         keys and values of the tokens a layer has seen
checks.py        what attention and rotate refuse, in words
embedding.py     embedding, rows of a table by token; Embedding, torch's
vocabulary.py    tables of which ranks hold rows, for these two and the loss
mlp.py           MLP, the feed-forward layer with any activation, gated or not
recompute.py     what a layer computes again for a gradient instead of keeping it
norm.py          LayerNorm, RMSNorm: torch's, that add a residual in the same pass
"""

from fastlm.nn.attention import Attention, CrossAttention
from fastlm.nn.cache import KVCache
from fastlm.nn.embedding import Embedding
from fastlm.nn.linear import Linear
from fastlm.nn.mlp import ACTIVATIONS, MLP
from fastlm.nn.multihead import MultiheadAttention
from fastlm.nn.norm import NORMS, LayerNorm, RMSNorm

__all__ = [
    "ACTIVATIONS", "MLP", "NORMS", "Attention", "CrossAttention", "Embedding", "KVCache", "LayerNorm", "Linear",
    "MultiheadAttention", "RMSNorm",
]  # fmt: skip
