"""``python -m tests.benchmarks``: the table of the README."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers.utils.logging import disable_progress_bar

from .passes import compare_passes
from .setting import SIZES, save_model
from .timing import HEADER, Comparison

CASES = ("tree", "sampler", "round")


def main() -> None:
    """Run the benchmarks that are asked for and print their table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Speed, ours beside others'.")
    parser.add_argument("--size", choices=SIZES, nargs="+", default=["gpt2", "builtin"])
    parser.add_argument("--only", choices=CASES, nargs="+", default=CASES)
    parser.add_argument("--repeats", type=int, default=5, help="pairs that count, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all seconds to this file too")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    _be_quiet()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {chosen.threads} threads, load "
          f"average before {os.getloadavg()[0]:.1f}\n\n{HEADER}", flush=True)  # fmt: skip
    done: list[Comparison] = []
    for name in chosen.size:
        with TemporaryDirectory() as folder:
            size, saved = SIZES[name], save_model(SIZES[name], Path(folder))
            new = compare_passes(size, saved, chosen.repeats, chosen.only)
            if "round" in chosen.only:
                from .rounds import compare_rounds  # needs TRL

                new += compare_rounds(size, saved, chosen.repeats)
            print("\n".join(comparison.row() for comparison in new), flush=True)
            done += new
    if chosen.json:
        chosen.json.write_text(json.dumps([comparison.record() for comparison in done], indent=2) + "\n")


def _be_quiet() -> None:
    """The table is all that should be seen."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    disable_progress_bar()
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch", "transformers", "trl", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
