"""Page: the report as static HTML; every text in it is escaped."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from lora_gan.program import __version__
from lora_gan.report.plots import plots
from lora_gan.report.run import Run, spread
from lora_gan.report.settings import as_text
from lora_gan.results import TITLES, Result

ERRORS = 2.0  # standard errors from which a difference is marked
STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1150px;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.6em 0}th,td{border:1px solid #ccc;padding:.2em .6em;text-align:left;
vertical-align:top;white-space:pre-wrap;overflow-wrap:anywhere}
td:first-child{overflow-wrap:normal}th{background:#f3f3f3}
.plots{display:flex;flex-wrap:wrap;gap:.5em}.plots svg{width:34em;max-width:100%;height:auto}
.marked{background:#fff1b8;font-weight:600}.note{color:#8a4b00}small{color:#666}"""
HEAD = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
)


def page(runs: Sequence[Run]) -> str:
    """The whole page of one or several runs."""
    title = "Run " + ", ".join(run.name for run in runs)
    parts = [
        f"{HEAD}<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>",
        summary(runs),
        notes(runs),
        *section("Curves", phases(runs) + '<div class="plots">' + "\n".join(plots(runs)) + "</div>"),
        *section("Held-out test", held_out(runs)),
        *section("Samples through time", "".join(samples(run, len(runs) > 1) for run in runs)),
        *section("Time and memory", speed(runs)),
        *section("Settings that differ from the defaults", settings(runs)),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def section(title: str, body: str) -> tuple[str, str]:
    """A part of the page."""
    return f"<h2>{escape(title)}</h2>", body or "<p>Nothing is recorded.</p>"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of texts, escaped here."""
    return raw_table(header, ([f"<td>{escape(cell)}</td>" for cell in row] for row in rows))


def raw_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are HTML already; the header is escaped here."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{''.join(row)}</tr>" for row in rows) + "</table>"


def summary(runs: Sequence[Run]) -> str:
    """What each run is: date, version, steps, time, best checkpoint."""
    facts: list[tuple[str, list[str]]] = [
        ("folder", [str(run.folder) for run in runs]),
        ("begun", [_date(run.began) for run in runs]),
        ("steps", [f"{run.steps} of {(run.config.get('trainer') or {}).get('max_steps', '?')}" for run in runs]),
        ("time, first record to last", [_duration(run.seconds) for run in runs]),
        ("best checkpoint", [run.best for run in runs]),
    ]
    body = table(["", *(run.name for run in runs)], ([name, *values] for name, values in facts))
    return f"{body}<p><small>Written {_date(time.time())} by lora-gan {__version__}.</small></p>"


def notes(runs: Sequence[Run]) -> str:
    """Warnings of the runs, and what is missing."""
    lines = [f"{_of(run, runs)}{line}" for run in runs for line in run.warnings]
    missing = [f"{_of(run, runs)}{line}" for run in runs for line in run.notes]
    said = f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else "<p>None is recorded.</p>"
    gone = "".join(f'<p class="note">{escape(line)}</p>' for line in missing)
    return f"<h2>Warnings</h2>{said}{gone}"


def _of(run: Run, runs: Sequence[Run]) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


# held-out results


def standard_error(share: float, count: int) -> float:
    """Standard error of a share of ``count`` independent prompts: sqrt(p (1 − p) / n)."""
    return math.sqrt(max(share * (1 - share), 0.0) / count)


def differs(first: float, second: float, counts: tuple[int, int]) -> bool:
    """Whether two shares differ by more than two standard errors of their difference.

    The error is that of equal shares, sqrt(p (1 − p) (1/n + 1/m)) with p of both together: it is not 0 where a share
    is 0 or 1. Tests of the same prompts are taken as independent, which is cautious.
    """
    n, m = counts
    together = (first * n + second * m) / (n + m)
    error = math.sqrt(max(together * (1 - together), 0.0) * (1 / n + 1 / m))
    return abs(first - second) > ERRORS * error


def shares(result: Result) -> dict[str, int]:
    """Metrics that are shares of prompts, and of how many."""
    return {**result.counted, "truncated": result.prompts}


def held_out(runs: Sequence[Run]) -> str:
    """Tables of the tests: a row for each metric, a column for each role; of several runs side by side."""
    if len(runs) > 1:
        return compared(runs)
    parts = []
    for result in runs[0].results:
        names = dict.fromkeys(name for values in result.metrics.values() for name in values)
        rows = ([name, *(_value(result, role, name) for role in result.metrics)] for name in names)
        what = f"{result.checkpoint or 'weights'} of step {result.step}, {result.prompts} prompts: {result.data}"
        parts.append(f"<p>{escape(what)}</p>" + table(["metric", *(TITLES.get(r, r) for r in result.metrics)], rows))
    return "".join([*parts, f"<p><small>{ABOUT_ERRORS}</small></p>"] if parts else [])


ABOUT_ERRORS = "± is the standard error of a share of the prompts, or of those n of them that the metric applies to."


def compared(runs: Sequence[Run]) -> str:
    """The newest test of each run; shares that differ from those of the first tested run are marked."""
    tested = [(run, run.results[-1]) for run in runs if run.results]
    if not tested:
        return ""
    first = tested[0][1]
    names = dict.fromkeys((r, n) for _, one in tested for r, values in one.metrics.items() for n in values)
    rows = []
    for role, name in names:
        cells = [f"<td>{escape(TITLES.get(role, role))}</td><td>{escape(name)}</td>"]
        for _, one in tested:
            marked = ' class="marked"' if is_marked(first, one, role, name) else ""
            cells.append(f"<td{marked}>{escape(_value(one, role, name))}</td>")
        rows.append(cells)
    header = ["role", "metric", *(f"{run.name}, step {one.step}, {one.prompts} prompts" for run, one in tested)]
    same = len({one.data for _, one in tested}) == 1
    about = "Marked: shares that differ from the first run's by more than two standard errors of the difference."
    also = "" if same else " Runs that were tested on other data than the first one are not marked."
    return raw_table(header, rows) + f"<p><small>{ABOUT_ERRORS} {about}{also}</small></p>"


def is_marked(first: Result, other: Result, role: str, name: str) -> bool:
    """Whether a share of another run differs from the first run's, on the same data."""
    a, b = first.metrics.get(role, {}).get(name), other.metrics.get(role, {}).get(name)
    n, m = shares(first).get(name), shares(other).get(name)
    return bool(a is not None and b is not None and n and m and first.data == other.data and differs(a, b, (n, m)))


def _value(result: Result, role: str, name: str) -> str:
    value, count = result.metrics.get(role, {}).get(name), shares(result).get(name)
    if value is None:
        return ""
    if not count:
        return f"{value:.3f}"
    of = "" if count == result.prompts else f" (n = {count})"
    return f"{value:.3f} ± {standard_error(value, count):.3f}{of}"


# the other parts


def phases(runs: Sequence[Run]) -> str:
    """The phases of the curricula, which the plots show as vertical lines."""
    lines = [
        f"{_of(run, runs)}from step {phase.get('start')}: "
        + ", ".join(f"{key} {as_text(value)}" for key, value in phase.items() if key != "start" and value)
        for run in runs
        for phase in run.phases
    ]
    return f"<p>Phases (vertical lines): {'; '.join(map(escape, lines))}</p>" if lines else ""


def samples(run: Run, named: bool) -> str:
    """For each prompt of the validations, its completions at several steps."""
    chosen = list(spread(run.samples))
    if not chosen:
        return ""
    texts: dict[tuple[str, ...], list[list[str]]] = {}
    for one in chosen:
        for row in one.rows:
            texts.setdefault(tuple(row[:2]), []).append([str(one.step), *row[2:]])
    parts = [f"<h3>{escape(run.name)}</h3>"] if named else []
    for (prompt, *target), rows in texts.items():
        parts.append(f"<p><b>{escape(prompt)}</b> <small>target: {escape(' '.join(target))}</small></p>")
        parts.append(table(["step", *chosen[-1].header[2:]], rows))
    return "".join(parts)


def speed(runs: Sequence[Run]) -> str:
    """Means of what callbacks log about time and memory."""
    tags = sorted({tag for run in runs for tag in run.curves if tag.startswith("speed/") or "memory" in tag.lower()})
    if not tags:
        return "<p>Not recorded: add lora_gan.callbacks.Throughput, and for memory Lightning's DeviceStatsMonitor.</p>"
    rows = ([f"mean {tag}", *(_mean(run.curves.get(tag, {}).values()) for run in runs)] for tag in tags)
    return table(["", *(run.name for run in runs)], rows)


def settings(runs: Sequence[Run]) -> str:
    """Differences from the defaults; of several runs a column for each, and the default."""
    values = [{one.name: one.value for one in run.differences} for run in runs]
    defaults = {one.name: one.default for run in reversed(runs) for one in run.differences}
    names = dict.fromkeys(name for each in values for name in each)
    rows = ([name, *(each.get(name, "(default)") for each in values), defaults[name]] for name in names)
    return table(["setting", *(run.name for run in runs), "default"], rows) if names else ""


def _mean(values: Iterable[Any]) -> str:
    found = list(values)
    return f"{sum(found) / len(found):.4g}" if found else ""


def _date(seconds: float | None) -> str:
    return "unknown" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _duration(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{int(seconds) // 60} min {int(seconds) % 60} s"
