"""Any model of ours, under our own names: for configs that transformers has no model for."""

from dataclasses import asdict

import torch

from fastlm.interop.family import Family, Parts, TensorSlice
from fastlm.models import ModelConfig, Transformer


class Own(Family):
    """Its config.json has every field of ours, under "fastlm"; every config belongs to it."""

    def config(self, entries: dict) -> ModelConfig:
        if "fastlm" not in entries:
            raise ValueError("config.json has model_type 'fastlm' and no entry 'fastlm', which holds the model's shape")
        return ModelConfig(**entries["fastlm"])

    def entries(self, config: ModelConfig) -> dict:
        return {"model_type": self.model_type, "fastlm": asdict(config)}

    def has(self, config: ModelConfig) -> bool:
        return True


def parts(c: ModelConfig) -> Parts:
    with torch.device("meta"):
        names = Transformer(c).state_dict()
    repeated = c.head == "lm" and c.tie_embeddings
    return (TensorSlice(name, name) for name in names if not (repeated and name == "head.weight"))


OWN = Own("fastlm", {}, parts)
