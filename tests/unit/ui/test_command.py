"""The command: its checks come before the page."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import lora_gan
from lora_gan.cli import main
from lora_gan.errors import LoraGANError
from lora_gan.ui.command import check_ratings, named, require_gradio


def made(folder: Path) -> str:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").touch()
    (folder / "checkpoints" / "last.ckpt").touch()
    return str(folder)


def test_without_gradio_the_command_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(LoraGANError, match=r"pip install 'gradio>=6.31,<7' .*\[ui\]"):
        require_gradio()
    with pytest.raises(SystemExit) as ended:
        main(["ui", "no_such_run"])
    assert ended.value.code == 2 and "error: the page needs gradio" in capsys.readouterr().err


def test_runs_are_named(tmp_path: Path) -> None:
    one, other = made(tmp_path / "a" / "qa" / "version_0"), made(tmp_path / "b" / "qa" / "version_0")
    assert named([one]) == {"qa/version_0": Path(one)}
    assert named([one, other]) == {"qa/version_0": Path(one), other: Path(other)}
    with pytest.raises(LoraGANError, match="given twice"):
        named([one, f"{one}/../version_0"])
    with pytest.raises(LoraGANError, match=r"none is not the folder of a run: it has no config.yaml"):
        named([str(tmp_path / "none")])
    Path(one, "checkpoints", "last.ckpt").unlink()
    with pytest.raises(LoraGANError, match="it has no checkpoints"):
        named([one])
    with pytest.raises(LoraGANError, match="ui needs the folder of a run"):
        named([])


def test_ratings_that_cannot_be_written_are_found_first(tmp_path: Path) -> None:
    check_ratings(tmp_path / "new" / "ratings.jsonl")
    (tmp_path / "file").touch()
    for wrong in (tmp_path, tmp_path / "file" / "ratings.jsonl"):
        with pytest.raises(LoraGANError, match=r"ratings cannot be written to .*--ratings"):
            check_ratings(wrong)


def test_the_extra_is_imported_inside_functions() -> None:
    """So fit, and all else, needs none of it."""
    pattern = re.compile(r"^(?:from|import) (?:gradio|fastapi|uvicorn|filelock)\b", re.MULTILINE)
    sources = [path.read_text(encoding="utf-8") for path in Path(lora_gan.__file__).parent.rglob("*.py")]
    assert any("import gradio" in source for source in sources)
    assert [found for source in sources for found in pattern.findall(source)] == []
