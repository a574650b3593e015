"""A row of the report: what is measured, the threshold, the outcome."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

from .machine import Machine

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
NOT_JUDGED = "speed is judged on a CUDA GPU only"


class Skip(Exception):
    """Raised by a check that cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Finding:
    """What a check has measured."""

    measured: str
    passed: bool
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """A measurement and its threshold.

    Args:
        group: Its group, a module of this package.
        name: What is checked.
        threshold: What must hold, in words.
        run: Measures; raises Skip where it cannot.
        seconds: About how long it takes on an H100.
        gpus: How many CUDA GPUs it needs.
        speed: It measures a speed, which means nothing for the small models of a CPU.
        large: It runs with ``--large`` only, on a CUDA GPU.
    """

    group: str
    name: str
    threshold: str
    run: Callable[[Machine], Finding]
    seconds: float
    gpus: int = 0
    speed: bool = False
    large: bool = False


@dataclass(frozen=True)
class Row:
    """The outcome of a check."""

    group: str
    name: str
    measured: str
    threshold: str
    outcome: str
    reason: str
    seconds: float
    values: Mapping[str, float]

    def __str__(self) -> str:
        said = f"{self.measured}   ({self.threshold})" if self.measured else ""
        reason = f"{self.outcome}: {self.reason}" if self.reason else self.outcome
        return f"{self.group:<9} {self.name:<46} {'   '.join(filter(None, (said, reason)))}   {self.seconds:.1f} s"

    def record(self) -> dict[str, Any]:
        return asdict(self)


def run_all(checks: Iterable[Check], machine: Machine, budget: float) -> Iterator[Row]:
    """The rows, one after another; what does not fit into ``budget`` seconds is skipped."""
    begun, group = perf_counter(), ""
    for check in checks:
        if check.group != group:
            machine.release()
            group = check.group
        yield run_one(check, machine, budget - (perf_counter() - begun))


def run_one(check: Check, machine: Machine, left: float = float("inf")) -> Row:
    """One row; an exception is a failure with its message."""
    begun = perf_counter()
    outcome, reason, finding = _outcome(check, machine, left)
    if outcome == FAIL and reason:
        machine.release()  # what it was working on is freed by now
    values = {name: float(value) for name, value in finding.values.items()}
    seconds = perf_counter() - begun
    return Row(check.group, check.name, finding.measured, check.threshold, outcome, reason, seconds, values)


def _outcome(check: Check, machine: Machine, left: float) -> tuple[str, str, Finding]:
    """The outcome, its reason and what was measured."""
    nothing = Finding("", False)
    if reason := _why_not(check, machine, left):
        return SKIP, reason, nothing
    try:
        with machine.fresh():
            finding = check.run(machine)
    except Skip as skipped:
        return SKIP, str(skipped), nothing
    except Exception as error:  # whatever a check raises, the next one runs
        last = traceback.extract_tb(error.__traceback__)[-1]
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return FAIL, f"{what} ({last.filename.rpartition('/')[2]}:{last.lineno})", nothing
    if check.speed and not machine.is_cuda:
        return SKIP, NOT_JUDGED, finding
    return (PASS if finding.passed else FAIL), "", finding


def _why_not(check: Check, machine: Machine, left: float) -> str:
    """Why the check is not run here; empty if it is."""
    needed = max(check.gpus, int(check.large))
    if machine.gpus < needed:
        return "needs a CUDA GPU" if needed == 1 else f"needs {needed} CUDA GPUs, found {machine.gpus}"
    if check.large and not machine.large:
        return "needs --large"
    if check.seconds > left:
        return f"takes about {check.seconds:.0f} s, and {max(left, 0):.0f} s of the budget are left"
    return ""


@contextmanager
def warned() -> Iterator[list[str]]:
    """The warnings of lora-gan within the context, such as that a slower way had to be taken."""
    found: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    log, keeper = logging.getLogger("lora_gan"), Keeper(logging.WARNING)
    before = log.level, log.propagate
    log.addHandler(keeper)
    log.setLevel(logging.WARNING)
    log.propagate = False  # the table alone is printed
    try:
        yield found
    finally:
        log.removeHandler(keeper)
        log.level, log.propagate = before
