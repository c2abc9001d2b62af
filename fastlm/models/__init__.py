"""What is pretrained: one Transformer, whose shape is data.

    config.py         ModelConfig: every field of a model's shape, checked
    presets.py        rows of data that shape it, by name
    transformer.py    the model: tokens in, logits out; caches and sampling

A model takes everything it computes with from the library below (`fastlm.nn`, `fastlm.positions`) and knows nothing of
training. To add a model, add a row to presets.py.
"""

from fastlm.models.config import ModelConfig
from fastlm.models.recurrence import Recurrence
from fastlm.models.stack import Memory
from fastlm.models.transformer import Transformer

__all__ = ["Memory", "ModelConfig", "Recurrence", "Transformer"]
