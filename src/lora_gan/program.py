"""Program: its name as it was started, version, cache, commands as a shell takes them, and what it does not repeat."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__version__ = "0.3.0"
INSTALLED, CHECKOUT = "lora-gan", "python -m src.cli"


def program_name() -> str:
    """What the user types: the installed script, the package, or the file of a checkout."""
    started = Path(sys.argv[0])
    if started.stem == INSTALLED:
        return INSTALLED
    if started.parent.name == "lora_gan":
        return "python -m lora_gan"
    return CHECKOUT if Path(__file__).parents[1].joinpath("cli.py").is_file() else INSTALLED


def command(*arguments: str | Path) -> str:
    """A command line of this program, quoted so that it can be pasted into a shell."""
    return f"{program_name()} {shlex.join(str(argument) for argument in arguments)}"


def cache_folder(kind: str) -> Path:
    """Where files of a kind are kept that can be made again; safe to delete.

    Raises:
        RuntimeError: There is no home folder, and XDG_CACHE_HOME is not set.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_gan" / kind


@contextmanager
def errors_alone(logger: str) -> Iterator[None]:
    """Without another library's messages below errors, where it would repeat them in every step."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
