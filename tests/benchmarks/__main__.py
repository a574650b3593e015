"""``python -m tests.benchmarks``: the table of the README."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers.utils.logging import disable_progress_bar

from .memory import print_memory
from .passes import compare_passes
from .population import compare_population
from .setting import SIZES, Size, save_model
from .timing import HEADER, Comparison

SPEED = ("tree", "sampler", "population", "step")


def main() -> None:
    """Run the chosen benchmarks and print their table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description="Speed against the usual alternatives."
    )
    parser.add_argument("--size", choices=SIZES, nargs="+", default=["gpt2", "builtin"])
    parser.add_argument("--only", choices=(*SPEED, "workers", "memory"), nargs="+", default=SPEED)
    parser.add_argument("--repeats", type=int, default=5, help="pairs that count, after one to warm up")
    parser.add_argument("--threads", type=int, default=2, help="with 1, CPU time is measured instead of wall time")
    parser.add_argument("--json", type=Path, help="also write all seconds to this file")
    chosen = parser.parse_args()
    if "step" in chosen.only and find_spec("trl") is None:
        parser.error(
            "steps are measured against TRL's: pip install trl==1.16.0, or choose --only tree sampler population"
        )
    if "workers" in chosen.only and find_spec("ray") is None:
        print("workers: skipped, because Ray is missing: pip install ray")
        chosen.only = [name for name in chosen.only if name != "workers"]
    torch.set_num_threads(chosen.threads)
    be_quiet()
    print(f"{platform.machine()}, torch {torch.__version__}, {chosen.threads} thread(s)", end=", ")
    print(f"load average at the start {os.getloadavg()[0]:.1f}\n", flush=True)
    if "memory" in chosen.only:
        print_memory(chosen.repeats)
    done = list(_speed(chosen)) if set(chosen.only) & {*SPEED, "workers"} else []
    if chosen.json:
        chosen.json.write_text(json.dumps([comparison.record() for comparison in done], indent=2) + "\n")


def _speed(chosen: argparse.Namespace) -> Iterator[Comparison]:
    print(HEADER, flush=True)
    for name in chosen.size:
        for comparison in _measure(SIZES[name], chosen.only, chosen.repeats):
            print(comparison.row(), flush=True)
            yield comparison


def _measure(size: Size, wanted: Sequence[str], repeats: int) -> Iterator[Comparison]:
    with TemporaryDirectory() as name:
        folder = save_model(size, Path(name))
        yield from compare_passes(size, folder, repeats, wanted)
        if "population" in wanted:
            yield from compare_population(size, folder, repeats)
        if "workers" in wanted:
            from .workers import compare_workers

            yield from compare_workers(size, folder, repeats)
        if "step" in wanted:
            from .steps import compare_steps  # needs TRL

            yield from compare_steps(size, folder, repeats)


def be_quiet() -> None:
    """Print nothing but the table."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    disable_progress_bar()
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch", "transformers", "trl", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
