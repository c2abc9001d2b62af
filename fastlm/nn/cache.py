"""What a layer of attention remembers while a text is written token by token."""

import torch
from torch import Tensor

from fastlm.checks import whole

LEAST_CAPACITY = 64  # tokens


class KVCache:
    """Keys and values of the tokens that one attention layer has seen, for decoding: [B, Hk, L, D] each.

    They are kept as projected, before any rotation. KVCache() starts empty; len(cache) is the number of tokens it
    holds.

    Positions enter when attention runs, from where a key stands in the cache, so every scheme decodes the same way.

    New tokens are written in place into memory for `capacity` tokens, which doubles when it is full; under autograd
    they are concatenated instead, for their gradients.

    All rows of a batch grow together, and the cache does not know which keys are padding. Pad prompts of different
    lengths on the left, and give padding a segment of its own in each call: segments=(of the new tokens [B, L], of all
    [B, len(cache) + L]). Rows padded on the right can be read, with key_lengths in each call, but not continued: new
    tokens would stand behind the padding.

    Args:
        capacity: tokens for which memory is allocated at first. Default 0: what the first call needs.

    Attributes:
        key: [B, Hk, len(cache), D], or None while the cache is empty.
        value: like key.
        memory: (keys, values) of another sequence that the layer attends to too, [B, Hk, S, D] each, projected once;
            None until a `CrossAttention` was given the cache.
    """

    def __init__(self, capacity: int = 0):
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.memory: tuple[Tensor, Tensor] | None = None
        whole(0, capacity=capacity)
        self._capacity = capacity
        self._buffers: tuple[Tensor, Tensor] | None = None  # [B, Hk, capacity, D]; key and value are views of them

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
        if key.shape[:3] != value.shape[:3]:
            raise ValueError(
                f"keys are {list(key.shape)} and values {list(value.shape)}; they are of the same tokens and heads"
            )
        for name, new, held in (("keys", key, self.key), ("values", value, self.value)):
            if held is not None and (new.shape[:2] != held.shape[:2] or new.shape[3] != held.shape[3]):
                raise ValueError(
                    f"the cache holds {name} {list(held.shape)} and is given {list(new.shape)}, which differ in "
                    "more than length; a new batch, and each layer, takes a KVCache() of its own"
                )
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (key, value, self.key)):
            self._buffers = None
            if self.key is not None:
                key, value = torch.cat((self.key, key), 2), torch.cat((self.value, value), 2)
            self.key, self.value = key, value
        else:
            self.key, self.value = self._write(key, value)
        return self.key, self.value

    def _write(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        start, end = len(self), len(self) + key.shape[2]
        if self._buffers is None or end > self._buffers[0].shape[2]:
            self._capacity = max(self._capacity, LEAST_CAPACITY, end, 2 * start)
            buffers = tuple(x.new_empty(*x.shape[:2], self._capacity, x.shape[3]) for x in (key, value))
            if start:
                buffers[0][:, :, :start], buffers[1][:, :, :start] = self.key, self.value
            self._buffers = buffers
        self._buffers[0][:, :, start:end], self._buffers[1][:, :, start:end] = key, value
        return self._buffers[0][:, :, :end], self._buffers[1][:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Make row b of the batch what row rows[b] was, as beam search does.

        Args:
            rows: [B] int64; another number of rows than before is possible too.
        """
        n = len(self)
        if self._buffers is not None:
            self._buffers = self._buffers[0][rows], self._buffers[1][rows]
            self.key, self.value = self._buffers[0][:, :, :n], self._buffers[1][:, :, :n]
        elif n:
            self.key, self.value = self.key[rows], self.value[rows]
        if self.memory is not None:
            self.memory = self.memory[0][rows], self.memory[1][rows]


def check_cache(given: object) -> None:
    if not isinstance(given, KVCache):
        raise ValueError(f"cache is of type {type(given).__name__}; give a fastlm.nn.KVCache() for each layer")
