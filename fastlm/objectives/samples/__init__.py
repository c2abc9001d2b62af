"""Which tokens a sample is, and in which order samples come: each computed from its number, be there a billion.

    order.py     the order of samples; those of a length together, and under a budget
    windows.py   samples that are windows of a stream, in random order, or going on where others ended
    mixture.py   windows of several streams, in shares

To add a way of cutting, subclass `Windows`; a new order is a class beside `Order`.
"""

from fastlm.objectives.samples.mixture import MixedWindows, Mixture
from fastlm.objectives.samples.order import ByLength, Order, micro_batches, permutation
from fastlm.objectives.samples.windows import Streams, Windows

__all__ = ["ByLength", "MixedWindows", "Mixture", "Order", "Streams", "Windows", "micro_batches", "permutation"]
