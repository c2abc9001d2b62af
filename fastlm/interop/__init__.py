"""Doors to Hugging Face: fastlm's attention in their models, their models as ours, and ours in their format.

    register()                              AutoModel.from_pretrained(..., attn_implementation="fastlm")
    from_huggingface(source)                a directory, or a model of transformers → Transformer
    to_huggingface(model, directory)        config.json + model.safetensors, for AutoModel where such a model exists

    attention.py         their attention and mask calls, answered by ours
    mask_functions.py    what their mask functions let through, in our terms
    weights.py           the way there and back
    family.py            what a family is: its options and its tensors, in our terms
    families/            a file a family
    swap/                fastlm.swap: their modules answered by ours, in place

A config that none of their families has, such as GPT-2 with T5's bias, is saved as model_type "fastlm", with fastlm's
own names, for `from_huggingface`.
"""

from fastlm.interop.attention import register
from fastlm.interop.weights import from_huggingface, model_type, to_huggingface

__all__ = ["from_huggingface", "model_type", "register", "to_huggingface"]
