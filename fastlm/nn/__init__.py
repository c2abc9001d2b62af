"""Modules, and the checked functions below them.

functional.py    attention, rotate: arguments checked, schemes and masks turned into what an op takes
loss.py          linear_cross_entropy, without a tensor of logits
attention.py     Attention, multi-head self-attention with any scheme
cache.py         keys and values of the tokens a layer has seen
mlp.py           feed-forward layers and norms
"""

from fastlm.nn.attention import Attention
from fastlm.nn.cache import KVCache
from fastlm.nn.mlp import MLPS, NORMS, GeluMLP, SwiGLU

__all__ = ["MLPS", "NORMS", "Attention", "GeluMLP", "KVCache", "SwiGLU"]
