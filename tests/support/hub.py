"""A small model hub on the loopback interface, which the hub library downloads from."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the hub does, and what it was asked for.

    Attributes:
        url: The URL of the hub.
        repositories: The folder of each repository, by the name of the repository.
        refusals: The status and the error code of repositories that the hub refuses to show.
        cuts: Names of files whose connection the hub closes after half of the file.
        stalls: Names of files of which the hub sends only one half, until the name is removed.
        commit: The commit of the branch `main`. Each older commit has the same files.
        downloads: Names of the files that were downloaded.
    """

    url: str
    repositories: dict[str, Path]
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    cuts: set[str] = field(default_factory=set)
    stalls: set[str] = field(default_factory=set)
    commit: str = COMMIT
    downloads: list[str] = field(default_factory=list)


@contextmanager
def running_hub(repositories: dict[str, Path]) -> Iterator[Hub]:
    """Run a hub with these repositories in another thread."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            is_api = parts[:2] == ["api", "models"]
            name = "/".join(parts[2:4] if is_api else parts[:2])
            kind, revision, *path = (parts[4:] if is_api else parts[2:]) or ("", "")
            if name in hub.refusals:
                self._refuse(*hub.refusals[name])
            elif name not in hub.repositories:
                self._refuse(401, "RepoNotFound")
            elif revision not in ("main", COMMIT, hub.commit):
                self._refuse(404, "RevisionNotFound")
            elif kind == "revision":
                commit = hub.commit if revision == "main" else revision
                self._send_json({"id": name, "sha": commit, "siblings": _siblings(hub.repositories[name])})
            elif kind == "tree":
                self._send_json(_tree(hub.repositories[name]))
            else:
                self._send_file(hub.repositories[name] / "/".join(path), revision)

        def _refuse(self, status: int, code: str) -> None:
            self._send(status, {"x-error-code": code, "x-error-message": code}, b"")

        def _send_json(self, value: object) -> None:
            self._send(200, {"content-type": "application/json"}, json.dumps(value).encode())

        def _send_file(self, file: Path, commit: str) -> None:
            if not file.is_file():
                self._refuse(404, "EntryNotFound")
                return
            content = file.read_bytes()
            headers = {"etag": f'"{_blob_id(content)}"', "x-repo-commit": commit, "accept-ranges": "bytes"}
            if self.command == "GET":
                hub.downloads.append(file.name)
            if self.command == "GET" and file.name in hub.cuts:
                self._send(200, headers, content, cut=True)
            else:
                self._send(200, headers, content)

        def _send(self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                half = len(content) // 2
                with suppress(ConnectionError):  # the client has ended
                    self.wfile.write(content[:half])
                    while Path(self.path).name in hub.stalls:
                        time.sleep(0.01)
                    if not cut:
                        self.wfile.write(content[half:])
            self.close_connection = self.close_connection or cut

        def log_message(self, *args: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_port}", repositories)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def _siblings(folder: Path) -> list[dict[str, str]]:
    return [{"rfilename": file.name} for file in sorted(folder.iterdir())]


def _tree(folder: Path) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _blob_id(file.read_bytes())}
        for file in sorted(folder.iterdir())
    ]


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
