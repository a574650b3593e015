"""Atomic writes: whole, or as it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_gan.atomic import atomic_file, atomic_folder, check_file_writable


def test_a_file_is_replaced_only_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file.txt"
    with atomic_file(file) as draft:
        draft.write_text("first")
        assert not file.exists()
    with pytest.raises(RuntimeError), atomic_file(file) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert file.read_text() == "first"
    assert [path.name for path in file.parent.iterdir()] == ["file.txt"]


def test_two_writers_do_not_share_a_draft(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    with atomic_file(file, writer=".1") as one, atomic_file(file, writer=".2") as other:
        one.write_text("one")
        other.write_text("other")
    assert file.read_text() == "one"  # the last to finish


def test_a_draft_is_no_checkpoint(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "last.ckpt") as draft:
        draft.write_text("half")
        assert list(tmp_path.glob("*.ckpt")) == []


def test_a_folder_is_replaced_not_filled(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name in ("old", "new"):
        with atomic_folder(folder) as draft:
            (draft / name).touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    with pytest.raises(RuntimeError), atomic_folder(folder) as draft:
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    (tmp_path / "link").symlink_to("folder")
    with atomic_folder(tmp_path / "link") as draft:
        (draft / "new").touch()
    (tmp_path / "file").symlink_to(tmp_path / "folder" / "text")
    with atomic_file(tmp_path / "file") as draft:
        draft.write_text("whole")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").is_symlink()
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["new", "text"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


def test_a_pipe_is_its_own_draft(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    check_file_writable(tmp_path / "pipe")
    with atomic_file(tmp_path / "pipe") as draft:
        assert draft == tmp_path / "pipe"
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(NotADirectoryError), atomic_folder(tmp_path / "pipe"):
        pass
    with pytest.raises(IsADirectoryError):
        check_file_writable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
