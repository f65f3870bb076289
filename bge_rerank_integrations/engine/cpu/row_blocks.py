"""Runs the parts of a layer on a block of rows at a time, so that oneDNN compiles few kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from bge_rerank_integrations.engine.blocks import Blocks, Norm, Parameters, Rows

# Rows in a block for each thread that computes it. With fewer rows, products are less efficient. With more
# rows, the values between two products leave the cache.
_BLOCK_ROWS: Final = 256
# Batches are padded to a multiple of this number of rows. A vector instruction multiplies 16 rows in some
# precisions, so fewer rows take the same time.
ROW_MULTIPLE: Final = 16


class RowBlocks:
    """Runs each part of a layer on blocks of 256 rows. The last block has the remaining rows.

    oneDNN compiles a kernel for each number of rows and keeps it, which takes about a megabyte. If every
    batch is padded to a multiple of `ROW_MULTIPLE` rows, its blocks have one of only 16 numbers of rows.

    Where several threads share each operation, a block has 256 rows for each of them.

    Args:
        blocks: Makes the parts. They must not quantize rows.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    def embed(self, token_type: Tensor, norm: Norm) -> Callable[[Tensor, Tensor], Rows]:
        """See `Blocks`."""
        return self._blocks.embed(token_type, norm)

    def project(self, linear: Parameters, before: Norm) -> Callable[[Rows], Tensor]:
        """See `Blocks`."""
        run, width = self._blocks.project(linear, before), len(linear.bias)

        def run_block(values: Tensor) -> Tensor:
            return run(Rows(values))

        return lambda rows: _run_in_blocks(run_block, width, rows.values)

    def attention_output(self, linear: Parameters, norm: Norm) -> Callable[[Tensor, Rows], Rows]:
        """See `Blocks`."""
        run, width = self._blocks.attention_output(linear, norm), len(linear.bias)

        def run_block(attended: Tensor, residual: Tensor) -> Tensor:
            return run(attended, Rows(residual)).values

        return lambda attended, residual: Rows(_run_in_blocks(run_block, width, attended, residual.values))

    def feed_forward(
        self, up: Parameters, down: Parameters, before: Norm, norm: Norm
    ) -> Callable[[Rows], Rows]:
        """See `Blocks`."""
        run, width = self._blocks.feed_forward(up, down, before, norm), len(down.bias)

        def run_block(values: Tensor) -> Tensor:
            return run(Rows(values)).values

        return lambda rows: Rows(_run_in_blocks(run_block, width, rows.values))


def _run_in_blocks(run: Callable[..., Tensor], width: int, *inputs: Tensor) -> Tensor:
    """Call a function with a block of each input at a time, and put its results together.

    Args:
        run: Maps blocks of the inputs, each [block, ...], to [block, width].
        width: Number of columns of a result.
        inputs: Tensors with the same number of rows.

    Returns:
        The results of all rows, [rows, width].
    """
    num_rows = len(inputs[0])
    size = _BLOCK_ROWS * torch.get_num_threads()
    if num_rows <= size:
        return run(*inputs)
    result = inputs[0].new_empty(num_rows, width)
    for start in range(0, num_rows, size):
        block = slice(start, start + size)
        result[block] = run(*(each[block] for each in inputs))
    return result
