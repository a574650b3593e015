"""Two checkouts train every experiment for a few steps: are generator and discriminator bit for bit the same?

    python -m tests.helpers.compare_weights OLD NEW [--only gan ppo] [--steps 20]

Each experiment runs with seed 0 on the built-in model, one thread, its curriculum shortened so that every phase takes
part, once in each checkout with that checkout's own configuration and code. The table gives the number of trained
tensors, how many of them moved away from their first value, and the largest difference between the checkouts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

OVERLAYS = {  # overlay or control, by any of its names → the experiment it belongs to
    "overlay/beams": "reinforce",
    "overlay/critic": "reinforce",
    "overlay/own_judge|overlay/own_discriminator": "reinforce",
    "overlay/textgail": "reinforce",
    "overlay/grades|overlay/ordinal": "twin",
    "control/evolution_only": "evolve",
    "control/gradient_only": "evolve",
    "control/random_search": "evolve",
    "control/supervised_only": "evolve",
}
EXPERIMENTS = [
    "qa",
    "sft",
    "reinforce",
    "ppo",
    "twin",
    "lora_gan",
    "rlgaf",
    "gad",
    "self_play",
    "online",
    "gpt2_alpaca",
    "evolve",
]
WITHOUT = ("TextMetrics", "Checkpoint", "ProgressBar", "PredictionWriter", "FitnessPlot")  # ends of class names
RENAMED = {"backbone.judge_head": "backbone.score_head", "discriminator.judge.": "discriminator.model."}


def shorten(config: dict[str, Any], steps: int, rows: Path) -> dict[str, Any]:
    """The printed configuration with every phase within ``steps``, small batches, and nothing but training."""
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    evolving = "population" in model
    model["base"] = "builtin"
    data["batch_size"] = 24 if evolving else 8
    for given in (data, (data.get("source") or {}).get("init_args") or {}):
        if given.get("path"):
            given["path"] = str(rows)
    if "stop_after_seconds" in data:
        data |= {"stop_after_seconds": 0.0, "validation_rows": 4}
    if evolving:
        model |= {"evaluation_prompts": 8}
        model["start"]["init_args"] |= {"trunk": 6, "branch": 2}
    callbacks = [c for c in trainer["callbacks"] if not c["class_path"].endswith(WITHOUT)]
    for callback in callbacks:
        press(callback.setdefault("init_args", {}), steps)
    for scheduler in schedulers(model):
        scheduler |= {"milestones": [steps // 2]} if "milestones" in scheduler else {}
        scheduler |= {"T_max": steps} if "T_max" in scheduler else {}
    trainer |= {"callbacks": callbacks, "max_steps": 3 if evolving else steps, "limit_val_batches": 0, "logger": False}
    trainer |= {"accelerator": "cpu", "enable_checkpointing": False, "enable_progress_bar": False}
    return {"seed_everything": 0, "model": config["model"], "data": config["data"], "trainer": trainer}


def press(settings: dict[str, Any], steps: int) -> None:
    """A callback's times, all within ``steps``."""
    phases = settings.get("phases") or []
    for number, phase in enumerate(phases):
        phase["start"] = number * steps // (len(phases) + 1)
    if "start" in settings:
        settings["start"] = steps // 2
    if "end" in settings:
        settings["end"] = steps - 2
    for name in ("every_n_rounds", "every_n_steps"):
        if name in settings and "start" in settings:
            settings[name] = 3


