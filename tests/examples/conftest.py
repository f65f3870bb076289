"""A folder of documents of every kind, and ways to run an example on it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

GUIDE = """# Guide

Read this first.

## Installation

Unpack the archive and run the installer.

```sh
# not a heading
  make install
```

## Removal

To get rid of the program delete its folder.
"""
PLANETS = """<html><head><title>Planets</title><style>p {color: red}</style></head><body>
<nav>Home</nav><h1>Planets</h1><h2>Venus</h2><p>Venus is the <b>hottest</b> <a href="x">planet</a>.</p>
<h2>Mars</h2><p>Mars is cold.</p></body></html>"""

Runner = Callable[..., str]


def make_pdf(*pages: str) -> bytes:
    """Return a PDF with a line of text on each page."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    kids = []
    for text in pages:
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        number = len(objects) + 1
        kids.append(f"{number} 0 R")
        font = "<< /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >>"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {number + 1} 0 R "
            f"/Resources << /Font {font} >> >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    trailer = f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    return data + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{trailer}".encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with one document of each kind."""
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / "guide.md").write_text(GUIDE, encoding="utf-8")
    (folder / "planets.html").write_text(PLANETS, encoding="utf-8")
    (folder / "report.pdf").write_bytes(make_pdf("Profits rose.", "The audit found a missing invoice."))
    (folder / "sub" / "panda.txt").write_text("大熊猫主要吃竹子。\n\n它生活在四川。\n", encoding="utf-8")
    (folder / "facts.jsonl").write_text('{"title": "Coffee", "text": "Coffee came from Yemen."}\n')
    return folder


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Runner:
    """Return a function that runs an example's `main` with arguments, and returns what it printed."""

    def run(module: ModuleType, *arguments: str | Path) -> str:
        index = ["--index", str(tmp_path / "index")]
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments), *index])
        module.main()
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def embedding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sentence-transformers model with random weights: like words give like vectors."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaModel

    from examples.random_checkpoint import build_random_checkpoint

    folder = tmp_path_factory.mktemp("embedding")
    tokenizer = AutoTokenizer.from_pretrained(build_random_checkpoint(folder / "cross-encoder"))
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    XLMRobertaModel(config).save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    transformer = Transformer(str(folder / "plain"), max_seq_length=64)
    SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").save(str(folder / "model"))
    return folder / "model"
