"""Screenshot of the page of a run: python -m tests.screenshots.ui RUN writes docs/ui.png."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.helpers.browser import browser, served

DOCS = Path(__file__).parents[2] / "docs"
QUESTIONS = ("What is the currency of Bhutan?", "Which symbol stands for the element chromium?")
BYTES = 200_000


def main() -> None:
    """Ask, rate, and take the picture."""
    with tempfile.TemporaryDirectory() as folder, browser() as opened:
        ratings = Path(folder) / "ratings.jsonl"
        with served([Path(run) for run in sys.argv[1:]], f"--ratings={ratings}") as server:
            page = opened.new_page(viewport={"width": 1180, "height": 900})
            page.goto(server.url)
            for question in QUESTIONS:
                page.fill("#question textarea", question)
                page.click("#send")
                page.wait_for_selector("#generator_better:not([disabled])")
                page.click("#generator_better")
                page.wait_for_selector("#said:has-text('Saved')")
            page.click("#base_bad")
            page.wait_for_selector("#base:has-text('rated bad')")
            page.mouse.move(0, 0)
            page.wait_for_timeout(300)
            page.screenshot(path=DOCS / "ui.png")
    small(DOCS / "ui.png")


def small(path: Path) -> None:
    """Write a picture again in at most 128 colours."""
    Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < BYTES, f"{path} has {path.stat().st_size} bytes"


if __name__ == "__main__":
    main()
