"""Options that several commands share. Those of a model are derived from `ScorerConfig`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
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
"""Exit status of unusable input data, and of `check` where the scores disagree."""

# Every setting of `ScorerConfig` is an option of the command line, except these.
_NOT_OPTIONS: Final = frozenset(
    {
        "normalize",  # `rank` declares its own; the other commands work on raw logits
        "max_wait_ms",  # for callers in many threads, and a command is one caller
        "max_queued_tokens",  # likewise
    }
)


_SCALARS: Final[dict[type, click.ParamType[Any]]] = {
    bool: click.BOOL,
    float: click.FLOAT,
    int: click.INT,
    str: click.STRING,
}


def output_option(*names: str, text: str) -> _Decorator:
    """Add an option that names a file to be written.

    Args:
        names: The option's names as they are typed.
        text: Its help.
    """
    kind = click.Path(dir_okay=False, writable=True, path_type=Path)
    return click.option(*names, type=kind, callback=_in_a_folder, help=text)


def config_options(default_model: str = DEFAULT_MODEL) -> _Decorator:
    """Add an option for each setting of a scorer; the command receives all of them as `config`.

    Name, type, choices, default and help come from `ScorerConfig`: the fields and their entries in its
    docstring. A new setting needs nothing here.

    Args:
        default_model: What `--model` is if it is not given.
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
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def quiet_option(command: _Command) -> _Command:
    """Add `--quiet`."""
    return click.option("--quiet", is_flag=True, help="Show no progress bar.")(command)


def shows_progress(quiet: bool) -> bool:
    """Return whether to show a progress bar: on a terminal, unless the user wants none."""
    return not quiet and sys.stderr.isatty()


def option_name(setting: str) -> str:
    """Return how a setting of `ScorerConfig` is typed on the command line.

    Example:
        >>> option_name("max_length")
        '--max-length'
    """
    return "--" + setting.replace("_", "-")


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
    """Return what parses the values of an annotation, such as `int | None` or `Literal["a", "b"]`.

    None stands for several strings, as in `tuple[str, ...]`.
    """
    if get_origin(hint) is Setting:
        _, hint = get_args(hint)  # the type that the config keeps
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    choices = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    if choices:
        return click.Choice([choice for choice in choices if choice is not None])
    scalars = [kind for scalar, kind in _SCALARS.items() if scalar in members]
    return scalars[0] if scalars else None


def _setting_texts() -> Iterator[tuple[str, str]]:
    """Give each setting its help: the first sentence of its entry in the docstring of `ScorerConfig`."""
    section = (inspect.getdoc(ScorerConfig) or "").partition("\nAttributes:\n")[2].partition("\n\n")[0]
    settings = {field.name for field in dataclasses.fields(ScorerConfig)}
    for name, entry in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
        sentence = re.split(r"(?<!e\.g|i\.e)\. ", " ".join(entry.split()))[0].removesuffix(".") + "."
        # What None means is what happens without the option.
        sentence = re.sub(r"[;:] None is (.*)\.$", r".  [default: \1]", sentence)
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
    """Refuse an output file whose folder does not exist, before any work is done."""
    if path is not None and not path.absolute().parent.is_dir():
        raise click.BadParameter(f"folder {str(path.parent)!r} does not exist", param=parameter)
    return path
