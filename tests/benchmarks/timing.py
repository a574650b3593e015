"""Timing of two sides in turns, and the ratio of each pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch


@dataclass(frozen=True)
class Comparison:
    """Seconds of both sides, pair by pair."""

    size: str
    what: str
    other: str
    ours_seconds: tuple[float, ...]
    other_seconds: tuple[float, ...]
    target: float  # wanted ratio

    @property
    def ratios(self) -> list[float]:
        return [other / ours for ours, other in zip(self.ours_seconds, self.other_seconds, strict=True)]

    def row(self) -> str:
        """A line of the table."""
        ours, other, ratio = median(self.ours_seconds), median(self.other_seconds), median(self.ratios)
        spread = f"{min(self.ratios):.2f}–{max(self.ratios):.2f}"
        return (
            f"| {self.size} | {self.what} | {self.other} | {_seconds(ours)} | {_seconds(other)} "
            f"| **{ratio:.2f}** [{spread}] | {self.target:.1f} |"
        )

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"ratios": self.ratios, "ratio": median(self.ratios)}


HEADER = """\
| size | ours | baseline | ours, s | baseline, s | times faster, median [min–max] | wanted |
|---|---|---|---:|---:|---:|---:|"""


def compare(
    size: str, what: str, other: str, ours: Callable[[], Any], theirs: Callable[[], Any], target: float, repeats: int
) -> Comparison:
    """Time both in turns; the first pair warms up."""
    pairs = [(timed(ours), timed(theirs)) for _ in range(repeats + 1)][1:]
    mine, others = zip(*pairs, strict=True)
    return Comparison(size, what, other, mine, others, target)


def timed(work: Callable[[], Any]) -> float:
    """Seconds that ``work`` takes."""
    begun = clock()
    work()
    return clock() - begun


def clock() -> float:
    """Wall time in seconds, after a GPU has finished; with one thread CPU time, which depends little on other load."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return perf_counter()
    return process_time() if torch.get_num_threads() == 1 else perf_counter()


class Meter:
    """Seconds and, on a GPU, bytes between two points of a program."""

    def start(self) -> None:
        """Begin."""
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()
        self._begun = clock()

    def stop(self) -> Cost:
        """What it took since :meth:`start`."""
        seconds = clock() - self._begun
        most = torch.cuda.max_memory_allocated() - self._held if torch.cuda.is_initialized() else 0
        return Cost(seconds, float(most))


@dataclass(frozen=True)
class Cost:
    """Of a piece of work."""

    seconds: float
    bytes: float  # most allocated on a GPU, above what was at the start; 0 on a CPU


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"
