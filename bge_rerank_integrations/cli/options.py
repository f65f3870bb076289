"""Options that several commands share. The model's options are derived from `ScorerConfig`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import click

from bge_rerank_integrations.config import DEFAULT_MODEL, ScorerConfig, Setting

_Command = Callable[..., None]
_Decorator = Callable[[_Command], _Command]

EXISTING_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING_FOLDER: Final = click.Path(exists=True, file_okay=False, path_type=Path)

EXIT_BAD_DATA: Final = 3
"""Exit status for unusable input data, and for `check` if the scores disagree."""

# Every setting of `ScorerConfig` is an option of the command line, except these.
_NOT_OPTIONS: Final = frozenset(
    {
        "normalize",  # `rank` declares this option itself; the other commands use raw logits
        "max_wait_ms",  # only useful with concurrent callers, and a command is a single caller
        "max_queued_tokens",  # only useful with concurrent callers
    }
)

# Options of single commands that set neither a setting of `ScorerConfig` nor have another name in Python.
_OTHER_OPTIONS: Final = frozenset({"grace_s", "max_body_mib", "timeout_s", "top_n"})

# A setting as Python names it, with its value if there is one. A name that is part of a path or in quotes, as
# an id of the user's data, does not match.
_SETTING: Final = re.compile(
    r"""(?<![\w/."'-])(?:with (?P<off>[a-z0-9_]+)=False|(?P<name>[a-z0-9_]+)"""
    r"""(?:=(?P<value>True|[0-9]+|"[^"]*"|'[^']*'))?)(?![\w/])"""
)

_SCALARS: Final[dict[type, click.ParamType[Any]]] = {
    bool: click.BOOL,
    float: click.FLOAT,
    int: click.INT,
    str: click.STRING,
}


def output_option(*names: str, text: str, may_be_folder: bool = False) -> _Decorator:
    """Add an option that names an output file.

    Args:
        names: The option's names as users type them.
        text: The option's help text.
        may_be_folder: Accept an existing folder too.
    """
    kind = click.Path(dir_okay=may_be_folder, writable=True, path_type=Path)
    return click.option(*names, type=kind, callback=_in_a_folder, help=text)


def config_options(default_model: str = DEFAULT_MODEL) -> _Decorator:
    """Add an option for each setting of a scorer; the command receives all of them as `config`.

    The name, type, choices, default and help text of each option come from the fields of `ScorerConfig`
    and their entries in its docstring. A new setting becomes an option without any change here.

    Args:
        default_model: Default value of `--model`.
    """
    names = [field.name for field in dataclasses.fields(ScorerConfig) if field.name not in _NOT_OPTIONS]
    standard = ScorerConfig(model=default_model)
    defaults = {name: getattr(standard, name) for name in names}
    hints, texts = get_type_hints(ScorerConfig), dict(_setting_texts())

    def decorate(command: _Command) -> _Command:
        @functools.wraps(command)
        def with_config(**values: Any) -> None:
            config = ScorerConfig(**{name: values.pop(name) for name in names})
            command(config=config, **values)

        decorated: _Command = with_config
        for name in reversed(names):
            option = _setting_option(name, hints[name], defaults[name], texts.get(name))
            decorated = option(decorated)
        return decorated

    return decorate


def json_option(command: _Command) -> _Command:
    """Add `--json`, which the command receives as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")(command)


def quiet_option(command: _Command) -> _Command:
    """Add `--quiet`."""
    return click.option("--quiet", is_flag=True, help="Do not show a progress bar.")(command)


def shows_progress(quiet: bool) -> bool:
    """Return whether to show a progress bar: only on a terminal, and not with `--quiet`."""
    return not quiet and sys.stderr.isatty()


def option_name(setting: str) -> str:
    """Return the command-line option for a setting of `ScorerConfig`.

    Example:
        >>> option_name("max_length")
        '--max-length'
    """
    return "--" + setting.replace("_", "-")


def name_options(message: str) -> str:
    """Return a message with settings named as options of the command line.

    A setting whose name is also an English word, such as `model`, changes only if it has a value.

    Args:
        message: A message that names settings as Python does.

    Example:
        >>> name_options("use long_passages='windows', or a smaller max_length")
        'use --long-passages windows, or a smaller --max-length'
    """
    settings = {field.name for field in dataclasses.fields(ScorerConfig)} | _OTHER_OPTIONS

    def replace(match: re.Match[str]) -> str:
        name, value = match["off"] or match["name"], match["value"]
        if name not in settings or (value is None and not match["off"] and "_" not in name):
            return match[0]
        if match["off"]:
            return f"without {option_name(name)}"
        return _as_typed(name, None if value in (None, "True") else value.strip("\"'"))

    return _SETTING.sub(replace, message)


def _setting_option(name: str, hint: Any, default: Any, text: str | None) -> _Decorator:
    kind = _parameter_type(hint)
    declared = option_name(name)
    if kind is click.BOOL:
        declared += f"/--no-{declared.removeprefix('--')}" if default else ""
        return click.option(declared, name, is_flag=True, default=default, help=text)
    if kind is None:
        return click.option(declared, name, callback=_split, metavar="NAME,NAME,...", help=text)
    return click.option(
        declared, name, type=kind, default=default, show_default=default is not None, help=text
    )


def _parameter_type(hint: Any) -> click.ParamType[Any] | None:
    """Return the click type for an annotation, such as `int | None` or `Literal["a", "b"]`.

    None means several strings separated by commas, as in `tuple[str, ...]`.
    """
    if get_origin(hint) is Setting:
        _, hint = get_args(hint)  # the type that the config stores
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    choices = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    if choices:
        return click.Choice([choice for choice in choices if choice is not None])
    scalars = [kind for scalar, kind in _SCALARS.items() if scalar in members]
    return scalars[0] if scalars else None


def _setting_texts() -> Iterator[tuple[str, str]]:
    """Yield each setting's name and help: the first sentence of its entry in `ScorerConfig`'s docstring."""
    section = (inspect.getdoc(ScorerConfig) or "").partition("\nAttributes:\n")[2].partition("\n\n")[0]
    settings = {field.name for field in dataclasses.fields(ScorerConfig)}
    for name, entry in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
        sentence = re.split(r"(?<!e\.g|i\.e)\. ", " ".join(entry.split()))[0].removesuffix(".") + "."
        # The docstring says what None means. On the command line, an option that is not given is None.
        sentence = re.sub(r"[;:] None means (.*)\.$", r".  [default: \1]", sentence)
        yield (
            name,
            re.sub(
                r"""`(\w+)(?:="(\w+)")?`""",
                lambda match: _as_typed(match[1], match[2]) if match[1] in settings else match[0],
                sentence,
            ),
        )


def _as_typed(setting: str, value: str | None) -> str:
    return option_name(setting) if value is None else f"{option_name(setting)} {value}"


def _split(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(part.strip() for part in value.split(","))


def _in_a_folder(_: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Reject an output file that cannot be created in its folder, before the command does any work."""
    if path is not None and not path.exists():
        folder = Path(os.path.realpath(path)).parent  # a link may lead to another folder
        if not folder.is_dir():
            raise click.BadParameter(f"folder {str(folder)!r} does not exist", param=parameter)
        if not os.access(folder, os.W_OK):
            raise click.BadParameter(f"folder {str(folder)!r} is not writable", param=parameter)
    return path
