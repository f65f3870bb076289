"""The linear layer of a model in int8, and the implementations of its product."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bge_rerank_integrations.engine.cpu.int8_support import has_onednn_products
from bge_rerank_integrations.engine.cpu.shared_work import share

Floats = npt.NDArray[np.float32]

Product = Callable[[Tensor], Floats]
"""Multiplies uint8 codes [rows, in] with a weight: float32 [rows, out]."""

_MAX_WEIGHT = 127
# oneDNN chooses the layout of a weight for this number of rows. The layout also works for other numbers.
_TYPICAL_ROWS = 256


class Int8Linear:
    """A linear layer whose weight is int8 with a scale for each output channel.

    Args:
        weight: float32 [out, in].
        bias: float32 [out].

    Attributes:
        product: Multiplies codes with the weight.
        bias: float32 [out].
        offset: float32 [out], the product of a row of ones with the weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / _MAX_WEIGHT
        codes = (weight / scale[:, None]).round().to(torch.int8)
        self.product = resolve_product()(codes, scale)
        self.bias: Floats = bias.numpy()
        self.offset: Floats = (codes.sum(1, dtype=torch.int32) * scale).numpy()


def resolve_product() -> Callable[[Tensor, Tensor], Product]:
    """Choose the implementation of products on this machine.

    Returns:
        A function that makes a `Product` from an int8 weight [out, in] and its scale [out].
    """
    return onednn_product if has_onednn_products() else int16_product


def onednn_product(weight: Tensor, scale: Tensor) -> Product:
    """Run oneDNN's int8 products, on CPUs with VNNI or AMX."""
    zero_points = torch.zeros(len(scale), dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(weight, [_TYPICAL_ROWS, weight.shape[1]])

    def product(codes: Tensor) -> Floats:
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, packed, scale, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return result.numpy()

    return product


def int16_product(weight: Tensor, scale: Tensor) -> Product:
    """Run this package's own products in int16, on CPUs with AVX2 that lack VNNI."""
    # Compiled only where it is used. The processor, or a setting of numba, may exclude its instructions.
    from bge_rerank_integrations.engine.cpu.int16_products import multiply_panels, pack_panels

    num_channels = len(weight)
    factors = scale.numpy()
    panels = pack_panels(weight.numpy())

    def product(codes: Tensor) -> Floats:
        result = np.empty((len(codes), num_channels), np.float32)
        rows = codes.numpy()
        share(lambda first, end: multiply_panels(rows, panels, factors, first, end, result), len(panels))
        return result

    return product
