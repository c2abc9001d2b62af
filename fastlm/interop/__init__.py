"""Doors to Hugging Face: fastlm's attention in their models, their models as ours, and ours in their format.

    register()                              AutoModel.from_pretrained(..., attn_implementation="fastlm")
    from_huggingface(source)                a directory, or a model of transformers → Transformer
    to_huggingface(model, directory)        config.json + model.safetensors, for AutoModel where such a model exists
    head_from_huggingface, head_to_huggingface      likewise of models with a head for fine-tuning

    attention.py         their attention and mask calls, answered by ours
    mask_functions.py    what their mask functions let through, in our terms
    weights.py           the way there and back
    heads.py             that of models with a head for rows or spans
    family.py            what a family is: its options and its tensors, in our terms
    families/            a file a family
    swap/                fastlm.swap: their modules answered by ours, in place

A config that none of their families has, such as GPT-2 with T5's bias, is saved as model_type "fastlm", with fastlm's
own names, for `from_huggingface`.
"""

from fastlm.interop.attention import register
from fastlm.interop.heads import head_from_huggingface, head_to_huggingface
from fastlm.interop.weights import from_huggingface, model_type, to_huggingface

__all__ = [
    "from_huggingface",
    "head_from_huggingface",
    "head_to_huggingface",
    "model_type",
    "register",
    "to_huggingface",
]
