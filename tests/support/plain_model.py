"""The model from transformers, which tests compare with every fast path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def load_plain_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load `XLMRobertaForSequenceClassification` with eager attention."""
    from transformers import XLMRobertaForSequenceClassification

    model: Any = XLMRobertaForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    return model.to(dtype).eval()
