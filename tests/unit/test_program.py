"""Program: its name, and commands that a shell reads as they were meant."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from lora_gan.program import command, program_name


@pytest.mark.parametrize(
    ("started", "name"),
    [
        ("/usr/bin/lora-gan", "lora-gan"),
        ("lora-gan.exe", "lora-gan"),
        ("/a/lora_gan/__main__.py", "python -m lora_gan"),
        ("/a/src/cli.py", "python -m src.cli"),
        ("/usr/bin/pytest", "python -m src.cli"),
    ],
)
def test_the_name_is_what_was_typed(started: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [started])
    assert program_name() == name


def test_a_path_with_spaces_can_be_pasted_into_a_shell() -> None:
    printed = command("fit", "--config", Path("my runs") / "it's" / "config.yaml")
    assert shlex.split(printed)[-3:] == ["fit", "--config", "my runs/it's/config.yaml"]
    assert command("chat", "--ckpt_path", "runs/last.ckpt").endswith(" chat --ckpt_path runs/last.ckpt")
