"""Screenshot of a report: docs/report.png, the top of the page in a headless Chromium.

Run: python -m tests.screenshots.report docs/gan_and_sft.html docs/report.png
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lora_gan.errors import LoraGANError

NAMES = ("chromium", "chromium-browser", "google-chrome")
SIZE = (1100, 1500)  # pixels


def browser() -> str | None:
    """The browser's program; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def screenshot(page: Path, image: Path, size: tuple[int, int] = SIZE) -> None:
    """Write the top of a page as PNG.

    Raises:
        LoraGANError: There is no browser, or it writes no image.
    """
    program = browser()
    if program is None:
        raise LoraGANError(f"a screenshot needs a browser, one of {', '.join(NAMES)}; install chromium")
    with tempfile.TemporaryDirectory() as profile:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [
            f"--user-data-dir={profile}",
            "--window-size={},{}".format(*size),
            f"--screenshot={image.resolve()}",
        ]
        done = subprocess.run([*command, page.resolve().as_uri()], capture_output=True, text=True, timeout=120)
    if done.returncode or not image.is_file():
        raise LoraGANError(f"{program} made no screenshot of {page}: {done.stderr[-500:]}")


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]), Path(sys.argv[2]))
