"""Take pictures of the server's page with the embedded model: docs/page.png, or all of them into a folder.

python -m scripts.page_picture             # docs/page.png
python -m scripts.page_picture FOLDER      # desktop and phone width, light and dark, to look at
"""

from __future__ import annotations

import sys
from pathlib import Path

from bge_rerank_integrations import Scorer
from bge_rerank_integrations.server import ServerSettings, create_app
from tests.support.browsers import launched
from tests.support.servers import running

VIEWPORTS = {"desktop": (1280, 720), "phone": (375, 812)}
PAGES = {"rerank": ("/", ".compare"), "api": ("/docs", ".operation")}


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0]) if arguments else None
    with (
        Scorer("embedded") as scorer,
        running(create_app(scorer, ServerSettings(model_name="embedded"))) as url,
        launched() as browser,
    ):
        scorer.warmup()

        def take(path: Path, page_name: str, viewport: str, scheme: str) -> None:
            address, ready = PAGES[page_name]
            width, height = VIEWPORTS[viewport]
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(url + address)
            page.locator(ready).first.wait_for()
            page.locator("#results:not([aria-busy]), .docs").wait_for()
            page.screenshot(path=path)
            page.close()

        if folder is None:
            take(Path(__file__).parents[1] / "docs" / "page.png", "rerank", "desktop", "light")
            return
        folder.mkdir(parents=True, exist_ok=True)
        for page_name in PAGES:
            for viewport in VIEWPORTS:
                for scheme in ("light", "dark"):
                    take(folder / f"{page_name}-{viewport}-{scheme}.png", page_name, viewport, scheme)


if __name__ == "__main__":
    main(sys.argv[1:])
