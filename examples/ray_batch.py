"""Rank a folder of Parquet files on Ray, so that the job can be stopped and resumed.

    python -m examples.ray_batch requests/ ranked/ --num-actors 2
    python -m examples.ray_batch --sample requests/ ranked/

Each row of the input has an `id`, a `query` and a list of `passages`. `--sample` first writes such a folder:
some questions of `questions.csv`, each with the passages of `corpus.jsonl`. Run the same command again after
an interruption: rows that are already written are not ranked again.

Needs `pip install "bge-rerank-integrations[ray]"`.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig

from bge_rerank_integrations import ScorerConfig
from bge_rerank_integrations.ray import ActorOptions, rerank_dataset
from examples.random_checkpoint import read_texts

QUESTIONS = Path(__file__).with_name("questions.csv")
NUM_SAMPLED = 8
# A block is what is saved at once, so small blocks lose little.
ROWS_PER_BLOCK = 4


def write_sample(folder: Path) -> None:
    """Write requests as Parquet files: some questions, each with all passages of the example corpus."""
    with QUESTIONS.open(encoding="utf-8", newline="") as file:
        questions = [row["question"] for row in csv.DictReader(file)][:NUM_SAMPLED]
    passages = read_texts()
    rows = [{"id": at, "query": question, "passages": passages} for at, question in enumerate(questions)]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "sample.parquet")


def rank_folder(source: Path, output: Path, model: str, top_n: int, num_actors: int) -> None:
    """Rank all rows of a folder. Each row is written once, even if the job is stopped and run again."""
    # Ray records the ids of the rows that are written. A job that is run again leaves them out. The record
    # stays after the job, so that one run too many does not write the rows twice.
    context = DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        "id", f"{output.absolute()}.checkpoint", delete_checkpoint_on_success=False
    )
    try:
        requests = ray.data.read_parquet(str(source.absolute()))
    finally:
        context.checkpoint_config = None
    ranked = rerank_dataset(
        requests,
        ScorerConfig(model=model, normalize=True),
        top_n=top_n,
        actors=ActorOptions(num_actors=num_actors, rows_per_block=ROWS_PER_BLOCK),
    )
    ranked.write_parquet(str(output.absolute()))


def main(argv: Sequence[str] | None = None) -> int:
    """Rank a folder and print the best passage of some rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="folder of Parquet files with id, query and passages")
    parser.add_argument("output", type=Path, help="folder to write; it must be new, or of this job")
    parser.add_argument("--sample", action="store_true", help="write sample requests into SOURCE first")
    parser.add_argument("--model", default="embedded", help="checkpoint folder, hub id or `embedded`")
    parser.add_argument("--top-n", type=int, default=3, help="passages to keep of each request")
    parser.add_argument("--num-actors", type=int, default=1, help="processes that load the model")
    args = parser.parse_args(argv)
    if args.sample:
        write_sample(args.source)
    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    rank_folder(args.source, args.output, args.model, args.top_n, args.num_actors)
    ranked = pq.read_table(args.output).to_pylist()
    num_errors = sum(row["error"] is not None for row in ranked)
    print(f"{len(ranked)} rows in {args.output}, {num_errors} with an error")
    for row in sorted(ranked, key=lambda row: row["id"])[:5]:
        if row["indices"]:
            best = row["passages"][row["indices"][0]]
            print(f"{row['scores'][0]:.3f}  {row['query']}  ->  {best[:60]}...")
    return 0


if __name__ == "__main__":
    sys.exit(main())
