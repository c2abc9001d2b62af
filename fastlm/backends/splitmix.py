"""SplitMix64 (Steele, Lea & Flood 2014) over arrays of numbers, for orders and hashes; without torch."""

import numpy as np


def mixed(x: np.ndarray) -> np.ndarray:
    """Its finalizer: [...] uint64 → [...] uint64, each bit of which depends on every bit; arithmetic is modulo 2⁶⁴."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
