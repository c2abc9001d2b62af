"""What a layer of attention remembers while a text is written token by token."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the tokens that one attention layer has seen, for decoding: [B, Hk, L, D] each.

    They are kept as projected, before any rotation. KVCache() starts empty; len(cache) is the number of tokens it
    holds.

    Positions enter when attention runs, from where a key stands in the cache, so every scheme decodes the same way.

    All rows of a batch grow together, and the cache does not know which keys are padding. Pad prompts of different
    lengths on the left, and give padding a segment of its own in each call: segments=(of the new tokens [B, L], of all
    [B, len(cache) + L]). Rows padded on the right can be read, with key_lengths in each call, but not continued: new
    tokens would stand behind the padding.
    """

    def __init__(self):
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def __bool__(self) -> bool:
        return True  # an empty cache is one too: `if cache` asks whether there is any

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens.

        Args:
            key: [B, Hk, L, D] floats.
            value: like key.

        Returns:
            The keys and the values of all tokens, [B, Hk, len(cache), D] each.

        Raises:
            ValueError: where anything but L differs from what the cache holds.
        """
        if self.key is not None:
            for name, new, held in (("keys", key, self.key), ("values", value, self.value)):
                if new.shape[:2] != held.shape[:2] or new.shape[3] != held.shape[3]:
                    raise ValueError(
                        f"the cache holds {name} {list(held.shape)} and is given {list(new.shape)}, which differ in "
                        "more than length; a new batch, and each layer, takes a KVCache() of its own"
                    )
            key, value = torch.cat((self.key, key), 2), torch.cat((self.value, value), 2)
        self.key, self.value = key, value
        return key, value
