"""The README's examples run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_gan.cli import main
from tests.test_cli import data as data  # the fixture
from tests.test_cli import settings, torch_state

README = Path(__file__).parents[1] / "README.md"


def block(name: str) -> str:
    """The code block that begins with "# name"."""
    found = re.search(rf"```\w+\n(# {re.escape(name)}\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return found[1] if found else ""


@pytest.mark.skipif(not block("mine.yaml"), reason="the README has no mine.yaml")
def test_own_reward_and_metric(
    bases: dict[str, str], data: Path, work_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In files of one's own, outside the package."""
    monkeypatch.syspath_prepend(str(work_in))
    for name in ("my_rewards.py", "mine.yaml"):
        (work_in / name).write_text(block(name), encoding="utf-8")
    with torch_state():
        main(["fit", *settings(bases["gpt2"], data, work_in), "--config=mine.yaml", "--trainer.max_steps=2"])
    (folder,) = work_in.glob("gan/version_*")
    events = EventAccumulator(str(folder)).Reload()
    names = set(events.Tags()["scalars"])
    assert {"reward/share_of_a", "reward/brevity", "text/mentions_target", "text/rouge_l"} <= names
    assert "test/trained/mentions_target" in names
    assert len(events.Scalars("text/rouge_l")) == 1, "measured once"
