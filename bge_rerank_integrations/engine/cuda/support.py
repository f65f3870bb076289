"""Finds out whether the installed torch has kernels for a CUDA device."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

# sm_90 is machine code for a device, and compute_90 is PTX, which the driver compiles. A letter limits the
# code to one device (a) or one family of devices (f).
_ARCHITECTURE = re.compile(r"(?P<kind>sm|compute)_(?P<major>\d+)(?P<minor>\d)(?P<limit>[af]?)")


def kernel_obstacle(device: torch.device) -> str | None:
    """Return why torch cannot run on a CUDA device and what to install; None if it can run there."""
    architectures = torch.cuda.get_arch_list()
    capability = torch.cuda.get_device_capability(device)
    # On AMD devices the names are of another kind. A build that names nothing is taken at its word.
    if torch.version.hip is not None or not architectures or has_kernels(architectures, capability):
        return None
    built_for = [_capability(match) for match in map(_ARCHITECTURE.fullmatch, architectures) if match]
    if built_for and capability < min(built_for):
        advice = "install a build of torch for an older CUDA version, which still has kernels for this device"
    else:
        advice = "install a newer build of torch"
    return (
        f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)!r} of compute "
        f"capability {capability[0]}.{capability[1]} (it has {', '.join(architectures)}); {advice} "
        "(see https://pytorch.org/get-started/locally/), or use device='cpu'"
    )


def has_kernels(architectures: Iterable[str], capability: tuple[int, int]) -> bool:
    """Return whether code for some architectures runs on a device.

    Machine code runs on devices of the same major capability and the same or a later minor capability. PTX
    runs on all later devices too.

    Args:
        architectures: Names as `torch.cuda.get_arch_list` returns them, such as sm_80 or compute_90.
        capability: Major and minor compute capability of the device.

    Example:
        >>> has_kernels(["sm_75", "sm_80"], (8, 6)), has_kernels(["sm_75", "sm_80"], (7, 0))
        (True, False)
    """
    for match in map(_ARCHITECTURE.fullmatch, architectures):
        if match is None:
            continue
        built_for = _capability(match)
        if match["limit"] == "a":
            runs = capability == built_for
        elif match["limit"] == "f" or match["kind"] == "sm":
            runs = capability[0] == built_for[0] and capability >= built_for
        else:
            runs = capability >= built_for
        if runs:
            return True
    return False


def _capability(match: re.Match[str]) -> tuple[int, int]:
    return int(match["major"]), int(match["minor"])
