"""Records of runs for the page: samples of the validations as tables, and the report, also of a run that goes on."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from lora_gan.report.page import page
from lora_gan.report.run import Run, Samples, read_run

ROWS = 1000  # of a table
CHARACTERS = 4000  # of a cell


class Records:
    """What the folders of runs record, read again when files in them have changed."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = dict(folders)
        self._lock = threading.Lock()  # matplotlib's settings are those of the whole process
        self._read: dict[str, tuple[object, Run]] = {}
        self._pages: dict[str, tuple[object, str]] = {}

    def samples(self, run: str) -> list[Samples]:
        """The samples of each validation."""
        with self._lock:
            return self._run(run).samples

    def report(self, run: str) -> str:
        """The report as HTML, in which every text is escaped."""
        with self._lock:
            state = self._state(run)
            if run not in self._pages or self._pages[run][0] != state:
                self._pages[run] = state, page([self._run(run)])
            return self._pages[run][1]

    def _run(self, run: str) -> Run:
        state = self._state(run)
        if run not in self._read or self._read[run][0] != state:
            self._read[run] = state, read_run(self.folders[run])
        return self._read[run][1]

    def _state(self, run: str) -> object:
        """Times and sizes of the files that a report is read from."""
        files = [path for path in sorted(self.folders[run].iterdir()) if path.is_file()]
        return [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files if path.name[0] != "."]


def table(samples: Samples) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one validation, bounded in number and length."""
    return samples.header, [[cell[:CHARACTERS] for cell in row] for row in samples.rows[:ROWS]]
