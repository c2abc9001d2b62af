"""Large zeros on a CPU: the system makes fresh memory page by page as it is touched, and takes longer for pages of 4 KB
than most of what is done to them (benchmarks/FACTS.md).
"""

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

LARGE = 2**25  # bytes, which the GNU C library gives back to the system when they are freed; fewer it may keep


def zeros(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """like.new_zeros(shape, dtype=dtype); large ones on a CPU in huge pages, where Linux gives them to who asks."""
    dtype = like.dtype if dtype is None else dtype
    size = math.prod(shape) * dtype.itemsize
    if like.device.type != "cpu" or size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a kernel that was built without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
