"""Atomic writes: a file, a folder or a line at a file's end is there whole, or all is as it was before.

A link stays, and what it points to is replaced. A device or a pipe is never replaced, but written to.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

BLOCK = 1 << 16  # bytes
log = logging.getLogger("lora_gan")


@contextmanager
def atomic_file(path: Path, writer: str = "") -> Iterator[Path]:
    """A draft to write, which becomes ``path``; an error leaves ``path`` as it was.

    Args:
        path: Replaced where it is there, once its bytes have reached the disk; a device or a pipe is its own draft.
        writer: Different for processes that may write the same file at once.
    """
    if _is_special(path):
        yield path
        return
    path = path.resolve()
    draft = path.with_name(f".{path.name}{writer}.partial")  # a name that no search for *.ckpt finds
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        _flush(draft, os.O_RDWR)
        draft.replace(path)
        if hasattr(os, "O_DIRECTORY"):  # only POSIX can make a change of names survive a power failure
            _flush(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A draft to fill, which becomes ``folder`` in place of an older one; an error leaves that as it was."""
    folder = folder.resolve()
    draft, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        if folder.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            folder.replace(old)
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def append_json_line(path: Path, row: object) -> None:
    """Add one line of JSON to a file; it has reached the disk when this returns. Several processes may do it at once.

    What a process that was killed while it wrote has left of its line is cut off, with a warning.

    Args:
        path: The file, which is made with its folder; a lock file lies beside it.
        row: What ``json`` can write.

    Raises:
        OSError: The line cannot be written; the file is as it was before.
    """
    from filelock import FileLock

    line = json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")), path.open("a+b", buffering=0) as file:
        size = _end_of_lines(path, file)
        try:
            written = file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, "no space left for a whole line", str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _end_of_lines(path: Path, file: FileIO) -> int:
    """Where the next line begins, after a file whose last line is not whole has been mended."""
    size = file.seek(0, os.SEEK_END)
    begin, last = size, b""
    while begin and b"\n" not in last:
        begin = max(begin - BLOCK, 0)
        file.seek(begin)
        last = file.read(size - begin)
    begin += last.rfind(b"\n") + 1
    last = last[last.rfind(b"\n") + 1 :]
    if not last:
        return size
    try:
        json.loads(last)
    except ValueError:
        log.warning("%s ended in a line that was cut short; it is removed: %r", path, last[:200])
        file.truncate(begin)
        return begin
    return size + file.write(b"\n")  # a line that someone wrote without its end


def check_file_writable(path: Path) -> None:
    """Make the folder of a file, and try that the file can be written there.

    Raises:
        OSError: It cannot.
    """
    if not _is_special(path):
        check_writable(path.resolve().parent)
    elif path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "no permission to write to it", str(path))


def _is_special(path: Path) -> bool:
    """Whether it exists and is no regular file."""
    return path.exists() and not path.is_file()


def check_writable(folder: Path) -> None:
    """Make a folder, and try that files can be written there.

    Raises:
        OSError: They cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def _flush(path: Path, how: int) -> None:
    descriptor = os.open(path, how)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
