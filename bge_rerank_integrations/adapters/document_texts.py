"""The texts that `BGEReranker` scores, from LangChain documents, mappings and strings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from string import Formatter
from typing import Any

from langchain_core.documents import Document

from bge_rerank_integrations.adapters.results import is_missing, type_of
from bge_rerank_integrations.errors import ConfigError, InputError, InputTypeError
from bge_rerank_integrations.validation import refuse_without_order

TextSource = str | Mapping[str, Any] | Document


def texts_of(
    documents: Sequence[TextSource], rank_fields: Sequence[str] | None, template: str | None
) -> list[str]:
    """Return the text to score of each document.

    Args:
        documents: Strings, mappings or `Document`s.
        rank_fields: Names of the fields to put before the text, one line for each. None means all fields of a
            mapping and no field of a `Document`.
        template: A checked template for the texts of `Document`s. None uses `rank_fields`.

    Raises:
        InputError: A document cannot be converted to a text; `.index` says which one.
    """
    if isinstance(documents, str | Mapping | Document) or not isinstance(documents, Iterable):
        raise InputTypeError("documents must be a sequence of strings, mappings or Documents")
    refuse_without_order("documents", documents)
    return [_text(index, document, rank_fields, template) for index, document in enumerate(documents)]


def check_fields(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of fields as a tuple. An iterator could be read for one document only.

    Raises:
        InputTypeError: The names are not strings.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InputTypeError(f"rank_fields must be a sequence of names, not {type(names).__name__}")
    fields = tuple(names)
    for position, name in enumerate(fields):
        if not isinstance(name, str):
            raise InputTypeError(
                f"name {position} of rank_fields must be a string, not {type(name).__name__}", index=position
            )
    return fields


def check_template(template: str) -> None:
    """Raise `ConfigError` unless a template is a format string of plain names with `page_content`."""
    try:
        fields = _template_fields(template)
    except ValueError as error:
        raise ConfigError(f"document_template is not a valid format string: {error}") from None
    if "page_content" not in fields:
        raise ConfigError("document_template must contain {page_content}")


def _text(index: int, document: TextSource, rank_fields: Sequence[str] | None, template: str | None) -> str:
    if isinstance(document, str):
        return document
    if isinstance(document, Document):
        _check_document(document, index)
        if template is not None:
            return _fill(template, document, index)
        return "\n".join([*_lines(document.metadata, rank_fields or (), index), document.page_content])
    if isinstance(document, Mapping):
        return "\n".join(_lines(document, document if rank_fields is None else rank_fields, index))
    raise InputTypeError(
        f"document {index} must be a string, a mapping or a Document, not {type_of(document)}",
        index=index,
    )


def _check_document(document: Document, index: int) -> None:
    """Raise unless the fields of a document have the right types. Pydantic does not check assignments."""
    if not isinstance(document.page_content, str):
        raise InputTypeError(
            f"the page_content of document {index} must be a string, not "
            f"{type(document.page_content).__name__}",
            index=index,
        )
    if not isinstance(document.metadata, dict):
        raise InputTypeError(
            f"the metadata of document {index} must be a dict, not {type(document.metadata).__name__}",
            index=index,
        )


def _lines(values: Mapping[str, Any], names: Sequence[str] | Mapping[str, Any], index: int) -> list[str]:
    present = [name for name in names if name in values and not is_missing(values[name])]
    try:
        return [f"{name}: {values[name]}" for name in present]
    except Exception:  # of the value's class; the message may contain the value
        raise InputError(
            f"a field of document {index} cannot be converted to a string", index=index
        ) from None


class _Empty:
    """Formats as an empty string, with every conversion and format specification."""

    def __format__(self, spec: str) -> str:
        return ""

    def __repr__(self) -> str:
        return ""


def _template_fields(template: str) -> set[str]:
    """Return the names of the fields of a format string. Fields must be plain names."""
    fields = set()
    for _, name, spec, conversion in Formatter().parse(template):
        if name is not None:
            if conversion not in (None, "", "r", "s", "a"):
                raise ValueError(f"!{conversion} is not a conversion; use !r, !s or !a")
            # Attributes, items and nested fields would give a template access to the inside of objects.
            if not name.isidentifier():
                raise ValueError(f"{name!r} is not the name of a metadata field")
            if "{" in (spec or ""):
                raise ValueError(f"the format specification of {name!r} contains another field")
            if name == "page_content":
                format("", spec or "")  # raises ValueError unless the specification fits a string
            fields.add(name)
    return fields


def _fill(template: str, document: Document, index: int) -> str:
    metadata = {name: _Empty() if is_missing(value) else value for name, value in document.metadata.items()}
    values = {**metadata, "page_content": document.page_content}
    missing = sorted(_template_fields(template) - set(values))
    if missing:
        raise InputError(
            f"document {index} lacks the metadata field(s) {missing} of document_template", index=index
        )
    try:
        return template.format_map(values)
    except Exception:  # of the value's class, or of its format; the message may contain the value
        raise InputError(
            f"a metadata field of document {index} does not fit its format in document_template", index=index
        ) from None
