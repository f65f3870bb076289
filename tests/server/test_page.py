"""The pages at `/` and `/docs`: their headers, and what they do in a real browser."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

import bge_rerank_integrations.server
from bge_rerank_integrations import Scorer
from bge_rerank_integrations.cli.stdlib_docs import QUESTIONS
from bge_rerank_integrations.ranking import sigmoid
from bge_rerank_integrations.server import ServerSettings, create_app
from bge_rerank_integrations.server.dialects.table import DIALECTS
from tests.server.conftest import KEY
from tests.support.browsers import Record, launched
from tests.support.servers import HeldScorer, running, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FOLDER = Path(bge_rerank_integrations.server.__file__).with_name("page")
FILES = {path.name: path for path in FOLDER.iterdir()}
EXAMPLES = json.loads(FILES["examples.json"].read_text(encoding="utf-8"))["examples"]
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
QUERY = "what does a giant panda eat?"
PASSAGES = [
    "Tea is a hot drink.",
    "Bears eat fish, berries and honey.",
    "The giant panda eats bamboo, up to forty pounds of it in a day.",
    "A car has four wheels. " * 300,
    "Pandas live in China.",
]
PATIENCE_S = 60.0  # on a busy machine
PHONE, DESKTOP = {"width": 320, "height": 640}, {"width": 1280, "height": 860}


# ---- Without a browser


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/docs", "text/html; charset=utf-8"),
        *((f"/page/{name}", TYPES[path.suffix]) for name, path in FILES.items() if path.suffix in TYPES),
    ],
)
def test_files_and_their_headers(path: str, content_type: str, keyed_url: str) -> None:
    response = httpx.get(keyed_url + path)  # without the key
    assert response.status_code == 200
    assert response.headers["content-type"] == content_type
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cache-control"] == "no-cache"
    directives = response.headers["content-security-policy"].split("; ")
    policy = {name: " ".join(values) for name, *values in map(str.split, directives)}
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert {policy[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert policy["require-trusted-types-for"] == "'script'"
    etag = response.headers["etag"]
    for stored, status in ((etag, 304), (f'"x", W/{etag}', 304), ("*", 304), ('"x"', 200)):
        again = httpx.get(keyed_url + path, headers={"if-none-match": stored})
        assert (again.status_code, again.headers["etag"]) == (status, etag)
        assert bool(again.content) == (status == 200)
    head = httpx.head(keyed_url + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(response.content))


def test_every_file_is_served_and_is_of_a_known_type() -> None:
    assert {path.suffix for path in FILES.values()} == {*TYPES, ".html"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/page/nothing.js", 404),
        ("GET", "/page/../pages.py", 404),
        ("GET", "/page/%2e%2e/pages.py", 404),
        ("GET", "/page/", 404),
        ("GET", "/docs/", 404),
        ("POST", "/docs", 405),
        ("PUT", "/", 405),
    ],
)
def test_nothing_else_is_served(method: str, path: str, status: int, open_url: str) -> None:
    assert httpx.request(method, open_url + path).status_code == status


@pytest.mark.parametrize(
    ("path", "methods"), [("/", "GET, HEAD, POST"), ("/docs", "GET, HEAD"), ("/v1/rerank", "POST")]
)
def test_a_wrong_method_gets_all_methods_of_the_path(path: str, methods: str, open_url: str) -> None:
    assert httpx.put(open_url + path).headers["allow"] == methods


def test_post_keeps_the_format_of_tei(open_url: str, keyed_url: str) -> None:
    body = {"query": QUERY, "texts": PASSAGES}
    response = httpx.post(open_url + "/", json=body)
    assert response.status_code == 200
    assert {each["index"] for each in response.json()} == set(range(len(PASSAGES)))
    assert httpx.post(keyed_url + "/", json=body).status_code == 401


@pytest.mark.parametrize(
    "name", ["index.html", "docs.html", "page.css", *(n for n in FILES if n.endswith(".js"))]
)
def test_files_name_no_other_host_and_no_absolute_path(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    urls = re.findall(
        r"""(?:\b(?:src|href)=|\bfrom |\bimport\(|\bget\(|\bfetch\(|url\()["']([^"'#]+)""", text
    )
    assert not [url for url in urls if re.match(r"/|[a-z]+:", url)]
    assert not [
        url for url in re.findall(r"\b(?:https?|wss?):[^\s\"'`]*", text) if "www.w3.org/2000/svg" not in url
    ]
    assert not re.search(r"\b(?:style|on\w+)=\"", text)  # the policy would refuse them


def test_examples_are_the_questions_of_the_demo() -> None:
    assert sorted(example["query"] for example in EXAMPLES) == sorted(QUESTIONS)
    for example in EXAMPLES:
        scores = [passage["score"] for passage in example["passages"]]
        assert len(scores) == 30
        assert scores == sorted(scores, reverse=True)
        assert all(passage["text"].startswith(f"{passage['name']}: ") for passage in example["passages"])


def test_examples_of_the_openapi_document_work(open_url: str) -> None:
    paths = httpx.get(open_url + "/openapi.json").json()["paths"]
    for path, dialects in DIALECTS.items():
        content = paths[path]["post"]["requestBody"]["content"]["application/json"]
        assert set(content["examples"]) == {dialect.name for dialect in dialects}
        for example in content["examples"].values():
            response = httpx.post(open_url + path, json=example["value"])
            assert response.status_code == 200


# ---- In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def embedded() -> Iterator[Scorer]:
    with Scorer("embedded", device="cpu", max_queued_tokens=1_000_000) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def url(embedded: Scorer) -> Iterator[str]:
    """Return the URL of a server with the embedded model."""
    with running(create_app(embedded)) as url:
        yield url


Open = Callable[..., "Page"]


def packed(content: bytes) -> str:
    """Return what a link holds."""
    deflate = zlib.compressobj(wbits=-15)
    return base64.urlsafe_b64encode(deflate.compress(content) + deflate.flush()).decode().rstrip("=")


# Opens the page with less to rank than an example has.
SMALL = "/#input=" + packed(b'{"query": "what is one?", "text": "one"}')


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Return a function that opens a page in a new profile. At the end, no page may have had a problem."""
    opened: list[tuple[str, Record, bool]] = []
    contexts = []

    def open_page(url: str, *, may_fail: bool = False, **options: Any) -> Page:
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        contexts.append(context)
        context.set_default_timeout(1000 * PATIENCE_S)
        page = context.new_page()
        opened.append((url, Record(page), may_fail))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    for url, record, may_fail in opened:
        assert record.problems == []
        assert may_fail or record.failures == []
        assert record.hosts == {urlsplit(url).netloc}


def fill(page: Page, query: str, passages: str) -> None:
    """Choose own text and type it."""
    page.get_by_label("Example").select_option("")
    page.get_by_label("Question").fill(query)
    page.get_by_role("textbox", name="Passages").fill(passages)


def rerank(page: Page) -> None:
    page.get_by_role("button", name="Rerank").click()


def settled(page: Page) -> None:
    """Wait until the request that runs is over."""
    page.get_by_role("button", name="Rerank").wait_for()
    page.locator("#results:not([aria-busy])").wait_for(state="attached")


def order(page: Page, column: str = "after") -> list[int]:
    """Return the passages of a column in their order, as positions in the input."""
    return page.evaluate(  # type: ignore[no-any-return]
        "column => [...document.querySelectorAll(`.${column} [role=option]`)].map(row => row.dataset.passage - 1)",
        column,
    )


def expected(scorer: Scorer, query: str, passages: list[str]) -> list[int]:
    return [passage.index for passage in scorer.rank(query, passages)]


def error_of(page: Page) -> str:
    alert = page.get_by_role("alert")
    alert.wait_for()
    return str(alert.inner_text())


def test_it_ranks_what_is_typed(url: str, open_page: Open, embedded: Scorer) -> None:
    page = open_page(url + SMALL)
    settled(page)
    fill(page, QUERY, "\n".join(PASSAGES))
    assert page.locator("#passages-count").inner_text() == "5 passages"
    rerank(page)
    page.locator(".winner", has_text="forty pounds").wait_for()
    ranking = embedded.rank(QUERY, [passage.strip() for passage in PASSAGES])
    assert order(page) == [passage.index for passage in ranking]
    assert order(page, "before") == list(range(5))
    shown = page.locator(".after [role=option]")
    for at, passage in enumerate(ranking):
        label = shown.nth(at).get_attribute("aria-label") or ""
        assert label.startswith(f"{at + 1}: ")
        assert f"Was {passage.index + 1}, " in label
        numbers = shown.nth(at).locator(".number").all_inner_texts()
        assert numbers == [
            f"{sigmoid(passage.score):.3f}",
            f"{'−' if passage.score < 0 else '+'}{abs(passage.score):.2f}",
        ]
        assert ("Truncated." in label) == passage.truncated == (passage.index == 3)
        assert shown.nth(at).locator(".tag").count() == passage.truncated
    figures = page.locator(".figures dd").all_inner_texts()
    assert (figures[0], figures[1], figures[3]) == ("5", f"{ranking.num_tokens:,}", "1")
    assert int(figures[2].replace(",", "")) >= 1
    said = page.locator("#summary").inner_text()
    assert f"was 3. 5 passages, {ranking.num_tokens:,} tokens" in said
    lines = page.locator("svg.lines path")
    ends = {
        int(path.get_attribute("data-passage") or ""): re.findall(r"[\d.]+", path.get_attribute("d") or "")
        for path in lines.all()
    }
    assert set(ends) == {1, 2, 3, 4, 5}
    for at, passage in enumerate(ranking):
        x_and_y = [float(number) for number in ends[passage.index + 1]]
        assert x_and_y[:2] == [0, passage.index + 0.5]
        assert x_and_y[-2:] == [100, at + 0.5]


def test_the_bars_are_on_both_scales(url: str, open_page: Open, embedded: Scorer) -> None:
    page = open_page(url + SMALL)
    settled(page)
    fill(page, QUERY, "\n".join(PASSAGES))
    rerank(page)
    page.locator(".winner", has_text="forty pounds").wait_for()
    ranking = embedded.rank(QUERY, [passage.strip() for passage in PASSAGES])
    limit = max(1, *(abs(passage.score) for passage in ranking))
    boxes = page.evaluate(
        """() => [...document.querySelectorAll('.after [role=option]')].map(row =>
            [...row.querySelectorAll('.track')].map(track => {
                const [outer, inner] = [track, track.firstChild].map(node => node.getBoundingClientRect());
                return [(inner.left - outer.left) / outer.width, (inner.right - outer.left) / outer.width];
            }))"""
    )
    for passage, (relevance, logit) in zip(ranking, boxes, strict=True):
        assert relevance == pytest.approx([0, sigmoid(passage.score)], abs=0.02)
        middle_to = 0.5 + passage.score / limit / 2
        assert logit == pytest.approx(sorted([0.5, middle_to]), abs=0.02)


def test_a_long_question_and_a_blank_passage(url: str, open_page: Open, tmp_path: Path) -> None:
    page = open_page(url + SMALL)
    settled(page)
    file = tmp_path / "two.jsonl"
    file.write_text('""\n{"id": 7, "text": "Pandas eat bamboo."}\n')
    page.get_by_label("Passages from a file").set_input_files(file)
    page.get_by_label("Question").fill("what does a panda eat? " * 300)
    rerank(page)
    page.locator(".notice", has_text="The question is too long").wait_for()
    assert order(page) == [1, 0]
    assert "blank, not scored" in page.locator(".after [role=option]").last.inner_text()


def test_it_opens_with_an_example_that_is_ranked(url: str, open_page: Open, embedded: Scorer) -> None:
    page = open_page(url)
    page.locator(".compare").wait_for()
    example = EXAMPLES[0]
    assert page.get_by_label("Question").input_value() == example["query"]
    assert page.locator(".winner").inner_text() == "secrets.token_bytes"
    source = page.locator("#examples-source")
    assert "Python Software Foundation" in source.inner_text()
    assert source.get_by_role("link").get_attribute("href") == "page/python-license.txt"
    assert order(page) == expected(embedded, example["query"], [each["text"] for each in example["passages"]])


@pytest.mark.parametrize("example", EXAMPLES[1:], ids=lambda example: example["query"].replace(" ", "-"))
def test_every_example(example: dict[str, Any], url: str, open_page: Open, embedded: Scorer) -> None:
    page = open_page(url + SMALL)
    settled(page)
    page.get_by_label("Example").select_option(example["query"])
    texts = [passage["text"] for passage in example["passages"]]
    ranked = expected(embedded, example["query"], texts)
    page.locator(".winner", has_text=example["passages"][ranked[0]]["name"]).wait_for()
    settled(page)
    assert order(page) == ranked
    names = page.locator(".before .name").all_inner_texts()
    assert names == [passage["name"] for passage in example["passages"]]
    first_stage = page.locator(".before .first-score").all_inner_texts()
    assert [float(score) for score in first_stage] == pytest.approx(
        [passage["score"] for passage in example["passages"]], abs=0.006
    )


# ---- Files

FILES_AND_TEXTS: dict[str, tuple[bytes, list[str], list[str | None]]] = {
    "lines.txt": (b"\xef\xbb\xbfone\r\ntwo\r\n\r\n", ["one", "two"], [None, None]),
    "blank-lines.txt": (b"one\nstill one\n\n \ntwo\n", ["one\nstill one", "two"], [None, None]),
    "strings.jsonl": ('"eins"\n\n"zwölf 🐼"\n'.encode(), ["eins", "zwölf 🐼"], [None, None]),
    "beir.JSONL": (
        b'{"_id": "a1", "title": "Panda", "text": "It eats bamboo."}\r\n{"id": 7, "text": "a\\nb", "score": 2.5}',
        ["Panda It eats bamboo.", "a\nb"],
        ["a1", "7"],
    ),
    "title.jsonl": (b'{"title": "Panda", "text": ""}', ["Panda"], ["Panda"]),
    "plain.csv": (b"text\none\ntwo", ["one", "two"], [None, None]),
    "full.csv": (
        b'id,Text,score\r\n1,"a ""quoted"", text\r\nof two lines",3.5\r\n2,,\r\n\r\n3,"",1\r\n',
        ['a "quoted", text\r\nof two lines', "", ""],
        ["1", "2", "3"],
    ),
    "title.csv": (
        b'title,text\n"Panda, giant",eats bamboo\n',
        ["Panda, giant eats bamboo"],
        ["Panda, giant"],
    ),
}
MALFORMED: dict[str, tuple[bytes, str]] = {
    "a.jsonl": (b'{"text": "one"}\n{"text": ', "Line 2 is not valid JSON."),
    "b.jsonl": (b'{"text": "one"}\n\n{"title": "two"}', "Line 3 has no string `text`."),
    "c.jsonl": (b"[1]", "Line 1 has no string `text`."),
    "d.jsonl": (b"null", "Line 1 has no string `text`."),
    "e.jsonl": (b'{"text": 5}', "Line 1 has no string `text`."),
    "empty.jsonl": (b"\n \n", "The file contains no passages."),
    "empty.txt": (b"", "The file contains no passages."),
    "latin.txt": (b"caf\xe9", "The file is not UTF-8 text."),
    "zeros.txt": (b"a\x00b", "The file is not text."),
    "header.csv": (b"id;text\n1;one", "The first row must name the columns, and one must be `text`."),
    "short.csv": (b'id,text\n1,"a\nb"\n2\n', "The row at line 4 has 1 columns; the first row has 2."),
    "long.csv": (b"text\na, b", "The row at line 2 has 2 columns; the first row has 1."),
    "open.csv": (b'text\n"one\ntwo', "The quotation mark at line 2 is never closed."),
    "after.csv": (b'text\n"one" two', "Line 2 has text after a closing quotation mark."),
    "only-header.csv": (b"id,text\n", "The file contains no passages."),
    "empty.csv": (b"", "The file contains no passages."),
    "passages.pdf": (b"%PDF", "The file must end in .txt, .jsonl or .csv."),
    "passages": (b"one", "The file must end in .txt, .jsonl or .csv."),
}


def drop(page: Page, files: dict[str, bytes]) -> None:
    """Drop files onto the page, as a mouse would."""
    transfer = page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, base64] of Object.entries(files)) {
                const bytes = Uint8Array.from(atob(base64), character => character.charCodeAt(0));
                transfer.items.add(new File([bytes], name));
            }
            return transfer;
        }""",
        {name: base64.b64encode(content).decode() for name, content in files.items()},
    )
    for kind in ("dragenter", "dragover", "drop"):
        page.dispatch_event("#drop", kind, {"dataTransfer": transfer})


def sent_passages(page: Page) -> list[str]:
    """Rerank, and return the passages that the page sends."""
    with page.expect_request("**/v1/rank") as asked:
        rerank(page)
    settled(page)
    ((_, texts),) = json.loads(asked.value.post_data or "")["requests"]
    return list(texts)


@pytest.mark.parametrize("name", FILES_AND_TEXTS)
def test_dropped_files(name: str, url: str, open_page: Open) -> None:
    content, texts, names = FILES_AND_TEXTS[name]
    page = open_page(url + SMALL)
    settled(page)
    drop(page, {name: content})
    if name.endswith(".txt"):
        page.get_by_role("textbox", name="Passages").wait_for()
    else:
        count = f"{len(texts)} passage{'s' if len(texts) != 1 else ''} from {name}"
        page.locator("#loaded-source", has_text=count).wait_for()
    assert sent_passages(page) == texts
    shown = page.locator(".before [role=option]")
    assert shown.count() == len(texts)
    for at, passage_name in enumerate(names):
        own = shown.nth(at).locator(".name")
        assert own.all_inner_texts() == ([] if passage_name is None else [passage_name])


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(name: str, url: str, open_page: Open) -> None:
    content, message = MALFORMED[name]
    page = open_page(url + SMALL)
    settled(page)
    drop(page, {name: content})
    assert error_of(page) == f"{name}: {message}"
    assert sent_passages(page) == ["one"]  # those of before
    assert page.get_by_role("alert").count() == 0


def test_two_files_at_once_and_a_file_that_is_chosen(url: str, open_page: Open, tmp_path: Path) -> None:
    page = open_page(url + SMALL)
    settled(page)
    drop(page, {"a.txt": b"a", "b.txt": b"b"})
    assert error_of(page) == "Drop one file at a time."
    file = tmp_path / "chosen.csv"
    file.write_bytes(b"text\none\n")
    page.get_by_label("Passages from a file").set_input_files(file)
    page.locator("#loaded-source", has_text="1 passage from chosen.csv").wait_for()
    assert page.get_by_role("alert").count() == 0
    file.write_bytes(b"text\none\ntwo\n")
    page.get_by_label("Passages from a file").set_input_files(file)  # the same file again
    page.locator("#loaded-source", has_text="2 passages from chosen.csv").wait_for()


def test_a_file_becomes_text_or_goes(url: str, open_page: Open) -> None:
    page = open_page(url + SMALL)
    settled(page)
    drop(page, {"x.jsonl": b'"one\\n\\n two "\n""\n"three"'})
    page.get_by_role("button", name="Edit as text").click()
    box = page.get_by_role("textbox", name="Passages")
    assert box.input_value() == "one two\nthree"
    assert sent_passages(page) == ["one two", "three"]
    drop(page, {"x.jsonl": b'"one"'})
    page.get_by_role("button", name="Remove").click()
    assert box.input_value() == ""
    rerank(page)
    assert error_of(page) == "Add at least one passage."
    page.get_by_label("Question").fill(" ")
    rerank(page)
    assert error_of(page) == "Write a question first."


def test_a_long_list(url: str, open_page: Open, embedded: Scorer) -> None:
    page = open_page(url + SMALL)
    settled(page)
    texts = [f"Passage {number} is about {'pandas' if number % 7 == 3 else 'tea'}." for number in range(80)]
    fill(page, "what is about pandas?", "\n".join(texts))
    rerank(page)
    more = page.get_by_role("button", name="Show all 80 passages")
    more.wait_for()
    assert len(order(page)) == len(order(page, "before")) == 30
    assert order(page) == expected(embedded, "what is about pandas?", texts)[:30]
    more.click()
    assert order(page) == expected(embedded, "what is about pandas?", texts)
    assert page.locator("svg.lines path").count() == 80
    assert not more.is_visible()


# ---- What can go wrong


def test_a_server_that_is_gone(embedded: Scorer, open_page: Open) -> None:
    with running(create_app(embedded)) as url:
        page = open_page(url + SMALL, may_fail=True)
        settled(page)
        before = order(page)
    rerank(page)
    assert error_of(page).startswith("The server does not answer. Is it still running?")
    assert order(page) == before  # the last results stay
    assert page.get_by_role("button", name="Rerank").is_enabled()


def test_a_full_queue(open_page: Open) -> None:
    held = HeldScorer(is_held=False, max_queued_tokens=3000)
    with running(create_app(held)) as url:  # type: ignore[arg-type]
        page = open_page(url + SMALL, may_fail=True)
        settled(page)
        held.is_held = True
        other = threading.Thread(
            target=httpx.post,
            args=(url + "/rerank",),
            kwargs={"json": {"query": "q", "texts": ["1 " * 2999]}},
        )
        other.start()
        wait_until(lambda: held.queued_tokens > 2000)
        rerank(page)
        assert "tokens are waiting" in error_of(page)
        assert "The server asks to wait 1 second." in error_of(page)
        held.is_held = False
        other.join()
        page.get_by_role("button", name="Try again").click()
        settled(page)
        assert page.get_by_role("alert").count() == 0


def test_a_request_that_is_too_large(embedded: Scorer, open_page: Open) -> None:
    with running(create_app(embedded, ServerSettings(max_body_mib=0.05))) as url:
        page = open_page(url + SMALL, may_fail=True)
        settled(page)
        fill(page, QUERY, "x" * 100_000)
        rerank(page)
        assert error_of(page) == "The request body is larger than 52428 bytes, the server's limit."
        fill(page, QUERY, "one\ntwo")
        rerank(page)
        page.locator(".figures dd", has_text=re.compile("^2$")).wait_for()


def test_a_key(embedded: Scorer, open_page: Open) -> None:
    with running(create_app(embedded, ServerSettings(api_key=KEY))) as url:
        page = open_page(url, may_fail=True)
        page.locator("#server", has_text="needs an API key").wait_for()
        assert page.locator(".compare").count() == 0
        field = page.get_by_label("API key", exact=True)
        for wrong, message in (
            ("wrong", "The API key is missing or wrong."),
            ("two words", "The API key must be printable ASCII without spaces."),
        ):
            field.fill(wrong)
            rerank(page)
            page.get_by_role("alert").filter(has_text=message).wait_for()
            assert page.evaluate("document.activeElement.id") == "key"
        field.fill(KEY)
        rerank(page)
        page.locator(".compare").wait_for()
        assert page.get_by_role("alert").count() == 0
        # The key is in this tab's storage and nowhere else.
        page.get_by_role("button", name="Copy link").click()
        page.get_by_text("Link copied").wait_for()
        assert (
            KEY
            not in page.evaluate("navigator.clipboard.readText()")
            + page.url
            + page.locator("pre").inner_text()
        )
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        assert "BGE_RERANK_API_KEY" in page.locator("pre").inner_text()
        page.reload()
        page.locator(".compare").wait_for()
        page.get_by_role("link", name="API").click()
        page.locator(".operation").first.wait_for()
        assert KEY not in page.content()


def test_a_model_that_is_still_being_loaded(open_page: Open) -> None:
    loading: Future[Scorer] = Future()
    with running(create_app(loading)) as url:
        page = open_page(url, may_fail=True)
        page.locator("#server", has_text="loading the model").wait_for()
        rerank(page)
        assert error_of(page).startswith("The model is still being loaded.")
        loading.set_result(HeldScorer(is_held=False))  # type: ignore[arg-type]
        page.locator("#server", has_text=re.compile("^held$")).wait_for()
        page.locator(".compare").wait_for()  # without another click


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (502, "<html>Bad gateway</html>", "The server answered with status 502."),
        (200, "<html>Hello</html>", "The answer is not JSON. Is this a bge-rerank server?"),
        (200, "{}", "The answer is not a ranking. Is this a bge-rerank server?"),
        (504, '{"message": "not finished within 60 s"}', "Not finished within 60 s."),
    ],
)
def test_answers_of_others(status: int, body: str, message: str, url: str, open_page: Open) -> None:
    """A proxy, or another server, answers in the place of this one."""
    page = open_page(url + SMALL, may_fail=True)
    settled(page)
    page.route("**/v1/rank", lambda route: route.fulfill(status=status, body=body))
    rerank(page)
    assert error_of(page).startswith(message)


def test_input_that_changes_while_it_is_ranked(open_page: Open) -> None:
    """The results are those of the input that was sent."""
    held = HeldScorer(is_held=False)
    with running(create_app(held)) as url:  # type: ignore[arg-type]
        page = open_page(url)
        settled(page)
        held.is_held = True
        rerank(page)
        wait_until(lambda: held.num_calls == 2)
        page.get_by_role("button", name="Remove").click()
        page.get_by_role("textbox", name="Passages").fill("something else")
        held.is_held = False
        settled(page)
        assert len(order(page)) == 30
        assert "BM25 order" in page.locator(".before-head").inner_text()
        assert "something else" not in page.locator("pre").inner_text()


@contextmanager
def ranking(open_page: Open) -> Iterator[tuple[Page, HeldScorer]]:
    """Yield a page that waits for its second ranking, and the scorer that holds it."""
    held = HeldScorer(is_held=False)
    with running(create_app(held)) as url:  # type: ignore[arg-type]
        page = open_page(url + SMALL, may_fail=True)
        settled(page)
        held.is_held = True
        rerank(page)
        wait_until(lambda: held.num_calls == 2)
        yield page, held


def test_stopping(open_page: Open) -> None:
    with ranking(open_page) as (page, held):
        page.get_by_role("button", name="Stop").click()
        settled(page)
        wait_until(lambda: held.num_cancelled == 1)
        assert page.get_by_role("alert").count() == 0


def test_the_enter_key_asks_again_while_a_ranking_runs(open_page: Open) -> None:
    with ranking(open_page) as (page, held):
        page.get_by_label("Question").fill("another question")
        page.keyboard.press("Enter")
        wait_until(lambda: (held.num_calls, held.num_cancelled) == (3, 1))
        held.is_held = False
        settled(page)
        assert page.get_by_role("alert").count() == 0
        assert "another question" in page.locator("pre").first.inner_text()


# ---- Hostile texts

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '"><svg onload="window.hacked = 1">',
    "javascript:window.hacked=1",
    "\u202eevil txt.exe\u202c abc",
    "שלום עולם, זה טקסט מימין לשמאל",
    "x" * 1_000_000,
    "a\u0301" * 500,
    "\\'; window.hacked = 1; //",
    "${window.hacked = 1}",
    "JSON",
]


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_hostile_texts(viewport: dict[str, int], url: str, open_page: Open, embedded: Scorer) -> None:
    rows = [json.dumps({"id": text[:300], "text": text}) for text in HOSTILE]
    page = open_page(url + SMALL, viewport=viewport)
    settled(page)
    page.get_by_label("Question").fill(HOSTILE[0])
    drop(page, {"<b>bold<b>.jsonl": "\n".join(rows).encode()})
    page.locator("#loaded-source", has_text="from <b>bold<b>.jsonl").wait_for()
    assert sent_passages(page) == HOSTILE
    assert order(page) == expected(embedded, HOSTILE[0], HOSTILE)
    for at, text in enumerate(HOSTILE):
        row = page.locator(f'.after [data-passage="{at + 1}"]')
        assert row.locator(".name").text_content() == text[:300]
        row.click()
        shown = page.locator(".detail .full").text_content() or ""
        assert shown == text[:20_000]
    page.locator(f'.after [data-passage="{HOSTILE.index("x" * 1_000_000) + 1}"]').click()
    assert "980,000 more characters, not shown here" in page.locator(".detail").inner_text()
    assert page.evaluate("window.hacked") is None
    assert page.locator("#results img, #results script, #results b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]


def test_the_direction_of_a_text_ends_with_it(url: str, open_page: Open) -> None:
    page = open_page(url + SMALL)
    settled(page)
    fill(page, QUERY, "\u202eabc\nשלום עולם\nplain")
    rerank(page)
    page.locator(".figures dd", has_text=re.compile("^3$")).wait_for()
    directions = {
        passage: page.locator(f'.before [data-passage="{passage}"] .snippet').evaluate(
            "node => [getComputedStyle(node).direction, getComputedStyle(node).unicodeBidi]"
        )
        for passage in (2, 3)
    }
    assert directions == {2: ["rtl", "isolate"], 3: ["ltr", "isolate"]}
    assert "\u202e" not in page.locator("pre").inner_text()
    assert "\\u202eabc" in page.locator("pre").inner_text()


# ---- Links and code


def copied_link(page: Page) -> str:
    page.get_by_role("button", name="Copy link").click()
    page.get_by_text("Link copied").wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url
    return str(link)


def page_query(page: Page) -> str:
    return str(page.get_by_label("Question").input_value())


def state(page: Page) -> tuple[Any, ...]:
    page.locator(".compare").wait_for()
    settled(page)
    return (
        page.get_by_label("Question").input_value(),
        page.get_by_label("Example").input_value(),
        page.locator("#passages").input_value(),
        page.locator("#loaded-source").text_content(),
        page.locator(".before [role=option]").all_inner_texts(),
        order(page),
    )


@pytest.mark.parametrize("kind", ["example", "changed example", "text", "file"])
def test_a_link_keeps_the_input(kind: str, url: str, open_page: Open) -> None:
    page = open_page(url)
    settled(page)
    if kind == "example":
        page.get_by_label("Example").select_option(EXAMPLES[4]["query"])
    if kind == "changed example":
        page.get_by_label("Question").fill("quelle heure est-il? 🕰")
        rerank(page)
    if kind == "text":
        fill(page, "# & % + ? é 🐼", "\n  one # & %\n\n two 🐼\nlines\n")
        rerank(page)
        page.locator(".figures dd", has_text=re.compile("^2$")).wait_for()
    if kind == "file":
        drop(page, {"some.jsonl": '{"id": "ä", "text": "  a\\n\\nb ", "score": 0.5}\n"c"'.encode()})
        rerank(page)
        page.locator(".figures dd", has_text=re.compile("^2$")).wait_for()
    settled(page)
    link = copied_link(page)
    before = state(page)
    other = open_page(link)
    assert state(other)[1:] == before[1:]
    assert state(other)[0] == before[0].strip()
    third = open_page(url)
    settled(third)
    third.evaluate("link => { location.href = link; }", link)  # a link that is pasted into an open page
    wait_until(lambda: page_query(third) == before[0].strip())
    assert state(third)[1:] == before[1:]


@pytest.mark.parametrize(
    ("fragment", "message"),
    [
        ("example=no%20such%20question", "This server does not have the example of the link."),
        ("example=%E0%A4%A", "The link is damaged or incomplete."),
        ("input=%%%", "The link is damaged or incomplete."),
        ("input=AAAA", "The link is damaged or incomplete."),
        ("input=" + packed(b"{"), "The link is damaged or incomplete."),
        ("input=" + packed(b'{"query": 1, "text": "a"}'), "The link is damaged or incomplete."),
        (
            "input=" + packed(b'{"query": "a", "source": "b", "passages": [1]}'),
            "The link is damaged or incomplete.",
        ),
        ("input=" + packed(b'{"query": "a", "passages": []}'), "The link is damaged or incomplete."),
        ("input=" + packed(b" " * 70_000_000), "The link holds more than 64 MiB."),
    ],
    ids=lambda value: value[:30],
)
def test_damaged_links(fragment: str, message: str, url: str, open_page: Open) -> None:
    page = open_page(f"{url}/#{fragment}")
    assert error_of(page) == message
    rerank(page)  # the page works on, with the first example
    page.locator(".winner", has_text="secrets.token_bytes").wait_for()
    assert page.get_by_role("alert").count() == 0


def test_a_link_that_would_be_too_long(open_page: Open) -> None:
    with running(create_app(HeldScorer(is_held=False))) as url:  # type: ignore[arg-type]
        page = open_page(url + SMALL)
        settled(page)
        drop(page, {"random.jsonl": json.dumps(os.urandom(800_000).hex()).encode()})
        rerank(page)
        settled(page)
        page.get_by_role("button", name="Copy link").click()
        page.get_by_text("The input is too long for a link").wait_for()
        assert page.url == url + SMALL


def copied_code(page: Page, language: str) -> str:
    page.get_by_role("radio", name=language).check()
    page.get_by_role("button", name="Copy code").click()
    page.get_by_text("Whole code copied").wait_for()
    return str(page.evaluate("navigator.clipboard.readText()"))


CODE_PASSAGES = [
    "Tea is a hot drink.",
    "The giant panda eats bamboo.",
    "It's \"quoted\" \\ $HOME `id` 'JSON'",
    "JSON",
    "two\nlines\tand a tab",
    "\u202eright to left\u202c",
    "Bären fressen Fisch. 🐟",
    "{braces} and %s",
    "",
    "word " * 30_000,
]


@pytest.mark.parametrize("has_key", [False, True], ids=["open", "keyed"])
def test_copied_code_runs_and_gives_the_same_order(
    has_key: bool, embedded: Scorer, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BGE_RERANK_API_KEY", raising=False)
    settings = ServerSettings(api_key=KEY if has_key else None)
    with running(Starlette(routes=[Mount("/it's", create_app(embedded, settings))])) as root:
        page = open_page(f"{root}/it's/", may_fail=has_key)
        page.locator(".server.locked" if has_key else ".compare").wait_for()
        if has_key:
            page.get_by_label("API key", exact=True).fill(KEY)
            monkeypatch.setenv("BGE_RERANK_API_KEY", KEY)
        page.get_by_label("Question").fill(QUERY + " '\"\\")
        rows = "\n".join(map(json.dumps, CODE_PASSAGES))
        drop(page, {"x.jsonl": rows.encode()})
        page.locator("#loaded-source", has_text="x.jsonl").wait_for()
        rerank(page)
        page.locator(".figures dd", has_text=re.compile("^10$")).wait_for()
        texts = [CODE_PASSAGES[index] for index in order(page)]
        for language in ("LangChain", "LlamaIndex"):
            printed = run_python(copied_code(page, language))  # a score and a text for each passage
            assert re.sub(r"(?m)^[01]\.\d{3}  ", "", printed) == "".join(f"{text}\n" for text in texts)
        command = copied_code(page, "curl")
        assert KEY not in command
        run = subprocess.run(
            ["bash"], input=command.encode(), capture_output=True, check=True, timeout=PATIENCE_S
        )
        results = json.loads(run.stdout)["results"]
        assert [CODE_PASSAGES[result["index"]] for result in results] == texts


def run_python(code: str) -> str:
    """Run code and return what it prints. It runs in a thread, since Playwright's event loop runs in this one."""
    printed = io.StringIO()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            exec(compile(code, "copied", "exec"), {"__name__": "copied"})
        except BaseException as error:
            errors.append(error)

    with contextlib.redirect_stdout(printed):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(PATIENCE_S)
    assert not errors
    return printed.getvalue()


def test_copying_without_the_clipboard_api(url: str, open_page: Open) -> None:
    """A page that comes over plain HTTP from another machine has none."""
    page = open_page(url + SMALL)
    settled(page)
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })")
    page.get_by_role("button", name="Copy code").click()
    page.get_by_text("Whole code copied").wait_for()
    page.evaluate("delete navigator.clipboard")
    assert page.evaluate("navigator.clipboard.readText()").startswith("# pip install")


