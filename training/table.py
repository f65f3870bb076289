"""Size against quality: the original as it is published, and checkpoints made from it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from tokenizers import Tokenizer
from tqdm import tqdm

from bge_rerank_integrations import Scorer
from bge_rerank_integrations.bm25 import Bm25
from bge_rerank_integrations.datasets import BeirDataset, Run, read_beir
from bge_rerank_integrations.evaluation import measure
from bge_rerank_integrations.reranking import rerank_run
from training import sources
from training.original import MAX_LENGTH

DEPTH = 50
MEASURE = "nDCG@10"


class Row(NamedTuple):
    """One line of the table."""

    name: str
    megabytes: float
    values: list[float]
    seconds: float


class OnnxReranker:
    """The original through ONNX Runtime, in int8 as it is published, one pair at a time on each core.

    Args:
        folder: model.onnx and tokenizer.json.
    """

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_LENGTH, strategy="only_second")

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the logits of (query, passage) pairs."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self._score_one, pairs))

    def _score_one(self, pair: tuple[str, str]) -> float:
        encoded = self._tokenizer.encode(*pair)
        inputs = {
            "input_ids": encoded.ids,
            "attention_mask": encoded.attention_mask,
            "token_type_ids": encoded.type_ids,
        }
        [logits] = self._session.run(None, {name: np.asarray([ids]) for name, ids in inputs.items()})
        return float(logits[0, 0])


def make_table(
    cache: Path, folders: Sequence[Path], checkpoints: Sequence[Path], *, dtype: str, every: int
) -> list[Row]:
    """Rerank BM25's best 50 of each dataset with everything.

    Args:
        cache: Where the pinned sources lie; the original's scores are kept there, since they take long.
        folders: BEIR folders.
        checkpoints: What was made.
        dtype: Precision of the checkpoints.
        every: Take every n-th query only; 1 is all.
    """
    datasets = [_thinned(read_beir(folder), every) for folder in folders]
    runs = [Bm25(dataset.corpus).search(dataset.judged_queries(), DEPTH) for dataset in datasets]
    rows = [Row("BM25", 0.0, [_mean(*both) for both in zip(datasets, runs, strict=True)], 0.0)]

    folder = sources.fetch_model(cache)
    original = OnnxReranker(folder)
    started = time.perf_counter()
    scored = [
        _original_run(original, dataset, run, cache / f"scores-{path.name}.jsonl")
        for path, dataset, run in zip(folders, datasets, runs, strict=True)
    ]
    values = [_mean(*both) for both in zip(datasets, scored, strict=True)]
    size = (folder / "model.onnx").stat().st_size
    rows.append(Row("the original, int8 ONNX", size / 1e6, values, time.perf_counter() - started))

    for checkpoint in checkpoints:
        with Scorer(checkpoint, dtype=dtype) as scorer:  # type: ignore[arg-type]
            started = time.perf_counter()
            scored = [
                rerank_run(scorer, dataset.queries, dataset.corpus, run, progress=True)
                for dataset, run in zip(datasets, runs, strict=True)
            ]
            values = [_mean(*both) for both in zip(datasets, scored, strict=True)]
            size = (checkpoint / "model.safetensors").stat().st_size
            rows.append(Row(checkpoint.name, size / 1e6, values, time.perf_counter() - started))
    return rows


def format_table(folders: Sequence[Path], rows: Sequence[Row]) -> str:
    """Return the table in Markdown, each value with its share of the original's."""
    original = rows[1].values
    lines = [
        "| | MB | " + " | ".join(folder.name for folder in folders) + " | seconds |",
        "|---|---|" + "---|" * (len(folders) + 1),
    ]
    for row in rows:
        cells = [
            f"{value:.4f} ({value / reference:.1%})"
            for value, reference in zip(row.values, original, strict=True)
        ]
        lines.append(f"| {row.name} | {row.megabytes:.1f} | {' | '.join(cells)} | {row.seconds:.0f} |")
    return "\n".join(lines)


def _thinned(dataset: BeirDataset, every: int) -> BeirDataset:
    chosen = list(dataset.judged_queries())[::every]
    return BeirDataset(
        corpus=dataset.corpus,
        queries={query_id: dataset.queries[query_id] for query_id in chosen},
        qrels={query_id: dataset.qrels[query_id] for query_id in chosen},
    )


def _original_run(original: OnnxReranker, dataset: BeirDataset, run: Run, kept: Path) -> Run:
    """Score a run, but for what an earlier call has left in the file `kept`."""
    known: Run = {}
    if kept.exists():
        known = dict(map(json.loads, kept.read_text(encoding="utf-8").splitlines()))
    scored: Run = {}
    with kept.open("a", encoding="utf-8") as file:
        for query_id, passages in tqdm(run.items(), unit="query", desc=kept.stem):
            found = known.get(query_id, {})
            if not passages.keys() <= found.keys():
                pairs = [(dataset.queries[query_id], dataset.corpus[passage]) for passage in passages]
                found = dict(zip(passages, original.score(pairs), strict=True))
                file.write(json.dumps([query_id, found]) + "\n")
                file.flush()
            scored[query_id] = {passage: found[passage] for passage in passages}
    return scored


def _mean(dataset: BeirDataset, run: Run) -> float:
    values = measure({q: dataset.qrels[q] for q in dataset.judged_queries()}, run, [MEASURE])[MEASURE]
    return float(np.mean(list(values.values())))
