"""Doors to Hugging Face: fastlm's attention in their models, and fastlm's weights in their format.

    register()                              AutoModel.from_pretrained(..., attn_implementation="fastlm")
    save_pretrained(model, folder)          config.json + model.safetensors, for AutoModel where such a model exists
    load_pretrained(folder)                 the way back

    attention.py     their attention and mask calls, answered by ours
    weights.py       saving and loading; which of their model types a model is
    llama.py  gpt2.py    one file a family: its config, and its tensors as rows of ours

A Llama-shaped config is saved as "llama" and a GPT-2-shaped one as "gpt2". Other combinations of norm, MLP and position
have no Hugging Face model: they are saved as "fastlm", with fastlm's own names, for `load_pretrained`. To add a family,
write its file and name it in weights.FAMILIES.
"""

from fastlm.interop.attention import register
from fastlm.interop.weights import load_pretrained, model_type, save_pretrained

__all__ = ["load_pretrained", "model_type", "register", "save_pretrained"]
