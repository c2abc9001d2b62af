"""Triton's gradient of an embedding: on the GPU if there is one, compiled; else in Triton's interpreter
(tests/conftest.py says so).
"""

import pytest
import torch
from cases import EMBEDDING
from embedded import assert_embedding_accurate, results

import fastlm
from fastlm.ops.embedding import embedding

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", EMBEDDING, ids=str)
def test_it_is_as_accurate_as_pytorch(case, dtype):
    with fastlm.use_backend(embedding="triton"):
        assert_embedding_accurate(case, dtype, DEVICE)


def test_bits_repeat():
    ids, weight, padding = EMBEDDING[0].make(torch.float32, DEVICE)
    with fastlm.use_backend(embedding="triton"):
        first, *others = (results(embedding, ids, weight, padding)["dweight"] for _ in range(3))
    assert all(torch.equal(other, first) for other in others)
