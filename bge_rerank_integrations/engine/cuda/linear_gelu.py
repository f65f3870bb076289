"""Decides whether one kernel for a product, its bias and GELU is used, by running it once at load."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from bge_rerank_integrations.engine.current_device import on_device
from bge_rerank_integrations.runtime.tracebacks import first_line, raise_if_of_signal_handler

logger = logging.getLogger(__name__)

LinearGelu = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps x [rows, in], a weight [out, in] and a bias [out] to the exact GELU of x @ weight.t() + bias."""

Timer = Callable[[Callable[[], object], torch.device], float]
"""Returns the seconds that a device needs for one call of a function."""

# The results are compared on a number of rows that fills no tile, and on one for which each program of the
# kernel works on several tiles. The speed is compared on these numbers of rows.
_NUM_COMPARED_ROWS: Final = 37
_TIMED_ROWS: Final = (512, 2048, 8192)
# The kernel must need at most this share of the time, so that noise does not decide.
_MAX_SHARE: Final = 0.97
_NUM_CALLS: Final = 10
_NUM_ROUNDS: Final = 3
# About three milliseconds, in which the host can launch all calls of a round.
_HEAD_START_CYCLES: Final = 5_000_000


def plain_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute the product, the bias and GELU in float32 with torch's own operators."""
    return F.gelu(F.linear(x.float(), weight.float()) + bias.float()).to(x.dtype)


def device_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a CUDA device computes for one call of a function, excluding the launch."""
    function()
    rounds: list[float] = []
    with on_device(device):
        for _ in range(_NUM_ROUNDS):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_HEAD_START_CYCLES)  # the device waits until everything below is launched
            began.record()
            for _ in range(_NUM_CALLS):
                function()
            ended.record()
            ended.synchronize()
            rounds.append(began.elapsed_time(ended) / 1000 / _NUM_CALLS)
    return min(rounds)


@torch.inference_mode()
def least_fused_rows(
    fused: LinearGelu,
    separate: LinearGelu,
    device: torch.device,
    dtype: torch.dtype,
    widths: tuple[int, int],
    seconds: Timer = device_seconds,
) -> int | None:
    """Compare a fused kernel with separate ones, and decide where it is used. Log the choice. Never raises.

    The library's product is often faster than the product in the fused kernel. The fused kernel, however,
    saves one write and one read of the product. Which is faster depends on the device and on the number of
    rows.

    Args:
        fused: One kernel for everything.
        separate: The library's product, and another kernel after it.
        device: The device to run on.
        dtype: The precision of the inputs.
        widths: The hidden size and the intermediate size of the model.
        seconds: Measures a function.

    Returns:
        The least number of rows for which the fused kernel is used; None if it is wrong, fails or is never
        faster.
    """
    try:
        check_linear_gelu(fused, device, dtype, widths)
        least = _least_rows(fused, separate, device, dtype, widths, seconds)
    except Exception as error:  # the compiler, the driver, the comparison or the memory failed
        raise_if_of_signal_handler(error)
        reason = first_line(error)
        logger.info("GELU after the up projection on %s: %s: %s", device, type(error).__name__, reason)
        return None
    if least is None:
        logger.info("GELU after the up projection on %s: the fused kernel is not faster", device)
    else:
        logger.info("GELU in the kernel of the up projection on %s: from %d rows on", device, least)
    return least


def check_linear_gelu(
    fused: LinearGelu, device: torch.device, dtype: torch.dtype, widths: tuple[int, int]
) -> None:
    """Compare a kernel with torch's own operators in float32.

    Raises:
        AssertionError: The results differ by more than rounding.
    """
    expected = plain_linear_gelu(*_inputs(_NUM_COMPARED_ROWS, device, dtype, widths))
    for num_rows in (_NUM_COMPARED_ROWS, max(_TIMED_ROWS)):
        # The inputs repeat the same rows.
        result = fused(*_inputs(num_rows, device, dtype, widths))
        torch.testing.assert_close(result, _repeat(expected, num_rows))


def _least_rows(
    fused: LinearGelu,
    separate: LinearGelu,
    device: torch.device,
    dtype: torch.dtype,
    widths: tuple[int, int],
    seconds: Timer,
) -> int | None:
    """Return the number of rows from which on the fused kernel is faster; None if it never is."""
    least = None
    for num_rows in sorted(_TIMED_ROWS, reverse=True):
        inputs = _inputs(num_rows, device, dtype, widths)
        if seconds(partial(fused, *inputs), device) > _MAX_SHARE * seconds(
            partial(separate, *inputs), device
        ):
            break
        least = num_rows
    return least


def _inputs(
    num_rows: int, device: torch.device, dtype: torch.dtype, widths: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random rows, a weight and a bias. The sums have a standard deviation of about 1."""
    width, inner = widths
    generator = torch.Generator().manual_seed(0)
    # Repeat a few rows: random numbers for thousands of rows would take longer than everything else here.
    few = torch.randn(min(num_rows, _NUM_COMPARED_ROWS), width, dtype=torch.float32, generator=generator).to(
        device, dtype
    )
    weight = torch.randn(inner, width, dtype=torch.float32, generator=generator).to(device) * width**-0.5
    bias = torch.randn(inner, dtype=torch.float32, generator=generator).to(device, dtype)
    return _repeat(few, num_rows), weight.to(dtype), bias


def _repeat(rows: Tensor, num_rows: int) -> Tensor:
    return rows.repeat(-(-num_rows // len(rows)), 1)[:num_rows]
