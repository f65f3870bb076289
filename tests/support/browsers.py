"""A real browser for the tests of the server's pages, and a record of what its pages did."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# Debian's and Ubuntu's packages, and what the runners of GitHub have.
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def launched() -> Iterator[Browser]:
    """Start a browser, or skip the test and say what is missing.

    Playwright's event loop runs in this thread until the end, so a test of asyncio cannot run meanwhile.
    """
    sync_api: Any = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"needs a browser, one of {', '.join(NAMES)}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


class Record:
    """What went wrong in a page, and where it sent requests.

    Attributes:
        problems: Errors of scripts, messages of the console, and violations of the content security policy.
        failures: Messages of the console about requests that the server refused or did not answer.
        urls: All requests, in order.
    """

    def __init__(self, page: Page) -> None:
        self.problems: list[str] = []
        self.failures: list[str] = []
        self.urls: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        page.on("console", lambda message: self._add(message.text))
        page.on("request", lambda request: self.urls.append(request.url))

    def _add(self, text: str) -> None:
        (self.failures if text.startswith("Failed to load resource") else self.problems).append(text)

    @property
    def hosts(self) -> set[str]:
        """The hosts and ports that were asked."""
        return {urlsplit(url).netloc for url in self.urls}
