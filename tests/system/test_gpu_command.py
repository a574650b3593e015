"""``python -m tests.gpu`` on a CPU: some rows of the real command, and what becomes of rows that fail or do not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.__main__ import GROUPS, checks_of, summary
from tests.gpu.machine import Machine
from tests.gpu.rows import FAIL, PASS, SKIP, Check, Finding, Skip, run_all, run_one

ROOT = Path(__file__).parents[2]
CPU = Machine(torch.device("cpu"))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, "-m", "tests.gpu", "--device", "cpu", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(given, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1200, check=False)


def test_the_command_prints_a_row_for_each_check(tmp_path: Path) -> None:
    done = command("--only", "tree", "sync", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    first, *rows, last = done.stdout.splitlines()
    assert first.startswith("CPU, 1 thread(s) · torch ") and "copy" in first and "TFLOP/s" in first
    assert len(rows) == len(checks_of(["tree", "sync"])) and all(row.split()[0] in ("tree", "sync") for row in rows)
    assert "PASS" in rows[0] and rows[-1].split("SKIP: ")[1].startswith("needs a CUDA GPU")
    assert " failed" in last and "needs a CUDA GPU" in last
    records = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]
    assert [record["name"] in row for record, row in zip(records, rows, strict=True)] == [True] * len(rows)
    assert records[0]["outcome"] == PASS and records[0]["values"]["gradient"] <= 1e-4


@pytest.mark.slow
def test_all_rows_run_on_a_cpu() -> None:
    """In under three minutes on an idle machine; none fails."""
    done = command("--budget", "1000")
    assert done.returncode == 0, done.stdout
    rows = [line for line in done.stdout.splitlines() if line.split()[0] in GROUPS]
    assert len(rows) == len(checks_of(GROUPS))


# outcomes


def check(run: Callable[[Machine], Finding], **settings: Any) -> Check:
    return Check("tree", "name", "≤ 1", run, seconds=10, **settings)


def measured(machine: Machine) -> Finding:
    return Finding("2", False, {"x": 2.0})


def broken(machine: Machine) -> Finding:
    raise ValueError("two\nlines")


def absent(machine: Machine) -> Finding:
    raise Skip("trl is not installed")


def test_a_row_that_does_not_meet_its_threshold_fails() -> None:
    row = run_one(check(measured), CPU)
    assert (row.outcome, row.measured, row.values, row.reason) == (FAIL, "2", {"x": 2.0}, "")
    assert str(row).startswith("tree") and "2   (≤ 1)   FAIL" in str(row)


def test_an_exception_is_a_failure_in_one_line_and_the_next_row_runs() -> None:
    first, second = run_all([check(broken), check(measured)], CPU, 100)
    assert first.outcome == FAIL and first.reason.startswith("ValueError: two lines (test_gpu_command.py:")
    assert second.measured == "2"


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (check(absent), "trl is not installed"),
        (check(measured, gpus=1), "needs a CUDA GPU"),
        (check(measured, gpus=2), "needs 2 CUDA GPUs, found 0"),
        (check(measured, large=True), "needs a CUDA GPU"),
        (check(measured, speed=True), "speed is judged on a CUDA GPU only"),
    ],
)
def test_a_row_that_says_nothing_here_is_skipped_with_the_reason(made: Check, reason: str) -> None:
    row = run_one(made, CPU)
    assert (row.outcome, row.reason) == (SKIP, reason)


def test_what_does_not_fit_the_budget_is_skipped() -> None:
    (row,) = run_all([check(measured)], CPU, budget=4)
    assert row.outcome == SKIP and row.reason.startswith("takes about 10 s, and ")
    assert summary([row], 61).startswith("0 passed, 0 failed, 1 skipped (1 × takes about 10 s")


def test_every_group_has_checks_of_its_name() -> None:
    for group in GROUPS:
        checks = checks_of([group])
        assert checks and {c.group for c in checks} == {group}
        assert len({c.name for c in checks}) == len(checks)
    assert sum(c.seconds for c in checks_of(GROUPS) if not c.large and c.gpus < 2) < 600, "ten minutes on a GPU"
