"""Verdict cache: what a judge has decided, in memory and, with a path, in a file that outlives the run."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path

from lora_gan.atomic import check_file_writable
from lora_gan.errors import LoraGANError

log = logging.getLogger("lora_gan")
Verdict = tuple[float, ...]


class VerdictCache:
    """Verdicts by key. Threads may share it, and processes its file.

    The file has one JSON object a line, ``{"key": …, "verdict": […]}``. Each is appended in one write, which local
    file systems keep whole. A process reads the file once; it does not see what others append later.

    Args:
        path: The file; None keeps verdicts in memory only.

    Raises:
        LoraGANError: The file cannot be read or written.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._verdicts: dict[str, Verdict] = {}
        if self.path is not None:
            try:
                check_file_writable(self.path)
                self._read(self.path)
            except OSError as error:
                raise LoraGANError(
                    f"the cache {path} cannot be used ({error}); set cache to a file in a folder that can be written"
                ) from error

    def __len__(self) -> int:
        return len(self._verdicts)

    def get(self, key: str) -> Verdict | None:
        """What was decided, or None."""
        return self._verdicts.get(key)

    def put(self, key: str, verdict: Verdict) -> None:
        """Keep a verdict.

        Raises:
            LoraGANError: The file cannot be written.
        """
        self._verdicts[key] = verdict
        if self.path is not None:
            line = json.dumps({"key": key, "verdict": verdict}) + "\n"
            try:
                _append(self.path, line.encode())
            except OSError as error:
                raise LoraGANError(f"the cache {self.path} cannot be written ({error})") from error

    def _read(self, path: Path) -> None:
        if not path.is_file():
            return
        content = path.read_bytes()
        damaged = []
        lines = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                key, verdict = _parsed(line)
                self._verdicts[key] = verdict
            except (ValueError, TypeError, KeyError):
                damaged.append(number)
        if damaged:
            log.warning(
                "the cache %s: %d of %d lines are damaged and not used, the first is line %d; what they held is asked "
                "again. Delete these lines to be rid of this message",
                path,
                len(damaged),
                len([line for line in lines if line.strip()]),
                damaged[0],
            )
        if content and not content.endswith(b"\n"):  # the end of a write that was cut off
            _append(path, b"\n")


def _parsed(line: bytes) -> tuple[str, Verdict]:
    row = json.loads(line)
    key, verdict = row["key"], tuple(float(value) for value in row["verdict"])
    if not isinstance(key, str) or not verdict or not all(map(math.isfinite, verdict)):
        raise ValueError("not a verdict")
    return key, verdict


def _append(path: Path, content: bytes) -> None:
    """In one write, at the end as it is then."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, content)
    finally:
        os.close(descriptor)
