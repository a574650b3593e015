"""Browser without a window, by playwright on a Chromium that is installed; and a server of the page to look at."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = ", ".join(
    what
    for what, there in (
        ("gradio (pip install 'gradio>=6.31,<7')", find_spec("gradio")),
        ("playwright (pip install playwright)", find_spec("playwright")),
        ("chromium (apt install chromium)", CHROMIUM),
    )
    if not there
)


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium; without its sandbox for root only, who cannot have one."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        try:
            yield opened
        finally:
            opened.close()


@dataclass(frozen=True)
class Server:
    """``ui`` in a process of its own."""

    process: subprocess.Popen[str]
    url: str

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def served(folders: Sequence[Path], *options: str, seconds: int = 180) -> Iterator[Server]:
    """The page of runs, once it answers, on any free port."""
    command = [sys.executable, "-m", "src.cli", "ui", *map(str, folders), "--port=0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    try:
        begin, line = time.monotonic(), ""
        while not line.startswith("http") and time.monotonic() < begin + seconds and process.poll() is None:
            line = process.stdout.readline()
        assert line.startswith("http"), f"no page after {time.monotonic() - begin:.0f} s: {process.poll()}"
        yield Server(process, line.split()[0])
    finally:
        process.terminate()
        process.wait(timeout=30)
        process.stdout.close()
