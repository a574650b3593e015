"""The main job as the README says it: does it learn what it is there for?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROBE = 0.969  # share of facts that the built-in base completes, as its model card says


@pytest.mark.slow
def test_the_default_run_answers_with_what_the_base_knows(tmp_path: Path) -> None:
    """Greedy held-out exact match of at least 0.6 of the knowledge probe, from nothing (about five minutes)."""
    command = [sys.executable, "-m", "src.cli", "fit", "--config", "configs/gan.yaml"]
    subprocess.run([*command, f"--trainer.logger.init_args.save_dir={tmp_path}"], cwd=ROOT, check=True)
    (table,) = tmp_path.glob("gan/version_0/held_out.md")
    rows = [line.split("|") for line in table.read_text(encoding="utf-8").splitlines()]
    base, trained = next((float(row[2]), float(row[3])) for row in rows if row[1].strip() == "exact_match")
    assert base < 0.1
    assert trained >= 0.6 * PROBE


@pytest.mark.slow
@pytest.mark.parametrize(("control", "least", "most"), [(None, 0.6, 1.0), ("answers_only", 0.0, 0.4)])
def test_work_that_is_not_shown_is_learned_by_the_policy_gradient_alone(
    control: str | None, least: float, most: float, tmp_path: Path
) -> None:
    """Final answers of 300 held-out questions: most are right after digits.yaml, few after imitating answers."""
    command = [sys.executable, "-m", "src.cli", "fit", "--config", "configs/digits.yaml"]
    overlay = ["--config", f"configs/control/{control}.yaml"] if control else []
    subprocess.run([*command, *overlay, f"--trainer.logger.init_args.save_dir={tmp_path}"], cwd=ROOT, check=True)
    (table,) = tmp_path.glob("digits/version_0/held_out.md")
    rows = [line.split("|") for line in table.read_text(encoding="utf-8").splitlines()]
    base, trained = next((float(row[2]), float(row[3])) for row in rows if row[1].strip() == "answer")
    assert base < 0.25
    assert least <= trained <= most
