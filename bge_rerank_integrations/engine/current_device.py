"""What torch sets for a thread: the current CUDA device, the default device, autocast and compilation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Final, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")

_AUTOCAST_DEVICES: Final = ("cpu", "cuda", "mps")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device current in this block. For other devices the block does nothing.

    Torch's own operators use the device of their tensors. Kernels that are written in Python, new streams and
    CUDA graphs use the current device instead.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def without_thread_settings() -> Iterator[None]:
    """Load a model in this block as if the calling thread had not changed torch's settings.

    A default device would hold tensors that are meant for the CPU. Autocast would change the precision of
    products. Forward passes need no such block, since they run in threads of this package.
    """
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def not_compiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return a function that `torch.compile` does not compile, even if a compiled function calls it."""
    # Without this module nothing is being compiled, and importing it takes a second.
    if "torch._dynamo" not in sys.modules:
        return function
    disabled: Callable[_P, _T] = torch.compiler.disable(function)
    return disabled
