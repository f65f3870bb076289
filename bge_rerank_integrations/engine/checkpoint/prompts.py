"""Reads the default prompt of a checkpoint that sentence-transformers saved.

`CrossEncoder.save_pretrained` writes three files in addition to those of transformers: `modules.json`,
`config_sentence_transformers.json` and `sentence_bert_config.json`. A prompt in these files is part of the
model: without it, the same pair gets another score. One difference to sentence-transformers remains. It
truncates the longer text of a pair that exceeds `max_length`; this package truncates the passage (see
`PairTokenizer`).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Final

from bge_rerank_integrations.engine.checkpoint.files import read_json
from bge_rerank_integrations.errors import CorruptCheckpointError, UnsupportedCheckpointError

_logger = logging.getLogger(__name__)

_MODULES: Final = "modules.json"
_SETTINGS: Final = "config_sentence_transformers.json"
# This package truncates by its own `max_length`, and the other settings do not change any token.
_HARMLESS_TEXT_SETTINGS: Final = frozenset(
    {"max_length", "padding", "pad_to_multiple_of", "return_tensors", "truncation"}
)


def read_default_prompt(folder: Path) -> str:
    """Return the text that sentence-transformers puts before each query of a cross-encoder by default.

    As in `sentence_transformers.CrossEncoder`, the files apply only if `modules.json` exists and the settings
    describe a cross-encoder.

    Returns:
        The prompt; an empty string if there is none.

    Raises:
        CorruptCheckpointError: A file is damaged, or names a default prompt that it does not define.
        UnsupportedCheckpointError: The files describe inputs that this package cannot build.
    """
    if not (folder / _MODULES).is_file() or not (folder / _SETTINGS).is_file():
        return ""
    settings = read_json(folder / _SETTINGS)
    if settings.get("model_type") != "CrossEncoder":
        return ""
    _check_modules(folder)
    _check_input_settings(folder)
    name = settings.get("default_prompt_name")
    if name is None:
        return ""
    prompts = settings.get("prompts")
    prompt = prompts.get(name, 0) if isinstance(prompts, dict) and isinstance(name, str) else 0
    if not isinstance(prompt, str | None):
        raise CorruptCheckpointError(
            f"{folder / _SETTINGS} defines no prompt for its default_prompt_name {name!r}; correct either one"
        )
    if prompt:
        _logger.info("adding the checkpoint's default prompt %r before each query", name)
    return prompt or ""


def _check_modules(folder: Path) -> None:
    try:
        modules = json.loads((folder / _MODULES).read_text(encoding="utf-8"))
        types = [str(module["type"]).rpartition(".")[2] for module in modules]
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptCheckpointError(
            f"{folder / _MODULES} is not a list of modules; download it again"
        ) from error
    if types != ["Transformer"]:
        raise _unsupported(
            folder,
            f"the modules {types}",
            "this package supports only a single Transformer with a relevance head",
        )


def _check_input_settings(folder: Path) -> None:
    for path in sorted(folder.glob("sentence_*config.json")):
        settings = read_json(path)
        task = settings.get("transformer_task", "sequence-classification")
        if task != "sequence-classification":
            raise _unsupported(
                folder,
                f"transformer_task {task!r}",
                "only 'sequence-classification' returns a relevance score",
            )
        if settings.get("do_lower_case"):
            raise _unsupported(
                folder, "do_lower_case", "add a Lowercase normalizer to tokenizer.json and remove the setting"
            )
        if "message" in _object(settings.get("modality_config")):
            raise _unsupported(
                folder,
                "a chat template",
                "pass its text as query_instruction= and passage_instruction=, and remove 'message' from "
                "modality_config",
            )
        text_settings = _object(_object(settings.get("processing_kwargs")).get("text"))
        others = sorted(set(text_settings) - _HARMLESS_TEXT_SETTINGS)
        if others:
            raise _unsupported(folder, f"processing_kwargs {others} for text", "save it again without them")


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _unsupported(folder: Path, what: str, advice: str) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        f"{folder} was saved by sentence-transformers with {what}, so its scores would differ here; {advice}"
    )
