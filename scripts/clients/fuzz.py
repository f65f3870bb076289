"""Fuzzes `bge-rerank serve` with schemathesis, which makes requests from the server's OpenAPI document.

Right and wrong requests go to every endpoint. A response of 500 or more fails, and so does a server that does
not end well. The exception is 504 for a time limit that the request itself sets.

Usage: python -m scripts.clients.fuzz FOLDER NUM_CASES

FOLDER holds the virtual environment `fuzz`. NUM_CASES is the largest number of random requests to each
endpoint, on top of those that cover each field's bounds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from scripts.clients.run import KEY, serve_command


def main() -> int:
    folder, num_cases = Path(sys.argv[1]), int(sys.argv[2])
    with serve_command() as url:
        return subprocess.run(
            [
                folder / "fuzz" / "bin" / "schemathesis",
                *("--config-file", str(Path(__file__).with_name("schemathesis.toml"))),
                "run",
                f"{url}/openapi.json",
                *("--header", f"Authorization: Bearer {KEY}"),
                *("--checks", "not_a_server_error"),
                *("--phases", "examples,coverage,fuzzing"),
                *("--mode", "all"),
                *("--max-examples", str(num_cases)),
                *("--suppress-health-check", "all"),
                "--continue-on-failure",
            ],
            check=False,
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
