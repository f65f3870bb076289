"""How long the example apps take to index a folder and to find the chunks that a question needs.

    python -m benchmarks.rag

Writes Markdown files of about 5 KB made of the example corpus's sentences, indexes 1,000 of them with each
framework's splitters, adds more until the index has 10,000 chunks, and asks questions. Prints JSON last.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.common import describe_hardware
from examples import langchain_rag, llama_index_rag
from examples.answer import split_sentences
from examples.folder import SourceFile, find_files
from examples.random_checkpoint import read_texts
from examples.store import Chunk, ChunkStore
from examples.terminal import NUM_CANDIDATES

NUM_FILES, NUM_CHUNKS, NUM_BYTES, NUM_QUESTIONS = 1_000, 10_000, 5_000, 50
SPLITTERS = {"LangChain": langchain_rag.split_file, "LlamaIndex": llama_index_rag.split_file}


def write_files(folder: Path, numbers: Iterable[int]) -> None:
    """Write one Markdown file for each number, with a heading for about each kilobyte."""
    sentences = [sentence for text in read_texts() if text.isascii() for sentence in split_sentences(text)]
    for number in numbers:
        choose = random.Random(number)
        text = f"# Document {number}\n"
        while len(text) < NUM_BYTES:
            paragraph = " ".join(choose.sample(sentences, 8))
            text += f"\n## Part {choose.randrange(10_000)}\n\n{paragraph}\n"
        (folder / f"{number:06}.md").write_text(text, encoding="utf-8")


def measure(split: Callable[[SourceFile], Iterable[Chunk]], folder: Path) -> dict[str, float]:
    """Index and search with one splitter; times in seconds, or milliseconds where the name says so."""
    files, index = folder / "files", folder / "index"
    files.mkdir()
    write_files(files, range(NUM_FILES))
    store = ChunkStore(index)
    started = time.perf_counter()
    store.update(find_files([files]), split)
    ingest_s = time.perf_counter() - started
    num_chunks = len(store)

    total = -(-NUM_FILES * NUM_CHUNKS // num_chunks)
    write_files(files, range(NUM_FILES, total))
    store.update(find_files([files]), split)
    started = time.perf_counter()
    store.update(find_files([files]), split)
    unchanged_s = time.perf_counter() - started

    questions = [sentence for text in read_texts() for sentence in split_sentences(text)]
    search_ms = []
    for question in random.Random(0).sample(questions, NUM_QUESTIONS):
        started = time.perf_counter()
        store.search(question, NUM_CANDIDATES)
        search_ms.append((time.perf_counter() - started) * 1000)
    return {
        "ingest_1000_files_s": ingest_s,
        "chunks_of_1000_files": num_chunks,
        "chunks_searched": len(store),
        "update_without_change_s": unchanged_s,
        "search_median_ms": statistics.median(search_ms),
        "search_max_ms": max(search_ms),
    }


def main() -> None:
    """Measure both frameworks' splitters and print."""
    results = {}
    for name, split in SPLITTERS.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = {key: round(value, 3) for key, value in measure(split, Path(folder)).items()}
        for key, value in results[name].items():
            print(f"{name:12}{key:26}{value:12,.3f}")
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"machine": describe_hardware("cpu"), "peak_mib": round(peak_mib), "results": results}))


if __name__ == "__main__":
    main()
