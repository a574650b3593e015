"""Every experiment runs: its own parts and callbacks, on a tiny model, its phases pressed into the first rounds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_gan.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENTS = ["gan", "reinforce", "ppo", "twin", "lora_gan", "rlgaf", "gad", "self_play", "online"]
VARIANTS = {
    "textgail": "reinforce",
    "own_judge": "reinforce",
    "grades": "twin",
    "critic": "reinforce",
    "beams": "reinforce",
}
ROUNDS = 5


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "mine.jsonl"
    lines = [{"instruction": f"Say {n} twice.", "input": "", "output": f"{n} and {n}."} for n in range(60)]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


def pressed(experiment: str, base: str, rows: Path, folder: Path) -> dict[str, Any]:
    """The experiment with its phases in rounds 0, 1, 2, …"""
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{experiment}.yaml").read_text(encoding="utf-8"))
    config["model"]["init_args"] |= {"base": base, "sampling": {"max_new_tokens": 4}, "answers_per_prompt": 2}
    data = config["data"]["init_args"]
    data |= {"source": {"class_path": "lora_gan.data.Alpaca"}, "path": str(rows), "batch_size": 3}
    if experiment == "online":
        data |= {"validation_rows": 4, "stop_after_seconds": 0.0}
    for callback in config["trainer"]["callbacks"]:
        settings = callback.get("init_args", {})
        for number, phase in enumerate(settings.get("phases", [])):
            phase["start"] = number
        settings |= {"start": 0} if callback["class_path"].endswith(("Snapshot", "EasyFirst", "KLSchedule")) else {}
    config["trainer"] |= {"max_steps": ROUNDS, "val_check_interval": 4, "log_every_n_steps": 1, "accelerator": "cpu"}
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
    return config


def play(config: dict[str, Any], folder: Path, *overlays: Path) -> dict[str, list[float]]:
    """Fit, and what was logged."""
    path = folder / "pressed.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    main(["fit", f"--config={path}", *(f"--config={overlay}" for overlay in overlays)])
    (run,) = folder.glob("*/version_0")
    assert (run / "adapters" / "generator" / "adapter_model.safetensors").is_file()
    events = EventAccumulator(str(run)).Reload()  # type: ignore[no-untyped-call]
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}  # type: ignore[no-untyped-call]


def check(logged: dict[str, list[float]]) -> None:
    """All players played, and nothing ran away."""
    bad = [name for name, values in logged.items() if not all(map(math.isfinite, values))]
    assert not bad
    assert {"loss/policy", "loss/discriminator", "judge/accuracy", "judge/length_accuracy", "policy/kl"} <= set(logged)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_plays_all_its_phases(
    experiment: str, bases: dict[str, str], rows: Path, tmp_path: Path
) -> None:
    check(play(pressed(experiment, bases["gpt2"], rows, tmp_path), tmp_path))


def test_supervised_learning_alone_samples_nothing(bases: dict[str, str], rows: Path, tmp_path: Path) -> None:
    logged = play(pressed("sft", bases["gpt2"], rows, tmp_path), tmp_path)
    assert len(logged["loss/supervised"]) == ROUNDS
    assert "policy/length" not in logged and "loss/discriminator" not in logged


def test_evolution_plays_generations(bases: dict[str, str], rows: Path, tmp_path: Path) -> None:
    config = pressed("evolve", bases["gpt2"], rows, tmp_path)
    settings = config["model"]["init_args"]
    settings["start"]["init_args"] |= {"trunk": 2, "branch": 1}
    logged = play(config, tmp_path)
    assert len(logged["fitness/best"]) == ROUNDS and len(logged["loss/policy"]) == ROUNDS
    assert all(map(math.isfinite, [*logged["fitness/held_out"], *logged["population/diversity"]]))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_plays(variant: str, bases: dict[str, str], rows: Path, tmp_path: Path) -> None:
    config = pressed(VARIANTS[variant], bases["gpt2"], rows, tmp_path)
    check(play(config, tmp_path, CONFIGS / "overlay" / f"{variant}.yaml"))


def test_every_experiment_and_variant_is_tried_here() -> None:
    told = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert told == {*EXPERIMENTS, "evolve", "sft", "gpt2_alpaca", "pretrain"}
    assert {*VARIANTS, "quick", "gpt2", "few_rounds", "multi_gpu"} == {
        path.stem for path in (CONFIGS / "overlay").glob("*.yaml")
    }
