"""What is pretrained: one Transformer, whose shape is data.

    config.py         ModelConfig: every field of a model's shape, checked
    presets.py        rows of data that shape it, by name
    transformer.py    the model: tokens in, logits out
    inputs.py         what a call gives a stack besides its tokens: masks, memory, caches
    stack.py          what an encoder and a decoder are: embeddings' sum, layers, norms
    heads.py          what reads the states: tokens' probabilities, detection, pairs; heads to fine-tune with
    init.py           how weights are drawn, by name
    generation.py     writing text: greedily, by sampling, by beam search
    recurrence.py     memory of the segments before (Transformer-XL, XLNet)
    two_stream.py     the stream that predicts tokens from their places (XLNet)
    deberta.py        the mask decoder, the convolution, the disentangled embedding
    boundary.py       the head that tells a span from what is beside it (SpanBERT)
    electra.py        a generator and the discriminator that learns from it (ELECTRA, DeBERTa v3)

A model takes everything it computes with from the library below (`fastlm.nn`, `fastlm.positions`) and knows nothing of
training. To add a model, add a row to presets.py.
"""

from fastlm.models.boundary import SpanBERT
from fastlm.models.config import ModelConfig
from fastlm.models.electra import Electra
from fastlm.models.inputs import Memory
from fastlm.models.recurrence import Recurrence, Remembering
from fastlm.models.transformer import Transformer

__all__ = ["Electra", "Memory", "ModelConfig", "Recurrence", "Remembering", "SpanBERT", "Transformer"]
