"""Run: what its folder records, read into frozen data. A piece that is missing or damaged is named in ``notes``."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lora_gan.report.settings import Difference, differences
from lora_gan.results import Result, read_results, read_table

WARNINGS = "warnings.txt"
Curve = dict[int, float]  # step → value
Piece = TypeVar("Piece")


@dataclass(frozen=True)
class Samples:
    """Prompts, targets and completions of one validation, as a table."""

    step: int
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Records:
    """What a logger has written."""

    curves: dict[str, Curve] = field(default_factory=dict)
    samples: list[Samples] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds since 1970 of the records


@dataclass(frozen=True)
class Run:
    """A run as its folder shows it."""

    folder: Path
    config: dict[str, Any]
    differences: list[Difference]
    curves: dict[str, Curve]
    samples: list[Samples]
    results: list[Result]
    warnings: list[str]
    best: str  # the best checkpoint and why
    began: float | None  # seconds since 1970
    seconds: float | None  # from the first record to the last
    notes: list[str]  # what is missing or damaged

    @property
    def name(self) -> str:
        """The experiment and its version."""
        return "/".join(self.folder.resolve().parts[-2:])

    @property
    def steps(self) -> int:
        """Training steps done, as far as something was logged."""
        return max([max(curve) for curve in self.curves.values() if curve] + [r.step for r in self.results], default=0)

    @property
    def phases(self) -> list[Mapping[str, Any]]:
        """Phases of the curriculum: the settings of :class:`lora_gan.callbacks.Curriculum`."""
        callbacks = (self.config.get("trainer") or {}).get("callbacks") or []
        found = [c for c in callbacks if str(c.get("class_path", "")).endswith(".Curriculum")]
        return [phase for each in found for phase in (each.get("init_args") or {}).get("phases") or []]


def read_run(folder: Path) -> Run:
    """Read the folder of a run; nothing in it is required."""
    notes: list[str] = []
    nothing: dict[str, Any] = {}
    untested: list[Result] = []
    config = _tried(lambda: _config(folder), nothing, "config.yaml", notes)
    records = read_records(folder, notes)
    results = _tried(lambda: read_results(folder), untested, "results.json", notes)
    if not results:
        notes.append("There are no held-out results: the run ended without its test.")
    return Run(
        folder=folder,
        config=config,
        differences=_tried(lambda: differences(config), [], "the settings", notes),
        curves={tag: finite(curve, tag, notes) for tag, curve in sorted(records.curves.items())},
        samples=records.samples,
        results=results,
        warnings=_tried(lambda: _lines(folder / WARNINGS), [], WARNINGS, notes),
        best=best_checkpoint(folder, records.curves),
        began=min(records.times, default=None),
        seconds=max(records.times) - min(records.times) if records.times else None,
        notes=notes,
    )


def read_records(folder: Path, notes: list[str]) -> Records:
    """Curves and samples of TensorBoard, or the curves of CSVLogger."""
    events, tables = sorted(folder.glob("events.out.tfevents.*")), sorted(folder.glob("metrics*.csv"))
    if not events and not tables:
        notes.append("There are no curves and samples: the run has no records of TensorBoardLogger or CSVLogger.")
    if tables and not events:
        notes.append("There are no samples: only TensorBoardLogger keeps them in the run's folder.")
    records = Records()
    for path in events:
        _tried(lambda path=path: _add_events(path, records, notes), None, path.name, notes)  # type: ignore[misc]
    for path in () if events else tables:
        _tried(lambda path=path: _add_table(path, records), None, path.name, notes)  # type: ignore[misc]
    latest = {one.step: one for one in records.samples}  # a resumed run may repeat a step
    return Records(records.curves, [latest[step] for step in sorted(latest)], records.times)


def _add_events(path: Path, records: Records, notes: list[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    kept = {"scalars": 0, "tensors": 0, "images": 1, "histograms": 1, "compressedHistograms": 1, "audio": 1}
    events = EventAccumulator(str(path), size_guidance=kept)
    try:
        events.Reload()
    finally:  # what is before the damage counts
        tags = events.Tags()
        if not any(tags["scalars"]) and not any(tags["tensors"]):
            notes.append(f"{path.name} holds no record that can be read.")
        for tag in tags["scalars"]:
            for scalar in events.Scalars(tag):
                records.curves.setdefault(tag, {})[scalar.step] = scalar.value
                records.times.append(scalar.wall_time)
        for text in events.Tensors("samples/text_summary") if "samples/text_summary" in tags["tensors"] else ():
            table = tensor_util.make_ndarray(text.tensor_proto).item().decode("utf-8")
            header, *rows = read_table(table)
            records.samples.append(Samples(text.step, header, rows))


def _add_table(path: Path, records: Records) -> None:
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            step = int(float(row["step"]))
            for tag, value in row.items():
                if tag not in ("step", "epoch") and value:
                    records.curves.setdefault(tag, {})[step] = float(value)


def best_checkpoint(folder: Path, curves: Mapping[str, Curve]) -> str:
    """The best checkpoint and the metric that it was chosen by, with its value before training where that is known."""
    chosen = [tag for tag, curve in curves.items() if tag.startswith("best/") and curve]
    if not chosen:
        files = sorted(path.name for path in folder.glob("checkpoints/best*.ckpt"))
        return ", ".join(files) or "none"
    tag = max(chosen, key=lambda tag: max(curves[tag]))
    step, metric = max(curves[tag]), tag.removeprefix("best/")
    before = curves.get(metric, {}).get(0)
    start = "" if before is None else f", before training {before:.3f}"
    return f"step {step}, by {metric} {curves[tag][step]:.3f}{start}"


def finite(curve: Mapping[int, float], tag: str, notes: list[str]) -> Curve:
    """The finite values in the order of their steps; others are noted."""
    lost = sorted(step for step, value in curve.items() if not math.isfinite(value))
    if lost:
        notes.append(f"{tag} is not a finite number in {len(lost)} records, the first at step {lost[0]}.")
    return {step: curve[step] for step in sorted(curve) if math.isfinite(curve[step])}


def thinned(curve: Mapping[int, float], most: int = 500) -> Curve:
    """At most ``most`` points (>= 4) of a curve: the first, the last, and each stretch's extremes, so peaks stay."""
    points = list(curve.items())
    if len(points) <= most:
        return dict(points)
    inner, stretches = points[1:-1], (most - 2) // 2
    borders = [len(inner) * i // stretches for i in range(stretches + 1)]
    kept = dict([points[0], points[-1]])
    for begin, end in pairwise(borders):
        part = sorted(inner[begin:end], key=lambda point: point[1])
        kept.update([part[0], part[-1]])
    return {step: kept[step] for step in sorted(kept)}


def spread(found: Sequence[Samples], most: int = 6) -> Iterator[Samples]:
    """Evenly spaced ones, with the first and the last."""
    last = len(found) - 1
    count = min(most, len(found))
    for place in dict.fromkeys(round(last * i / max(count - 1, 1)) for i in range(count)):
        yield found[place]


def _config(folder: Path) -> dict[str, Any]:
    found = yaml.load(
        (folder / "config.yaml").read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _tried(read: Callable[[], Piece], otherwise: Piece, what: str, notes: list[str]) -> Piece:
    """What ``read`` returns; a failure is noted, because a report of the rest is better than none."""
    try:
        return read()
    except Exception as error:
        notes.append(f"{what} cannot be read ({type(error).__name__}: {error}).")
        return otherwise
