"""``python -m tests.gpu``: the table."""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts; deterministic: true needs it
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import json
import logging
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from time import perf_counter

import torch

from tests.benchmarks.__main__ import be_quiet

from .machine import Machine
from .rows import FAIL, PASS, SKIP, Check, Row, run_all

GROUPS = (
    "tree",
    "sample",
    "precision",
    "quant",
    "resume",
    "sync",
    "decode",
    "passes",
    "head",
    "step",
    "engines",
    "other",
)
BUDGET = 540.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen groups; 1 if a row failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description="Is lora-gan right and fast here?")
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds; what does not fit is skipped")
    parser.add_argument("--large", action="store_true", help="also models of 8 billion parameters, on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default a GPU if there is one")
    parser.add_argument("--json", type=Path, help="also write all rows to this file")
    chosen = parser.parse_args(arguments)
    device = _device(parser, chosen.device)
    be_quiet()
    for name in ("lora_gan", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    machine = Machine(device, chosen.large)
    begun = perf_counter()
    print(machine, flush=True)
    rows: list[Row] = []
    for row in run_all(checks_of(chosen.only), machine, chosen.budget):
        print(row, flush=True)
        rows.append(row)
    print(summary(rows, perf_counter() - begun))
    if chosen.json:
        report = {"machine": str(machine), "rows": [row.record() for row in rows]}
        chosen.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(any(row.outcome == FAIL for row in rows))


def _device(parser: argparse.ArgumentParser, wanted: str | None) -> torch.device:
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that nothing else takes a GPU by default
    if wanted != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", 0)
    if wanted == "cuda":
        parser.error("torch finds no CUDA GPU here; leave --device out to run on the CPU")
    return torch.device("cpu")


def checks_of(groups: Sequence[str]) -> list[Check]:
    """The checks of these groups, in the order of GROUPS."""
    package = __package__ or "tests.gpu"
    return [check for group in GROUPS if group in groups for check in import_module(f"{package}.{group}").CHECKS]


def summary(rows: Sequence[Row], seconds: float) -> str:
    """How many passed, failed and were skipped, and why."""
    count = Counter(row.outcome for row in rows)
    reasons = Counter(row.reason for row in rows if row.outcome == SKIP)
    skipped = "; ".join(f"{n} × {reason}" for reason, n in reasons.items())
    line = f"{count[PASS]} passed, {count[FAIL]} failed, {count[SKIP]} skipped"
    return f"{line}{f' ({skipped})' if skipped else ''}   {seconds // 60:.0f} min {seconds % 60:.0f} s"


if __name__ == "__main__":
    raise SystemExit(main())
