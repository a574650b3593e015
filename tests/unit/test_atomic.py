"""Atomic writes: whole, or as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_gan.atomic import append_json_line, atomic_file, atomic_folder, check_file_writable


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


# lines


def test_a_line_is_appended_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    for row in ({"a": "ä\n\u2028\ud800"}, {"b": [1]}):
        append_json_line(file, row)
    assert file.read_bytes() == '{"a": "ä\\n\u2028\\ud800"}\n{"b": [1]}\n'.encode()
    assert [json.loads(line) for line in file.read_text("utf-8").split("\n")[:2]] == [
        {"a": "ä\n\u2028\ud800"},
        {"b": [1]},
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"a": 1}\n{"a": "of a killed proc', b'{"a": 1}\n'),
        (b'{"a": "' + b"x" * 200_000, b""),
        (b'{"a": 1}\n' + "ä".encode()[:1], b'{"a": 1}\n'),
        (b'{"a": 1}\n{"a": 2}', b'{"a": 1}\n{"a": 2}\n'),  # by an editor that ends no line
        (b'{"a": "' + b"x" * 200_000 + b'"}', b'{"a": "' + b"x" * 200_000 + b'"}\n'),
        (b"\n", b"\n"),
    ],
)
def test_a_torn_line_does_not_damage_the_next(before: bytes, after: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(before)
    append_json_line(tmp_path / "rows.jsonl", {"b": 3})
    assert (tmp_path / "rows.jsonl").read_bytes() == after + b'{"b": 3}\n'


def test_what_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    """The disk is full after a part of a line; a limit of the file's size says so as a full disk does."""
    program = (
        "import resource, signal, sys; from pathlib import Path; from lora_gan.atomic import append_json_line\n"
        "append_json_line(Path(sys.argv[1]), {'a': 1})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))\n"
        "append_json_line(Path(sys.argv[1]), {'a': 'x' * 100})\n"
    )
    file = tmp_path / "rows.jsonl"
    ended = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True)
    assert ended.returncode == 1 and "OSError" in ended.stderr
    assert file.read_text() == '{"a": 1}\n'


def test_two_processes_append_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from lora_gan.atomic import append_json_line\n"
        "for n in range(40): append_json_line(Path(sys.argv[1]), {'who': sys.argv[2], 'n': n, 'x': 'x' * 5000})\n"
    )
    file = tmp_path / "rows.jsonl"
    both = [subprocess.Popen([sys.executable, "-c", program, str(file), who]) for who in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted((row["who"], row["n"]) for row in rows) == [(who, n) for who in "ab" for n in range(40)]
