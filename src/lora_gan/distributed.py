"""Distributed processes, one per device: collective operations. A single process gets its own values back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def several() -> bool:
    """Whether there is more than one process."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def gathered(value: T) -> list[T]:
    """The value of every process, by rank; every process must call this."""
    if not several():
        return [value]
    values: list[T] = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def any_of(decision: bool) -> bool:
    """Whether the decision is True in any process."""
    return any(gathered(decision))


def in_order(rows: Sequence[T], count: int | None = None) -> list[T]:
    """The rows of all processes in the order of the data: process r holds rows r, r + n, r + 2n, … of them.

    Args:
        rows: The rows of this process.
        count: Number of rows in the data; a sampler repeats some so that all processes have equally many.
    """
    nothing = object()
    together = [row for row in _flat(zip_longest(*gathered(list(rows)), fillvalue=nothing)) if row is not nothing]
    return together[:count]  # type: ignore[return-value]


def mean_of_all(metrics: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """Each metric's mean over the processes that have it."""
    if not several():
        return {name: torch.as_tensor(value) for name, value in metrics.items()}
    by_rank = gathered({name: float(value) for name, value in metrics.items()})
    names = dict.fromkeys(name for one in by_rank for name in one)
    values = {name: [one[name] for one in by_rank if name in one] for name in names}
    return {name: torch.tensor(sum(found) / len(found)) for name, found in values.items()}


def shares(*counts: float) -> list[float]:
    """Each count divided by its mean over the processes.

    Multiply a mean over the tokens of this process by their share: averaged over the processes, as gradients are, the
    result is the mean over the tokens of all processes.
    """
    totals = [sum(column) for column in zip(*gathered(counts), strict=True)]
    size = distributed.get_world_size() if several() else 1
    return [count * size / total if total else 1.0 for count, total in zip(counts, totals, strict=True)]


def _flat(groups: object) -> list[object]:
    return [item for group in groups for item in group]  # type: ignore[attr-defined]
