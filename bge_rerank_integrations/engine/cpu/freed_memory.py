"""Keeps the memory of one layer for the next, where the C library would return it to the system."""

from __future__ import annotations

from typing import Final

import torch

# glibc adapts to blocks of up to 32 MiB, including a header.
_BLOCK_BYTES: Final = 31 << 20


def keep_freed_memory() -> None:
    """Let glibc keep up to 62 MiB of freed memory for each thread that computes.

    Each layer requests about the same memory and frees it. glibc returns freed memory to the system if it is
    more than twice the largest block that it has received from the system and that was freed. It then
    requests it again in the next layer, page by page, which takes up to a tenth of the time in bfloat16. So
    this function requests one large block and frees it. It has no effect if the process sets glibc's limits
    itself, or has another C library. See M_MMAP_THRESHOLD in the manual page of mallopt.
    """
    torch.empty(_BLOCK_BYTES, dtype=torch.uint8)
