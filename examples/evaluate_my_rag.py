"""Measure whether reranking helps on your own files and questions.

    python -m examples.evaluate_my_rag --folder ~/notes --questions questions.csv --plot gain.png

The CSV has a header and the columns `question`, `file` and optionally `passage`, a few words that only the
right chunk contains. Without a passage, every chunk of the file counts as an answer. A question with several
answers takes several lines.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from bge_rerank_integrations.errors import DatasetError
from bge_rerank_integrations.evaluation.datasets import Run
from bge_rerank_integrations.evaluation.measures import (
    PER_QUERY,
    Change,
    Report,
    bootstrap,
    measure,
    reranked_to_depth,
)
from bge_rerank_integrations.evaluation.plots import check_plot, plot_report
from bge_rerank_integrations.evaluation.runs import rerank_run
from bge_rerank_integrations.scorer import Scorer
from examples import langchain_rag, llama_index_rag
from examples.folder import find_files
from examples.store import ChunkStore, FoundChunk
from examples.terminal import (
    NUM_CANDIDATES,
    errors_end_the_program,
    make_parser,
    open_store,
    report_update,
)

QUESTIONS = Path(__file__).with_name("questions.csv")
# The names are those of ir_measures. Success@5 is the share of questions with an answer in the best 5.
MEASURES = ("Success@1", "Success@5", "MRR@10", "nDCG@10")
NAMES = {"Success@1": "hit rate@1", "Success@5": "hit rate@5"}
DEPTHS = (0, 5, 10, 20, 30, 40, NUM_CANDIDATES)
SPLITTERS = {"langchain": langchain_rag.split_file, "llama_index": llama_index_rag.split_file}
NUM_SHOWN = 3


@dataclass(frozen=True)
class Answer:
    """The place of an answer in the files.

    Attributes:
        file: Name of the file, as results have it.
        passage: Words that the right chunk holds; empty if any chunk of the file will do.
        line: Its line in the CSV file.
    """

    file: str
    passage: str
    line: int

    def is_in(self, chunk: FoundChunk) -> bool:
        """Return whether a chunk contains this answer. White space and case do not matter."""
        return chunk.file == self.file and _normalize(self.passage) in _normalize(chunk.text)


def read_questions(path: Path) -> dict[str, list[Answer]]:
    """Read a CSV file of questions, each with its answers.

    Raises:
        DatasetError: It cannot be read, lacks a column, or has a line without a question or a file.
    """
    questions: dict[str, list[Answer]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = {"question", "file"} - set(reader.fieldnames or [])
            if missing:
                raise DatasetError(f"{path} needs a header with {', '.join(sorted(missing))}")
            for row in reader:
                question, name = (row["question"] or "").strip(), (row["file"] or "").strip()
                if not question or not name:
                    raise DatasetError(f"{path}, line {reader.line_num}: question and file must not be empty")
                answer = Answer(name, (row.get("passage") or "").strip(), reader.line_num)
                questions.setdefault(question, []).append(answer)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} is not CSV in UTF-8") from error
    if not questions:
        raise DatasetError(f"{path} has no questions")
    return questions


def check_answers(
    path: Path, questions: Mapping[str, Sequence[Answer]], chunks: Iterable[FoundChunk]
) -> None:
    """Raise for questions that no chunk of the index can answer. A typing error would count as a miss.

    Raises:
        DatasetError: Says which line, and why.
    """
    by_file: dict[str, list[FoundChunk]] = {}
    for chunk in chunks:
        by_file.setdefault(chunk.file, []).append(chunk)
    for answer in (answer for answers in questions.values() for answer in answers):
        if answer.file not in by_file:
            raise DatasetError(f"{path}, line {answer.line}: {answer.file!r} is not in the index")
        if not any(answer.is_in(chunk) for chunk in by_file[answer.file]):
            raise DatasetError(
                f"{path}, line {answer.line}: no chunk of {answer.file!r} holds the passage; "
                "a passage of a few words is less likely to be split"
            )


def evaluate(
    scorer: Scorer, store: ChunkStore, questions: Mapping[str, Sequence[Answer]], *, progress: bool = False
) -> Report:
    """Search for each question, rerank the results, and measure both orders.

    An answer counts once, at the best chunk that contains it.
    """
    chunks = {chunk.id: chunk for chunk in store.chunks()}
    texts = {chunk.id: f"{chunk.heading}\n\n{chunk.text}" for chunk in chunks.values()}
    queries = {question: question for question in questions}
    first: Run = {
        question: {chunk.id: chunk.score for chunk in store.search(question, NUM_CANDIDATES)}
        for question in questions
    }
    started = time.perf_counter()
    reranked = rerank_run(scorer, queries, texts, first, progress=progress)
    seconds = time.perf_counter() - started

    qrels = {question: {str(n): 1 for n, _ in enumerate(answers)} for question, answers in questions.items()}

    def measure_answers(run: Run) -> dict[str, dict[str, float]]:
        marked = {question: _mark_answers(run[question], questions[question], chunks) for question in run}
        return measure(qrels, marked, MEASURES)

    before, after = measure_answers(first), measure_answers(reranked.run)
    return Report(
        depth=NUM_CANDIDATES,
        before={name: mean(values.values()) for name, values in before.items()},
        after={name: mean(values.values()) for name, values in after.items()},
        intervals={
            name: bootstrap(list(before[name].values()), list(after[name].values())) for name in MEASURES
        },
        changes=[Change(q, value, after[PER_QUERY][q]) for q, value in before[PER_QUERY].items()],
        curve={
            depth: mean(measure_answers(reranked_to_depth(first, reranked.run, depth))[PER_QUERY].values())
            for depth in DEPTHS
        },
        compared=None,
        num_unanswered=sum(
            not any(answer.is_in(chunks[chunk_id]) for answer in questions[question] for chunk_id in scores)
            for question, scores in first.items()
        ),
        num_pairs=reranked.num_pairs,
        num_tokens=reranked.num_tokens,
        num_truncated=reranked.num_truncated,
        num_truncated_queries=reranked.num_truncated_queries,
        seconds=seconds,
    )


def _mark_answers(
    scores: Mapping[str, float], answers: Sequence[Answer], chunks: Mapping[str, FoundChunk]
) -> dict[str, float]:
    """Replace the first chunk with an answer by the name of the answer, and drop later chunks with it."""
    marked: dict[str, float] = {}
    for chunk_id, score in scores.items():
        held = [str(number) for number, answer in enumerate(answers) if answer.is_in(chunks[chunk_id])]
        for name in held or [chunk_id]:
            marked.setdefault(name, score)
    return marked


def _normalize(text: str) -> str:
    return " ".join(text.split()).casefold()


def print_report(report: Report) -> None:
    """Print the measures before and after, and the questions that changed most."""
    print(f"\n{len(report.changes)} questions, {report.num_pairs} pairs reranked in {report.seconds:.0f} s")
    if report.num_unanswered:
        print(f"{report.num_unanswered} of them have no answer among the chunks that were found")
    print(f"\n{'':12}{'before':>9}{'after':>9}{'change':>9}   95 % interval")
    for name, interval in report.intervals.items():
        before, after = report.before[name], report.after[name]
        print(
            f"{NAMES.get(name, name):12}{before:9.3f}{after:9.3f}{interval.mean:+9.3f}   "
            f"{interval.low:+.3f} to {interval.high:+.3f}"
        )
    for heading, changes in (("Helped", report.helped(NUM_SHOWN)), ("Hurt", report.hurt(NUM_SHOWN))):
        if changes:
            print(f"\n{heading} most, in nDCG@10:")
        for change in changes:
            print(f"  {change.before:.3f} to {change.after:.3f}  {change.query_id}")


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help="CSV file: question, file, passage")
    parser.add_argument("--framework", choices=SPLITTERS, default="langchain", help="whose splitters to use")
    parser.add_argument("--plot", type=Path, help="draw each question's change, and quality by depth")
    args = parser.parse_args()
    with errors_end_the_program():
        if args.plot is not None:
            check_plot(args.plot)
        questions = read_questions(args.questions)
        files = find_files(args.folder)
        store = open_store(args, args.framework)
        report_update(store.update(files, SPLITTERS[args.framework], progress=True), store)
        check_answers(args.questions, questions, store.chunks())
        with Scorer(args.model) as scorer:
            report = evaluate(scorer, store, questions, progress=True)
        print_report(report)
        if args.plot is not None:
            plot_report(report, args.plot, title=f"{args.questions.name}, {args.model}")
            print(f"\nThe plot is in {args.plot}")


if __name__ == "__main__":
    main()
