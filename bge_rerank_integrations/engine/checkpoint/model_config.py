"""Reads the shape of a model from config.json, and refuses models that would get wrong scores."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bge_rerank_integrations.config import ScorerConfig
from bge_rerank_integrations.engine.checkpoint.files import read_json, require_file
from bge_rerank_integrations.engine.checkpoint.mistaken_folders import (
    describe_other_model,
)
from bge_rerank_integrations.engine.shape import EncoderShape
from bge_rerank_integrations.errors import (
    ConfigError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)
from bge_rerank_integrations.runtime.tracebacks import raise_if_of_signal_handler

ARCHITECTURE: Final = "XLMRobertaForSequenceClassification"
# Settings in config.json that must be positive integers.
_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)


def read_shape(folder: Path) -> EncoderShape:
    """Read config.json.

    Raises:
        CheckpointNotFoundError: The file does not exist.
        CorruptCheckpointError: The file cannot be parsed, or has an invalid value.
        UnsupportedCheckpointError: The file describes something other than an XLM-RoBERTa cross-encoder with
            one label, or requires remote code.
    """
    data = read_json(require_file(folder, "config.json"))
    if "auto_map" in data:
        raise UnsupportedCheckpointError(
            f"{folder} requires custom code (auto_map), which this package never runs; use a plain "
            f"{ARCHITECTURE} checkpoint"
        )
    architectures = data.get("architectures") or [ARCHITECTURE]
    if not isinstance(architectures, list):
        raise CorruptCheckpointError(f"{folder / 'config.json'} is not valid: architectures must be a list")
    if data.get("model_type") != "xlm-roberta" or ARCHITECTURE not in architectures:
        raise UnsupportedCheckpointError(
            f"{folder} {describe_other_model(data.get('model_type'), data.get('architectures'))}"
        )
    # `from transformers import ...` can fail while another thread imports transformers for the first time,
    # since that package replaces its module at the end of the import. Its modules can be imported safely.
    from transformers.models.xlm_roberta.configuration_xlm_roberta import XLMRobertaConfig

    try:
        config = XLMRobertaConfig.from_dict(data)
    except Exception as error:  # the validation raises several unrelated types
        raise_if_of_signal_handler(error)
        raise CorruptCheckpointError(f"{folder / 'config.json'} is not valid: {error}") from error
    padding_idx = 1 if config.pad_token_id is None else config.pad_token_id
    # Some releases of transformers do not check the types.
    for name, value, least in (
        *((name, getattr(config, name), 1) for name in _SIZES),
        ("pad_token_id", padding_idx, 0),
    ):
        if type(value) is not int or value < least:
            raise CorruptCheckpointError(
                f"{folder / 'config.json'} is not valid: {name} must be an integer of at least {least}"
            )
    if padding_idx >= config.vocab_size:
        raise CorruptCheckpointError(
            f"{folder / 'config.json'} is not valid: pad_token_id must be less than vocab_size"
        )
    if type(config.layer_norm_eps) is not float or not 0 < config.layer_norm_eps < 1:
        raise CorruptCheckpointError(
            f"{folder / 'config.json'} is not valid: layer_norm_eps must be a number between 0 and 1"
        )
    for name, value, supported in (
        ("num_labels", config.num_labels, 1),
        ("hidden_act", config.hidden_act, "gelu"),
        ("position_embedding_type", data.get("position_embedding_type", "absolute"), "absolute"),
        ("is_decoder", bool(data.get("is_decoder", False)), False),
        ("hidden_size % num_attention_heads", config.hidden_size % config.num_attention_heads, 0),
    ):
        if value != supported:
            raise UnsupportedCheckpointError(
                f"{folder} has {name} = {value!r}; a cross-encoder with one relevance score needs "
                f"{supported!r}"
            )
    return EncoderShape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        type_vocab_size=config.type_vocab_size,
        padding_idx=padding_idx,
        layer_norm_eps=config.layer_norm_eps,
    )


def check_max_length(config: ScorerConfig, shape: EncoderShape) -> None:
    """Raise `ConfigError` if `max_length` is more than the number of positions of a model."""
    if config.max_length > shape.max_length:
        raise ConfigError(
            f"max_length {config.max_length} is more than the {shape.max_length} tokens that "
            f"{config.model!r} has positions for"
        )
