"""What a layer of attention remembers while a text is written token by token."""

import torch
from torch import Tensor


class Cache:
    """Keys and values of the tokens one attention layer has seen, for decoding: [B, Hk, L, D], kept as projected.

    Positions enter when attention runs, from where a key stands, so every scheme decodes alike. The rows of a batch
    grow together, and a cache does not know which of its keys are padding. Prompts of several lengths are padded on the
    left, and each call makes padding a segment of its own: segments=(of the new tokens [B, L], of all [B, len(cache) +
    L]). Padding on the right can be read, with key_lengths at each call, but not continued: new tokens would stand
    behind it."""

    def __init__(self):
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def __bool__(self) -> bool:
        return True  # an empty cache is one too: `if cache` asks whether there is any

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values; return all of them. Raises ValueError for other rows or heads."""
        if self.key is not None:
            for name, new, held in (("keys", key, self.key), ("values", value, self.value)):
                if new.shape[:2] != held.shape[:2] or new.shape[3] != held.shape[3]:
                    raise ValueError(
                        f"the cache holds {name} {list(held.shape)} and is given {list(new.shape)}, which differ in "
                        "more than length; a new batch, and each layer, takes a Cache() of its own"
                    )
            key, value = torch.cat((self.key, key), 2), torch.cat((self.value, value), 2)
        self.key, self.value = key, value
        return key, value
