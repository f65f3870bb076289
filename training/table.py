"""A table of size and quality for the published original and for checkpoints made from it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from bge_rerank_integrations import Scorer
from bge_rerank_integrations.evaluation.bm25 import Bm25
from bge_rerank_integrations.evaluation.datasets import BeirDataset, Run, format_run, read_beir, read_run
from bge_rerank_integrations.evaluation.measures import measure
from bge_rerank_integrations.evaluation.runs import rerank_run
from training import sources
from training.original import MAX_LENGTH

DEPTH = 50
MEASURE = "nDCG@10"

_TAG = "ms-marco-MiniLM-L-12-v2"


class Row(NamedTuple):
    """One row of the table."""

    name: str
    megabytes: float
    values: list[float]
    seconds: float


class OnnxReranker:
    """The published int8 original in ONNX Runtime. It scores one pair at a time on each core.

    Args:
        folder: Folder with model.onnx and tokenizer.json.
    """

    def __init__(self, folder: Path) -> None:
        # Imported here, so that the rest of the module works without onnxruntime.
        import onnxruntime

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
    """Rerank BM25's best 50 passages of each dataset with the original and with each checkpoint.

    Args:
        cache: Folder of the pinned sources. The original's runs take long, so they are saved there as
            original-NAME.trec for a BEIR folder called NAME.
        folders: BEIR folders.
        checkpoints: Folders of the checkpoints.
        dtype: Precision of the checkpoints.
        every: Use only every n-th query. 1 means all queries.
    """
    datasets = [_thinned(read_beir(folder), every) for folder in folders]
    runs = [Bm25(dataset.corpus).search(dataset.judged_queries(), DEPTH) for dataset in datasets]
    rows = [Row("BM25", 0.0, [_mean(*both) for both in zip(datasets, runs, strict=True)], 0.0)]

    folder = sources.fetch_model(cache)
    original = OnnxReranker(folder)
    started = time.perf_counter()
    scored = [
        score_run(original.score, dataset, run, cache / f"original-{path.resolve().name}.trec")
        for path, dataset, run in zip(folders, datasets, runs, strict=True)
    ]
    values = [_mean(*both) for both in zip(datasets, scored, strict=True)]
    size = (folder / "model.onnx").stat().st_size
    rows.append(Row("the original, int8 ONNX", size / 1e6, values, time.perf_counter() - started))

    for checkpoint in checkpoints:
        with Scorer(checkpoint, dtype=dtype) as scorer:  # type: ignore[arg-type]
            started = time.perf_counter()
            scored = [
                rerank_run(scorer, dataset.queries, dataset.corpus, run, progress=True).run
                for dataset, run in zip(datasets, runs, strict=True)
            ]
            values = [_mean(*both) for both in zip(datasets, scored, strict=True)]
            size = (checkpoint / "model.safetensors").stat().st_size
            rows.append(Row(checkpoint.name, size / 1e6, values, time.perf_counter() - started))
    return rows


def score_run(
    score: Callable[[Sequence[tuple[str, str]]], list[float]], dataset: BeirDataset, run: Run, kept: Path
) -> Run:
    """Score a run, and reuse scores that an earlier call saved, even if that call was killed.

    Args:
        score: Returns the logits of (query, passage) pairs.
        dataset: Texts of the queries and passages.
        run: The run to score.
        kept: TREC run with the saved scores. Each query is appended when it is complete.
    """
    known = _keep_whole_queries(run, kept)
    with kept.open("a", encoding="utf-8", newline="\n") as file:
        for query_id, passages in tqdm(run.items(), unit="query", desc=kept.stem):
            if query_id not in known:
                pairs = [(dataset.queries[query_id], dataset.corpus[passage]) for passage in passages]
                known[query_id] = dict(zip(passages, score(pairs), strict=True))
                file.write("".join(format_run({query_id: known[query_id]}, _TAG)))
                file.flush()
    return {query_id: {passage: known[query_id][passage] for passage in run[query_id]} for query_id in run}


def _keep_whole_queries(run: Run, kept: Path) -> Run:
    """Read the saved scores, and remove queries whose passages are not all scored."""
    if not kept.exists():
        return {}
    text = kept.read_bytes()
    temporary = kept.with_name(kept.name + ".tmp")
    temporary.write_bytes(text[: text.rfind(b"\n") + 1])  # the last line may be incomplete
    found = read_run(temporary)
    known = {
        query_id: scores
        for query_id, scores in found.items()
        if query_id not in run or run[query_id].keys() <= scores.keys()
    }
    temporary.write_text("".join(format_run(known, _TAG)), encoding="utf-8", newline="\n")
    temporary.replace(kept)
    return known


def format_table(folders: Sequence[Path], rows: Sequence[Row]) -> str:
    """Return the table in Markdown. Each value is followed by its share of the original's value."""
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


def _mean(dataset: BeirDataset, run: Run) -> float:
    values = measure({q: dataset.qrels[q] for q in dataset.judged_queries()}, run, [MEASURE])[MEASURE]
    return float(np.mean(list(values.values())))
