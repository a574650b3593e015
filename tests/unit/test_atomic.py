"""Atomic writes: whole, or as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_gan.atomic import atomic_file, atomic_folder


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
