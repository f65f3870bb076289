"""The `bge-rerank` command: its subcommands, and how errors end it."""

from __future__ import annotations

from typing import Any

import click

from bge_rerank_integrations import __version__
from bge_rerank_integrations.cli.demo import demo
from bge_rerank_integrations.cli.evaluate import evaluate_command
from bge_rerank_integrations.cli.inspect import check, info
from bge_rerank_integrations.cli.options import EXIT_BAD_DATA
from bge_rerank_integrations.cli.rank import rank, rerank_run_command
from bge_rerank_integrations.cli.serve import serve
from bge_rerank_integrations.errors import ConfigError, InputError, RerankError
from bge_rerank_integrations.jobs import MalformedLineError


class _BadData(click.ClickException):
    exit_code = EXIT_BAD_DATA


class _Commands(click.Group):
    """Turns this package's errors into a line on stderr and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MalformedLineError as error:
            raise _BadData(str(error)) from error
        except (ConfigError, InputError) as error:
            raise click.UsageError(str(error)) from error
        except RerankError as error:
            raise click.ClickException(str(error)) from error
        except BrokenPipeError:
            raise  # click ends quietly: nobody is reading any more
        except OSError as error:
            raise click.ClickException(f"{error.filename or 'output'}: {error.strerror}") from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="bge-rerank-integrations")
def main() -> None:
    """Rerank passages with BGE rerankers, on your own hardware.

    \b
    bge-rerank demo                                       see it work, nothing needed
    bge-rerank rank requests.jsonl -o ranked.jsonl        rank many requests
    bge-rerank eval scifact/                              measure ranking quality
    bge-rerank info                                       what this machine would use

    Exit status: 0 done; 1 failed, with the reason on stderr; 2 wrong usage; 3 a malformed line under
    `rank --strict`, or scores that `check` finds wrong.
    """


for _command in (demo, rank, rerank_run_command, evaluate_command, serve, info, check):
    main.add_command(_command)
