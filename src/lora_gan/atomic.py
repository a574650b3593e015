"""Atomic writes: a file or folder is there whole, or as it was before.

A link stays, and what it points to is replaced. A device or a pipe is never replaced, but written to.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
