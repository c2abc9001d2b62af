"""Large zeros in huge pages: tensors as any other."""

import mmap
from types import SimpleNamespace

import pytest
import torch

from fastlm.backends import pages

LIKE = torch.empty(0, dtype=torch.bfloat16)


@pytest.mark.parametrize("system", ["as it is", "no such pages", "built without them"])
def test_they_are_zeros_that_are_written(system, monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *args):
            raise OSError("Invalid argument")

    if system == "no such pages":
        monkeypatch.setattr(pages, "mmap", SimpleNamespace())
    if system == "built without them":
        monkeypatch.setattr(pages.mmap, "mmap", Refusing)
    for shape in ((2, 3), (pages.LARGE, 1), (1000, 3000), (0, 5)):
        for options in ({}, {"dtype": torch.float32}):
            x = pages.zeros(*shape, like=LIKE, **options)
            assert x.shape == shape and x.dtype == options.get("dtype", LIKE.dtype) and not x.any()
            x.fill_(2.0)
            assert x.sum(dtype=torch.float64) == 2 * x.numel()
    assert pages.zeros(pages.LARGE, like=LIKE.to("meta")).is_meta


def test_they_live_as_long_as_a_view():
    x = pages.zeros(pages.LARGE, like=LIKE)[5:].view(-1)
    del_me = [pages.zeros(pages.LARGE, like=LIKE).fill_(7.0) for _ in range(3)]
    del del_me
    assert not x.any()
