"""Tail of a growing file or of a pipe: its lines as they arrive."""

from __future__ import annotations

import os
import select
import stat
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from lora_gan.errors import DataError

CHUNK = 1 << 16
LONGEST_LINE = 1 << 24


@dataclass(frozen=True)
class Line:
    """A line and its end."""

    content: bytes
    number: int  # from 1
    end: int  # bytes from the start of the stream
    whole: bool = True  # False if the stream ended without a line break


@dataclass(frozen=True)
class Position:
    """Number of bytes and lines that have been read."""

    offset: int = 0
    lines: int = 0


class Tail:
    """Follows a file or a pipe and holds one chunk of it in memory.

    Args:
        path: File or named pipe, or "-" for stdin.
        poll_seconds: Seconds from one look for new data to the next.
        stop_after_seconds: Seconds without new data after which the lines end; None waits forever.

    Raises:
        DataError: The file cannot be opened.
    """

    def __init__(self, path: str, poll_seconds: float, stop_after_seconds: float | None) -> None:
        self.path = path
        self.poll_seconds = poll_seconds
        self.stop_after_seconds = stop_after_seconds
        self.descriptor = self._open()
        self.seekable = path != "-" and stat.S_ISREG(os.fstat(self.descriptor).st_mode)
        self._ready: deque[bytes] = deque()
        self._rest = bytearray()
        self._position = Position()

    def seek(self, position: Position) -> None:
        """Continue at ``position``; a pipe continues with the data that it holds.

        Raises:
            DataError: The file is shorter, or no line starts there.
        """
        if not self.seekable:
            return
        size = os.fstat(self.descriptor).st_size
        if size < position.offset:
            raise self._truncated(size, position.offset)
        around = os.pread(self.descriptor, 2, max(position.offset - 1, 0))
        if position.offset and b"\n" not in around and len(around) == 2:
            raise DataError(
                f"{self.path}: no line starts at byte {position.offset}, where the checkpoint resumes, so this is "
                "another file; give the file that was trained on, or start without --ckpt_path"
            )
        os.lseek(self.descriptor, position.offset, os.SEEK_SET)
        self._start_at(position)

    def lines(self) -> Iterator[Line]:
        """The lines from here on, until the pipe ends or no data arrives for ``stop_after_seconds``.

        Raises:
            DataError: The file was truncated or replaced, or a line is too long.
        """
        while self._ready or self._wait():
            while self._ready:
                yield self._next(self._ready.popleft() + b"\n")
        if self._rest:
            rest = bytes(self._rest)
            self._rest = bytearray()
            yield self._next(rest, whole=False)

    def close(self) -> None:
        if self.path != "-":
            os.close(self.descriptor)

    def _open(self) -> int:
        if self.path == "-":
            return sys.stdin.fileno()
        try:
            return os.open(os.path.expanduser(self.path), os.O_RDONLY)
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read: {error.strerror}; create the file first (it may be empty), "
                'or give "-" to read from stdin'
            ) from error

    def _start_at(self, position: Position) -> None:
        self._ready.clear()
        self._rest = bytearray()
        self._position = position

    def _next(self, content: bytes, whole: bool = True) -> Line:
        self._position = Position(self._position.offset + len(content), self._position.lines + 1)
        return Line(content, self._position.lines, self._position.offset, whole)

    def _wait(self) -> bool:
        """Read until there is a line; False if the stream has ended."""
        still = 0.0
        while not self._ready:
            chunk = self._read()
            if chunk is None:
                return False
            if chunk:
                still = 0.0
                self._take(chunk)
                continue
            if self.stop_after_seconds is not None and still >= self.stop_after_seconds:
                return False
            still += self._pause()
        return True

    def _read(self) -> bytes | None:
        """New data, empty if there is none; None if a pipe has ended."""
        if self.seekable:
            return os.read(self.descriptor, CHUNK)
        try:
            arrived, _, _ = select.select([self.descriptor], [], [], 0)
            return (os.read(self.descriptor, CHUNK) or None) if arrived else b""
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}; give a file or a pipe") from error

    def _take(self, chunk: bytes) -> None:
        self._rest += chunk
        *lines, rest = self._rest.split(b"\n")
        self._ready.extend(map(bytes, lines))
        self._rest = rest
        if len(rest) > LONGEST_LINE:
            raise DataError(
                f"{self.path}, line {self._position.lines + len(lines) + 1}: more than {LONGEST_LINE:,} bytes "
                "without a line break; write one JSON object per line"
            )

    def _pause(self) -> float:
        if self.seekable:
            self._check_same_file()
            time.sleep(self.poll_seconds)
        else:
            select.select([self.descriptor], [], [], self.poll_seconds)
        return self.poll_seconds

    def _check_same_file(self) -> None:
        read = os.lseek(self.descriptor, 0, os.SEEK_CUR)
        opened = os.fstat(self.descriptor)
        if opened.st_size < read:
            raise self._truncated(opened.st_size, read)
        try:
            named = os.stat(os.path.expanduser(self.path))
            same = os.path.samestat(named, opened)
        except FileNotFoundError:
            same = False
        if not same:
            raise DataError(
                f"{self.path} was deleted or replaced by another file after byte {read}; only append to a stream, "
                "and start without --ckpt_path to learn from the new file"
            )

    def _truncated(self, size: int, read: int) -> DataError:
        return DataError(
            f"{self.path} was cut to {size} bytes, but {read} had been read; only append to a stream, "
            "and start without --ckpt_path to learn from the new content"
        )