# ---- Keyboard, labels, colours, sizes


def focused(page: Page) -> str:
    return str(
        page.evaluate(
            "() => { const e = document.activeElement; return e.id || e.getAttribute('aria-label') || e.textContent; }"
        )
    )


def test_a_walk_with_the_keyboard_alone(url: str, open_page: Open, embedded: Scorer) -> None:
    page = open_page(url)
    settled(page)
    press = page.keyboard.press
    walked = []

    def tab_to(name: str) -> None:
        for _ in range(30):
            press("Tab")
            walked.append(focused(page))
            outline = page.evaluate(
                "getComputedStyle(document.activeElement.matches('.visually-hidden, .segments input')"
                " ? document.activeElement.nextElementSibling : document.activeElement).outlineStyle"
            )
            assert outline != "none", walked[-1]
            if walked[-1] == name:
                return
        raise AssertionError(f"{name} is not reached: {walked}")

    tab_to("Skip to the results")
    tab_to("API")
    tab_to("example")
    press("Home")  # to one's own text
    assert focused(page) == "query"
    page.keyboard.type(QUERY)
    tab_to("passages")
    page.keyboard.insert_text("\n".join(PASSAGES))
    tab_to("file")
    tab_to("run")
    press("Enter")
    page.locator(".winner", has_text="forty pounds").wait_for()
    settled(page)
    ranked = expected(embedded, QUERY, [passage.strip() for passage in PASSAGES])
    assert order(page) == ranked
    press("Tab")  # into the first column
    assert page.evaluate("document.activeElement.closest('ol').ariaLabel") == "Before"
    press("Tab")  # and the second: one stop for each list
    assert page.evaluate("document.activeElement.closest('ol').ariaLabel") == "After"
    for key, at in (("ArrowDown", 1), ("End", 4), ("ArrowDown", 4), ("ArrowUp", 3), ("Home", 0)):
        press(key)
        assert int(page.evaluate("document.activeElement.dataset.passage")) == ranked[at] + 1
    assert page.locator(".detail h3").inner_text() == f"Passage {ranked[0] + 1}"
    assert page.locator("[role=option][aria-selected=true]").count() == 2  # one in each column
    assert page.locator("path.selected").count() == 1
    press("Escape")
    assert not page.locator(".detail").is_visible()
    press("Enter")
    assert page.locator(".detail .full").inner_text() == PASSAGES[ranked[0]]
    tab_to("Close")
    press("Enter")
    assert not page.locator(".detail").is_visible()
    page.locator("input[value=LangChain]").focus()
    press("ArrowRight")
    press("ArrowRight")
    assert page.locator("pre").inner_text().startswith("curl ")
    tab_to("Copy code")
    press("Enter")
    page.get_by_text("Whole code copied").wait_for()
    tab_to("Copy link")
    press("Space")
    page.get_by_text("Link copied").wait_for()
    page.locator("#query").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("what is tea?")
    press("Enter")  # a question is sent at once
    page.locator(".winner", has_text="Tea is a hot drink.").wait_for()


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_everything_has_a_name(path: str, url: str, open_page: Open) -> None:
    page = open_page(url + path)
    page.locator(".compare, .operation").first.wait_for()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('a, button, input, select, textarea, [role], [tabindex="0"]')]
            .filter(node => !(node.ariaLabel || node.labels?.length || node.textContent.trim()
                || ['status', 'alert'].includes(node.role)))
            .map(node => node.outerHTML)"""
    )
    assert nameless == []
    assert page.evaluate("document.documentElement.lang") == "en"
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(node => +node.tagName[1])")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


CONTRASTS = """() => {
    const channels = text => text.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => [r, g, b].map(value => value / 255)
        .map(value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode.parentElement;
        if (!walker.currentNode.textContent.trim() || !node.checkVisibility()) continue;
        let behind = node;
        while (channels(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement ?? document.body;
        const two = [getComputedStyle(node).color, getComputedStyle(behind).backgroundColor]
            .map(text => luminance(channels(text)) + 0.05);
        found.push([Math.max(...two) / Math.min(...two), node.className || node.tagName]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/docs"])
def test_contrasts_and_widths(path: str, scheme: str, url: str, open_page: Open) -> None:
    """Text has the contrast that WCAG's level AA asks for, and no width needs scrolling sideways."""
    page = open_page(url + path, color_scheme=scheme, viewport=DESKTOP)
    page.locator(".compare, .operation").first.wait_for()
    if path == "/":
        page.get_by_label("Question").fill("")
        rerank(page)  # for an error
        page.locator(".after [role=option]").first.click()
    low = [(round(ratio, 2), name) for ratio, name in page.evaluate(CONTRASTS) if ratio < 4.5]
    assert low == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(246, 247, 249)" if scheme == "light" else "rgb(18, 21, 27)"
    )
    for width in (320, 375, 768, 1024, 1120, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_lines_end_at_their_rows(url: str, open_page: Open) -> None:
    for viewport in (PHONE, DESKTOP):
        page = open_page(url, viewport=viewport)
        page.locator(".compare").wait_for()
        distances = page.evaluate(
            """() => [...document.querySelectorAll('svg.lines path')].flatMap(path => {
                const box = path.ownerSVGElement.getBoundingClientRect();
                const scale = box.height / path.ownerSVGElement.viewBox.baseVal.height;
                return [['before', 0], ['after', path.getTotalLength()]].map(([column, length]) => {
                    const row = document.querySelector(`.${column} [data-passage="${path.dataset.passage}"]`);
                    const { top, height } = row.getBoundingClientRect();
                    return Math.abs(box.top + path.getPointAtLength(length).y * scale - (top + height / 2));
                });
            })"""
        )
        assert len(distances) == 60
        assert max(distances) < 1.5


# ---- Behind a proxy, and the other page


def test_behind_a_prefix(embedded: Scorer, open_page: Open) -> None:
    app = Starlette(routes=[Mount("/some/prefix", create_app(embedded))])
    with running(app) as root:
        page = open_page(f"{root}/some/prefix/")
        urls: list[str] = []
        page.on("request", lambda request: urls.append(request.url))
        page.locator(".compare").wait_for()
        assert f'RemoteScorer("{root}/some/prefix")' in page.locator("pre").inner_text()
        page.get_by_role("link", name="API").click()
        page.locator(".operation").first.wait_for()
        page.get_by_role("link", name="Try it").click()
        page.locator(".compare").wait_for()
        assert urls
        assert all(each.startswith(f"{root}/some/prefix/") for each in urls)


def test_the_api_page_shows_the_whole_document(url: str, open_page: Open) -> None:
    page = open_page(url + "/docs")
    page.locator(".operation").first.wait_for()
    document = httpx.get(url + "/openapi.json").json()
    assert page.locator("#version").inner_text() == document["info"]["version"]
    operations = [(path, method) for path, methods in document["paths"].items() for method in methods]
    assert page.locator(".operation").count() == page.locator("#contents a").count() == len(operations)
    for (path, method), shown in zip(operations, page.locator(".operation").all(), strict=True):
        content = document["paths"][path][method]
        assert shown.locator("h2").inner_text().split() == [method.upper(), path]
        assert content["summary"] in shown.inner_text()
        responses = shown.locator("details")
        responses.locator("summary").click()
        for status, response in content["responses"].items():
            assert f"{status}\t{response['description']}" in responses.inner_text()
        if "requestBody" not in content:
            continue
        body = content["requestBody"]["content"]["application/json"]
        for schema, section in zip(body["schema"]["anyOf"], shown.locator(".format").all(), strict=True):
            assert section.locator("h3").inner_text() == schema["title"]
            rows = [row.split("\t") for row in section.locator("tbody tr").all_inner_texts()]
            assert [row[0] for row in rows] == list(schema["properties"])
            assert [row[0] for row in rows if row[2] == "required"] == [
                name for name in schema["properties"] if name in schema["required"]
            ]
            command = section.locator("pre").inner_text()
            run = subprocess.run(["bash", "-c", command], capture_output=True, check=True, timeout=PATIENCE_S)
            assert "message" not in json.loads(run.stdout)
    page.locator("#contents a", has_text="/v1/rank").last.click()
    assert page.url.endswith("#post-v1-rank")
    assert page.locator("#post-v1-rank").is_visible()
    linked = open_page(url + "/docs#post-v1-rank")
    linked.locator("#post-v1-rank").wait_for()
    assert linked.evaluate("document.getElementById('post-v1-rank').getBoundingClientRect().top") < 100


def test_the_api_page_asks_for_a_key(embedded: Scorer, open_page: Open) -> None:
    with running(create_app(embedded, ServerSettings(api_key=KEY))) as url:
        page = open_page(url + "/docs", may_fail=True)
        field = page.get_by_label("This server asks for an API key")
        field.fill("wrong")
        page.keyboard.press("Enter")
        assert error_of(page) == "The API key is missing or wrong."
        field.fill(KEY)
        page.get_by_role("button", name="Show the API").click()
        page.locator(".operation").first.wait_for()
        assert not field.is_visible()
        assert not page.get_by_role("link", name="openapi.json", exact=True).is_visible()
        assert KEY not in page.content()
        assert "Authorization: Bearer $BGE_RERANK_API_KEY" in page.locator("pre").first.inner_text()
