"""The `bge-rerank` command: its subcommands, error messages and exit statuses."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import click

from bge_rerank_integrations import __version__
from bge_rerank_integrations.cli.console import flush_stdout, prepare_streams, wrap
from bge_rerank_integrations.cli.demo import demo
from bge_rerank_integrations.cli.evaluate import evaluate_command
from bge_rerank_integrations.cli.info import check, info
from bge_rerank_integrations.cli.jobs.requests import MalformedInputError
from bge_rerank_integrations.cli.logs import warnings_on_stderr
from bge_rerank_integrations.cli.options import EXIT_BAD_DATA, name_options
from bge_rerank_integrations.cli.rank import rank
from bge_rerank_integrations.cli.rerank_run import rerank_run_command
from bge_rerank_integrations.cli.serve import serve
from bge_rerank_integrations.errors import ConfigError, InputError, RerankError


class _Failure(click.ClickException):
    """Ends the command with a message wrapped to the terminal's width."""

    def show(self, file: Any = None) -> None:
        click.echo(wrap(f"Error: {self.message}"), file=file, err=file is None)


class _BadData(_Failure):
    """Ends the command because its input contains no usable data."""

    exit_code = EXIT_BAD_DATA


class _WrongUsage(click.UsageError):
    """Reports wrong usage, with a message wrapped to the terminal's width."""

    def format_message(self) -> str:
        return wrap(f"Error: {self.message}")[len("Error: ") :]  # a line may end after the colon


class _Commands(click.Group):
    """Turns this package's errors into a message on stderr and an exit status."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        prepare_streams()
        with warnings_on_stderr():
            try:
                try:
                    return super().main(*args, **kwargs)
                except SystemExit as end:
                    if not end.code:
                        flush_stdout()
                    raise
            except OSError as error:  # after the command, or printed outside of `invoke`, as by --help
                if not kwargs.get("standalone_mode", True):
                    raise
                if not isinstance(error, BrokenPipeError):
                    _failure_of(error).show()
                sys.exit(_Failure.exit_code)
            finally:
                with suppress(OSError):  # it has been reported
                    flush_stdout()

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MalformedInputError as error:
            raise _BadData(name_options(str(error))) from error
        except (ConfigError, InputError) as error:
            raise _WrongUsage(name_options(str(error))) from error
        except RerankError as error:
            raise _Failure(name_options(str(error))) from error
        except BrokenPipeError:
            raise  # the reader of stdout has closed the pipe, and click exits without a message
        except OSError as error:
            raise _failure_of(error) from error


def _failure_of(error: OSError) -> _Failure:
    return _Failure(f"{error.filename or 'output'}: {error.strerror}")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="bge-rerank-integrations")
def main() -> None:
    """Rerank passages with BGE rerankers on your own hardware.

    \b
    bge-rerank demo                                   try it without any data
    bge-rerank rank requests.jsonl -o ranked.jsonl    rank many requests
    bge-rerank eval scifact/                          measure ranking quality
    bge-rerank info                                   show device and settings

    \b
    Exit status:
      0  The command succeeded.
      1  The command failed. The reason is on stderr.
      2  The command was used wrongly.
      3  The data is bad: the input of `rank` contains no request, `rank
         --strict` found a malformed line, or `check` found wrong scores.
    """


for _command in (demo, rank, rerank_run_command, evaluate_command, serve, info, check):
    main.add_command(_command)
