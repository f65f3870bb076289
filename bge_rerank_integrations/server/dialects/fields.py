"""Reads single fields of a request. Clients send different types, and every clear value is accepted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from bge_rerank_integrations.errors import InputError, InputTypeError

_FLAGS: Final[Mapping[Any, bool]] = {
    True: True,  # and 1, which equals it
    False: False,  # and 0
    "true": True,
    "1": True,
    "false": False,
    "0": False,
}
_MAX_NAME_CHARACTERS: Final = 256

EXAMPLE_QUERY: Final = "what does a panda eat?"
EXAMPLE_TEXTS: Final = ["Tea is hot.", "Pandas eat bamboo."]

TEXT_SCHEMA: Final = {"type": "string"}
FLAG_SCHEMA: Final = {"type": ["boolean", "null"]}
MODEL_SCHEMA: Final = {"type": ["string", "null"], "description": "any name; the response repeats it"}
RAW_SCORES_SCHEMA: Final = {**FLAG_SCHEMA, "description": "true returns logits, not scores from 0 to 1"}
ACTIVATION_SCHEMA: Final = {**FLAG_SCHEMA, "description": "false returns logits, not scores from 0 to 1"}
RETURN_TEXTS_SCHEMA: Final = {**FLAG_SCHEMA, "description": "true returns each text with its score"}
COUNT_SCHEMA: Final = {
    "type": ["integer", "null"],
    "minimum": 0,
    "description": "maximum number of results; 0 and null return all",
}
RANK_FIELDS_SCHEMA: Final = {
    "type": ["array", "null"],
    "items": {"type": "string"},
    "description": "fields of document objects to score; null is `text`",
}
DOCUMENTS_SCHEMA: Final = {
    "type": "array",
    "items": {"anyOf": [{"type": "string"}, {"type": "object", "properties": {"text": {"type": "string"}}}]},
}


def read_text(body: Mapping[str, Any], name: str) -> str:
    """Return a required text. An object with the field `text` is accepted too."""
    return _text(_required(body, name), f"the field {name!r}")


def read_texts(body: Mapping[str, Any], name: str, rank_fields: Sequence[str] = ("text",)) -> list[str]:
    """Return a required list of texts.

    Args:
        body: The request.
        name: Name of the field.
        rank_fields: Names of the fields of an object that are its text. Several fields become lines
            `name: value`.
    """
    values = _required(body, name)
    if not isinstance(values, list):
        raise InputTypeError(f"the field {name!r} must be a list of strings, not {type(values).__name__}")
    return [
        _text(value, f"item {index} of {name!r}", rank_fields, index) for index, value in enumerate(values)
    ]


def read_count(body: Mapping[str, Any], name: str) -> int | None:
    """Return an optional count. A missing field, null and 0 mean no limit, and give None."""
    value = body.get(name)
    if isinstance(value, str):
        value = int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputTypeError(f"the field {name!r} must be an integer or null, not {type(value).__name__}")
    if value < 0:
        raise InputError(f"the field {name!r} must not be negative")
    return value or None


def read_number(body: Mapping[str, Any], name: str) -> float | None:
    """Return an optional number."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputTypeError(f"the field {name!r} must be a number or null, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"the field {name!r} is out of range")
    return number


def read_flag(body: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """Return an optional boolean. Strings such as "true" are accepted too."""
    value = body.get(name)
    if value is None:
        return default
    scalar = value.lower() if isinstance(value, str) else value
    flag = _FLAGS.get(scalar) if isinstance(scalar, str | int | float) else None
    if flag is None:
        raise InputTypeError(f"the field {name!r} must be a boolean or null, not {type(value).__name__}")
    return flag


def read_model(body: Mapping[str, Any]) -> str | None:
    """Return the name of the model in a request, or None if it is missing or too long."""
    name = body.get("model")
    return name if isinstance(name, str) and 0 < len(name) <= _MAX_NAME_CHARACTERS else None


def read_raw_scores(body: Mapping[str, Any]) -> bool:
    """Return whether a body asks for raw logits, by either of the two names of this option."""
    return read_flag(body, "raw_scores") or not read_flag(body, "use_activation", default=True)


def read_rank_fields(body: Mapping[str, Any]) -> list[str]:
    """Return the names of the fields of document objects to score."""
    names = body.get("rank_fields") or ["text"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputTypeError("the field 'rank_fields' must be a list of strings or null")
    return names


def _required(body: Mapping[str, Any], name: str) -> Any:
    if body.get(name) is None:
        raise InputError(f"the field {name!r} is missing")
    return body[name]


def _text(value: Any, what: str, rank_fields: Sequence[str] = ("text",), index: int | None = None) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        values = {name: value[name] for name in rank_fields if isinstance(value.get(name), str)}
        if len(rank_fields) == 1 and values:
            return str(*values.values())
        if values:
            return "\n".join(f"{name}: {text}" for name, text in values.items())
        raise InputError(f"{what} is an object without the text to score", index=index)
    raise InputTypeError(
        f"{what} must be a string or an object with a text, not {type(value).__name__}", index=index
    )
