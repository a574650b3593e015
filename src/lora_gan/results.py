"""Results of held-out tests, in ``results.json`` of a run's folder: what was tested, on which data, and the metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lora_gan.atomic import atomic_file
from lora_gan.best_of import WAYS

RESULTS = "results.json"
BEST = "best_"  # begins the role of a choice from several completions
TITLES = {"base": "base", "start": "start", "trained": "trained", "sampled": "trained, sampled"}
TITLES |= {BEST + way: f"best by {way}" for way in WAYS}
TITLES |= {f"merge_{way}": f"merged, {way}" for way in ("average", "sum", "TIES", "DARE")}


@dataclass(frozen=True)
class Result:
    """One test of one checkpoint. A run has one result for each step and data."""

    checkpoint: str  # its file name; empty where the tested weights were not saved
    step: int  # training steps that its weights have learned in
    data: str  # source of the prompts
    prompts: int
    metrics: dict[str, dict[str, float]]  # role → metric → value; a role is a key of TITLES
    counted: dict[str, int] = field(default_factory=dict)  # metric that is a share of prompts → of how many

    @property
    def table(self) -> str:
        """Markdown table with a row for each metric and a column for each role."""
        return metrics_table(self.metrics)


def save_result(folder: Path, result: Result) -> None:
    """Add a result to those of a run; it replaces an older one of the same step and data."""
    others = [one for one in read_results(folder) if (one.step, one.data) != (result.step, result.data)]
    with atomic_file(folder / RESULTS) as draft:
        draft.write_text(json.dumps([asdict(one) for one in [*others, result]], indent=2) + "\n", encoding="utf-8")


def read_results(folder: Path, step: int | None = None) -> list[Result]:
    """The results of a run, the oldest first; empty if there was no test.

    Args:
        folder: The run's folder.
        step: Only those of the weights of this step.
    """
    path = folder / RESULTS
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [result for result in (Result(**one) for one in found) if step in (None, result.step)]


def metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown table with a row for each metric and a column for each role; empty cells where a role has no value."""
    names = dict.fromkeys(name for values in metrics.values() for name in values)
    rows = [[name, *(f"{one[name]:.3f}" if name in one else "" for one in metrics.values())] for name in names]
    return markdown_table(["metric", *(TITLES.get(role, role) for role in metrics)], rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table; line breaks become spaces."""
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def read_table(table: str) -> list[list[str]]:
    """The header and the rows of a :func:`markdown_table`, whose cells hold a bar only behind a backslash."""
    header, _, *rows = (line[2:-2].split(" | ") for line in table.strip().split("\n"))
    return [[cell.replace("\\|", "|").strip() for cell in row] for row in (header, *rows)]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or " "
