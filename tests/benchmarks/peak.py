"""Peak memory of a piece of work in this process (Linux)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Larger blocks go back to the system when they are freed, so that the resident memory is what is in use. To be set
# before the process starts.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_megabytes(work: Callable[[], Any]) -> float:
    """The most resident memory while ``work`` runs, above that before it, in MB (10⁶ bytes)."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now (proc(5))
    work()
    return max(_status("VmHWM") - before, 0) / 1e6


def environment() -> dict[str, str]:
    """Environment of a process in which :func:`peak_megabytes` is to measure."""
    return {**os.environ, **ENVIRONMENT}


def _status(field: str) -> int:
    """A field of the process's status, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, f"/proc/self/status has no {field}"
    return int(found[1]) * 1024
