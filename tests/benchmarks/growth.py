"""How time and memory of a step grow with the lengths, the completions and the vocabulary.

From the root of the repository, on Linux::

    python -m tests.benchmarks.growth --plot docs/growth.svg     # 10 minutes on one core

A middle point, and from it each of the four sizes a quarter and four times as large. Each point runs in a process of
its own, with one thread: CPU seconds, the median of ``--repeats`` after one to warm up, and peak memory above that of
the loaded model. ``step`` is a whole training step with discriminator and supervised term; ``tree`` and ``rows`` are
the forward and backward pass of all completions, as prompt trees and as padded rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lora_gan.advantages import GroupNormalised
from lora_gan.coefficients import Coefficients
from lora_gan.data.datamodule import collate
from lora_gan.discriminator import DiscriminatorSettings
from lora_gan.generator import GeneratorSettings
from lora_gan.module import LoraGANModule
from lora_gan.rewards import FunctionReward
from lora_gan.sampling import Sampling
from lora_gan.stepper import Stepper

from .passes import Passes
from .peak import environment, peak_megabytes
from .setting import BUILTIN_MODEL, LORA, Size, make_items, save_model
from .timing import timed

SIDES = ("step", "tree", "rows")
LABELS = {
    "prompt_tokens": "prompt, tokens",
    "completion_tokens": "completion, tokens",
    "num_generations": "completions per prompt",
    "vocabulary": "vocabulary",
}


@dataclass(frozen=True)
class Point:
    """The sizes of one measurement; the model has 4 layers of width 256."""

    prompt_tokens: int = 64
    completion_tokens: int = 32
    num_generations: int = 8
    vocabulary: int = 16_384
    prompts: int = 4

    @property
    def size(self) -> Size:
        model = BUILTIN_MODEL | {"vocab_size": self.vocabulary, "n_positions": 1024}
        return Size("", model, self.prompts, self.prompt_tokens, self.completion_tokens, self.num_generations)


@dataclass(frozen=True)
class Cost:
    """CPU seconds and peak megabytes."""

    seconds: float
    megabytes: float


def points() -> dict[str, list[Point]]:
    """By the size that varies: a quarter, the middle point, four times."""
    middle = Point()
    return {
        name: [replace(middle, **{name: value}) for value in (now // 4, now, now * 4)]
        for name in LABELS
        for now in [getattr(middle, name)]
    }


# in the process of a point


def measure(point: Point, repeats: int) -> dict[str, Cost]:
    """The costs of each of SIDES."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        folder = save_model(point.size, Path(name))
        passes = Passes(point.size, folder)
        return {side: cost_of(work, repeats) for side, work in _works(point.size, folder, passes).items()}


def _works(size: Size, folder: Path, passes: Passes) -> dict[str, Callable[[], Any]]:
    return {"step": Step(size, folder), "tree": passes.tree, "rows": passes.rows}


def cost_of(work: Callable[[], Any], repeats: int) -> Cost:
    """Peak of the second run and median time of as many more."""
    megabytes = [peak_megabytes(work) for _ in range(2)][-1]  # the first warms up
    return Cost(median(timed(work) for _ in range(repeats)), megabytes)


class Step:
    """One training step with all its parts."""

    def __init__(self, size: Size, folder: Path) -> None:
        module = LoraGANModule(
            base=str(folder),
            num_generations=size.num_generations,
            sampling=Sampling(max_new_tokens=size.completion_tokens),
            rewards=[FunctionReward(_constant)],
            advantage=GroupNormalised(),
            coefficients=Coefficients(supervised=1.0, adversarial=0.5, kl=0.04),
            generator=GeneratorSettings(lora=LORA),
            discriminator=DiscriminatorSettings(lora=LORA),
        )
        self.batch = collate(make_items(size, module.backbone.tokenizer))  # type: ignore[arg-type]
        self.module = module
        self.stepper = Stepper(module, torch.device("cpu"))

    def __call__(self) -> None:
        self.stepper.step(self.batch)


def _constant(response: str, target: str) -> float:
    return 1.0


# the table and the plot


def table(costs: dict[Point, dict[str, Cost]]) -> str:
    """Seconds and megabytes of all points; with the factor to the middle point's in brackets."""
    middle = costs[Point()]
    header = "| what varies | " + " | ".join(f"{side}, s | {side}, MB" for side in SIDES) + " |"
    lines = [header, "|---" * (1 + 2 * len(SIDES)) + "|", _row("middle point", middle, None)]
    for name, varied in points().items():
        lines += [
            _row(f"{LABELS[name]} {getattr(p, name):,}", costs[p], middle)
            for p in varied
            if p != Point() and p in costs
        ]
    return "\n".join(lines)


def _row(label: str, costs: dict[str, Cost], middle: dict[str, Cost] | None) -> str:
    cells = []
    for side in SIDES:
        cost, base = costs[side], Cost(0, 0) if middle is None else middle[side]
        cells.append(f"{cost.seconds:.2f}{_factor(cost.seconds, base.seconds)}")
        cells.append(f"{cost.megabytes:,.0f}{_factor(cost.megabytes, base.megabytes)}")
    return f"| {label} | {' | '.join(cells)} |"


def _factor(value: float, base: float) -> str:
    return f" (×{value / base:.2f})" if base else ""


def plot(costs: dict[Point, dict[str, Cost]], path: Path) -> None:
    """Time above, memory below, a column for each size that varies; both axes are logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, len(LABELS), sharey="row")
    for column, (name, varied) in enumerate(points().items()):
        measured = [p for p in varied if p in costs]
        for row, quantity in enumerate(("seconds", "megabytes")):
            axis = axes[row][column]
            for side in SIDES:
                values = [getattr(costs[p][side], quantity) for p in measured]
                axis.loglog([getattr(p, name) for p in measured], values, marker="o", label=side)
            axis.set_xlabel(LABELS[name])
            axis.set_xticks([getattr(p, name) for p in measured], [f"{getattr(p, name):,}" for p in measured])
            axis.minorticks_off()
        axes[0][column].set_title(LABELS[name])
    axes[0][0].set_ylabel("CPU seconds")
    axes[1][0].set_ylabel("peak memory, MB")
    axes[0][0].legend()
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all points and print their table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.growth", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=3, help="steps and passes that count, after one to warm up")
    parser.add_argument("--plot", type=Path, help="also draw the costs to this file, .svg or .png")
    parser.add_argument("--json", type=Path, help="also write the costs to this file")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.point is not None:
        print(json.dumps({side: asdict(cost) for side, cost in measure(Point(**chosen.point), chosen.repeats).items()}))
        return
    wanted = dict.fromkeys(point for varied in points().values() for point in varied)
    costs = {point: _in_own_process(point, chosen.repeats) for point in wanted}
    print(table(costs))
    if chosen.plot:
        plot(costs, chosen.plot)
    if chosen.json:
        records = [{**asdict(p), **{side: asdict(cost) for side, cost in found.items()}} for p, found in costs.items()]
        chosen.json.write_text(json.dumps(records, indent=2) + "\n")


def _in_own_process(point: Point, repeats: int) -> dict[str, Cost]:
    command = [sys.executable, "-m", "tests.benchmarks.growth", "--repeats", str(repeats)]
    command += ["--point", json.dumps(asdict(point))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{point} failed:\n{done.stderr}")
    return {side: Cost(**cost) for side, cost in json.loads(done.stdout.splitlines()[-1]).items()}


if __name__ == "__main__":
    main()
