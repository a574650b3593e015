"""Warnings of a run, kept in ``warnings.txt`` of its folder for the report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_gan.report.run import WARNINGS


@contextmanager
def kept_warnings(folder: Callable[[], Path | None]) -> Iterator[None]:
    """Add each warning of the program to ``warnings.txt``, a line for each, while the folder is known."""
    logger, handler = logging.getLogger("lora_gan"), _Keeper(folder)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Keeper(logging.Handler):
    """Writes at once, so that the warnings of a killed run are there."""

    def __init__(self, folder: Callable[[], Path | None]) -> None:
        super().__init__(logging.WARNING)
        self.folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        try:
            folder = self.folder()
            if folder is not None:
                line = f"{time.strftime('%H:%M:%S')} {' '.join(record.getMessage().split())}\n"
                with (folder / WARNINGS).open("a", encoding="utf-8") as file:
                    file.write(line)
        except OSError:
            self.handleError(record)
