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
    """Wall time in seconds; with one thread CPU time, which depends little on other load."""
    return process_time() if torch.get_num_threads() == 1 else perf_counter()


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"
