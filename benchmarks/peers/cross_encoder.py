"""`CrossEncoder` of sentence-transformers."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from benchmarks.common import MAX_LENGTH, Pairs, cpu_features
from benchmarks.models import Setup
from benchmarks.peers.contender import Contender, batch_sizes, longest_first, watch_module

_DEFAULT_BATCH_SIZE = 32


def load(kind: str, setup: Setup, _: ExitStack) -> Contender:
    """Load `CrossEncoder` with its defaults, or with its fastest settings.

    Args:
        kind: `default`; `best`, in the 16-bit precision of the device; or `best-float32`. The last two sort
            pairs by length and choose a batch size. On some CPUs float32 is faster than bfloat16.
        setup: The model and the device.
    """
    from sentence_transformers import CrossEncoder

    best = kind != "default"
    dtype = best_dtype(setup) if kind == "best" else "float32"
    options = {"torch_dtype": getattr(torch, dtype), "attn_implementation": "sdpa"} if best else {}
    encoder = CrossEncoder(str(setup.plain), device=setup.device, max_length=MAX_LENGTH, model_kwargs=options)

    def run(pairs: Pairs, batch_size: int | None) -> list[float]:
        # By default it applies a sigmoid, which hides differences between logits.
        def predict(pairs: Pairs) -> list[float]:
            logits = encoder.predict(
                pairs, batch_size=batch_size or _DEFAULT_BATCH_SIZE, activation_fn=torch.nn.Identity()
            )
            return list(map(float, logits))

        return longest_first(pairs, predict) if best else predict(pairs)

    return Contender(
        name="CrossEncoder, best" if best else "CrossEncoder",
        dtype=dtype,
        run=run,
        watch=watch_module(encoder.model),
        batch_sizes=batch_sizes(setup) if best else (),
        batch_size=_DEFAULT_BATCH_SIZE,
    )


def best_dtype(setup: Setup) -> str:
    """Return the 16-bit precision that is fast on the device, or float32 if there is none."""
    if setup.on_cuda:
        return "float16"
    return "bfloat16" if cpu_features("bf16") else "float32"
