"""`bge-rerank serve` as a process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import httpx

from tests.support.servers import wait_until

PATIENCE_S = 300.0  # a process that imports torch on a busy machine


class Server:
    """A running command, what it printed so far, and a client of it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_until(lambda: "Listening on" in self.output or process.poll() is not None, PATIENCE_S)
        found = re.search(r"Listening on (http://\S+),", self.output)
        self.url = found[1] if found else ""

    @property
    def port(self) -> int:
        return httpx.URL(self.url).port or 0

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_until_ready(self) -> None:
        with httpx.Client(base_url=self.url, timeout=PATIENCE_S) as client:
            wait_until(lambda: client.get("/health/ready").status_code == 200, PATIENCE_S)

    def end(self, patience_s: float = PATIENCE_S) -> int:
        """Wait until the process has ended, and return its exit status."""
        status = self.process.wait(patience_s)
        self._reader.join(PATIENCE_S)
        return status

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))


@contextmanager
def serving(
    *arguments: str, key: str | None = None, port: int = 0, max_open_files: int | None = None
) -> Iterator[Server]:
    """Run `bge-rerank serve` in a process of its own, and give it once it listens.

    Args:
        arguments: Options of the command.
        key: The API key; None asks for none.
        port: Port to listen on; 0 takes a free one.
        max_open_files: The process starts with this soft limit.
    """
    environment = {name: value for name, value in os.environ.items() if name != "BGE_RERANK_API_KEY"}
    command = [sys.executable, "-m", "bge_rerank_integrations.cli", "serve", "--port", str(port), *arguments]
    process = subprocess.Popen(
        command,
        env=environment if key is None else {**environment, "BGE_RERANK_API_KEY": key},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=None if max_open_files is None else partial(_limit_open_files, max_open_files),
    )
    try:
        yield Server(process)
    finally:
        process.kill()
        process.wait()


def _limit_open_files(soft: int) -> None:
    import resource  # not on Windows

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
