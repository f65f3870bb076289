"""Write the examples of the server's page: questions about Python's standard library, and what BM25 finds.

The examples are a file in the package, so the page needs neither the extra `demo` nor the time to read and
index the documentation. Everybody sees the same examples, whatever Python the server runs on.

    python -m scripts.page_examples
"""

from __future__ import annotations

import json
import platform
import shutil
import sysconfig
from pathlib import Path

import bge_rerank_integrations.server
from bge_rerank_integrations.cli.stdlib_docs import QUESTIONS, read_stdlib_docs
from bge_rerank_integrations.evaluation.bm25 import Bm25

FOLDER = Path(bge_rerank_integrations.server.__file__).with_name("page")
DEPTH = 30
# The page opens with the first example. Here BM25 finds the answer late.
FIRST = "get random bytes for a secret key"


def main() -> None:
    docs = read_stdlib_docs()
    search = Bm25(docs)
    examples = []
    for question in sorted(QUESTIONS, key=lambda question: question != FIRST):
        found = search.search({"": question}, DEPTH)[""]
        passages = [
            {"name": name, "text": docs[name], "score": round(float(score), 3)}
            for name, score in found.items()
        ]
        examples.append({"query": question, "passages": passages})
    version = ".".join(platform.python_version_tuple()[:2])
    content = {
        "source": f"Documentation of Python {version}'s standard library, first {DEPTH} passages by BM25",
        "copyright": "Copyright Python Software Foundation, PSF License Version 2",
        "examples": examples,
    }
    text = json.dumps(content, ensure_ascii=False, indent=1)
    (FOLDER / "examples.json").write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", FOLDER / "python-license.txt")


if __name__ == "__main__":
    main()