def schedulers(model: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments of all learning-rate schedules, wherever they stand."""
    for name, value in model.items():
        if isinstance(value, dict) and name.endswith("scheduler"):
            yield value["init_args"]
        elif isinstance(value, dict) and name in ("generator", "discriminator"):
            yield from schedulers(value)


def train(checkout: Path, experiment: str, steps: int, folder: Path) -> Path | None:
    """Run one experiment in a checkout; the file of its weights, None where it has no such experiment."""
    *overlay, name = reversed(experiment.split(" + "))
    files = [checkout / "configs" / f"{name}.yaml"]
    for names in overlay:
        found = [checkout / "configs" / f"{one}.yaml" for one in names.split("|")]
        files += [path for path in found if path.is_file()]
    if len(files) != 1 + len(overlay) or not files[0].is_file():
        return None
    rows = folder / "rows.jsonl"
    lines = [{"instruction": f"Say {n} twice.", "input": "", "output": f"{n} and {n}."} for n in range(400)]
    rows.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    given = [f"--config={path}" for path in files]
    more = ["--data.init_args.path", str(rows)] if name == "online" else []
    printed = subprocess.run(
        [sys.executable, "-m", "src.cli", "fit", *given, *more, "--print_config"],
        capture_output=True, text=True, check=True, cwd=checkout, env=environment,
    )  # fmt: skip
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(shorten(yaml.safe_load(printed.stdout), steps, rows)), encoding="utf-8")
    weights = folder / "weights.pt"
    done = subprocess.run(
        [sys.executable, __file__, "--train", str(config), "--out", str(weights)],
        cwd=checkout, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{experiment} in {checkout}: {done.stderr[-2000:]}")
    return weights


def train_here(config: str, out: str) -> None:
    """Fit with this process's lora_gan and write what was trained."""
    sys.path[0] = ""  # this folder's modules must not stand in for others
    from lora_gan.cli import main

    try:
        from lora_gan.cli.training import CLI
    except ImportError:  # before 0.3 the command line was one module
        from lora_gan.cli import CLI  # type: ignore[attr-defined, no-redef]

    def keep(self: Any) -> None:
        trained = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        first = self.first
        moved = {n: not torch.equal(p, first[n]) for n, p in trained.items()}
        torch.save({"trained": trained, "moved": moved}, out)

    def note(self: Any) -> None:
        before(self)
        self.first = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    before = CLI.before_fit
    CLI.before_fit, CLI.after_fit = note, keep  # type: ignore[method-assign]
    main(["fit", f"--config={config}"])


def renamed(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights by today's names."""
    result = {}
    for name, value in weights.items():
        new = f"generator.{name}" if name.startswith("value_head.") else name
        for old, today in RENAMED.items():
            new = new.replace(old, today)
        result[new] = value
    return result


def compare(old: Path, new: Path) -> tuple[int, int, float]:
    """Tensors, those that moved, and the largest difference."""
    one, other = (torch.load(path, weights_only=True) for path in (old, new))
    before, after = renamed(one["trained"]), renamed(other["trained"])
    if before.keys() != after.keys():
        raise RuntimeError(f"trained tensors differ: {sorted(before.keys() ^ after.keys())[:4]}")
    same = all(torch.equal(before[name], after[name]) for name in before)
    largest = max(float((before[name] - after[name]).abs().max()) for name in before)
    return len(after), sum(other["moved"].values()), 0.0 if same else max(largest, 1e-45)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, help="two checkouts: old and new")
    parser.add_argument("--only", nargs="*", help="names of experiments or overlays")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--keep", type=Path, help="folder for the weights; those that are there are not trained again")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        train_here(given.train, given.out)
        return
    chosen = [*EXPERIMENTS, *(f"{experiment} + {overlay}" for overlay, experiment in OVERLAYS.items())]
    if given.only:
        chosen = [name for name in chosen if any(word in name.replace("|", " ").split() for word in given.only)]
    keep = given.keep or Path(tempfile.mkdtemp())
    print("| experiment | tensors | moved | largest difference |\n|---|---:|---:|---:|", flush=True)
    for experiment in chosen:
        files = []
        for number, checkout in enumerate(given.checkouts):
            folder = (keep / str(number) / "".join(c if c.isalnum() else "_" for c in experiment)).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            kept = folder / "weights.pt"
            files.append(kept if kept.is_file() else train(checkout.resolve(), experiment, given.steps, folder))
        if len(files) == 2 and files[0] and files[1]:
            tensors, moved, largest = compare(files[0], files[1])
            print(f"| {experiment} | {tensors} | {moved} | {largest:g} |", flush=True)
        else:
            print(f"| {experiment} | trained in {sum(f is not None for f in files)} | | |", flush=True)


if __name__ == "__main__":
    main()
