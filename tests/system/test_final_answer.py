"""A run in which final answers decide, from its file to what it writes: rewards, discriminator, metrics, resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from lora_gan.cli import main
from lora_gan.results import read_results

ROOT = Path(__file__).parents[2]
MARKER = {"class_path": "lora_gan.final_answer.AfterMarker", "init_args": {"marker": "#"}}
READS = {"class_path": "lora_gan.discriminator.WorkOnly", "init_args": {"final_answer": MARKER}}
MODEL = {
    "final_answer": MARKER,
    "rewards": [{"class_path": "lora_gan.rewards.AnswerReward"}],
    "sampling": {"max_new_tokens": 4},
    "discriminator": {"model": {"class_path": "AdapterDiscriminator", "init_args": {"input_format": READS}}},
}


def test_from_the_file_to_the_results(bases: dict[str, str], work_in: Path) -> None:
    """Half of the prompts have answers only."""
    worked = [{"prompt": f"{n} + 1?", "completion": f"{n + 1}.# {n + 1}", "answer": n + 1} for n in range(20)]
    prompts = [{"prompt": f"{n} + 2?", "answer": [n + 2, "many"]} for n in range(20)]
    rows = [row for pair in zip(prompts, worked, strict=True) for row in pair]
    (work_in / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    mine = {
        "extends": str(ROOT / "configs" / "reinforce.yaml"),
        "model": {"init_args": {"base": bases["gpt2"], **MODEL, "coefficients": {"adversarial": 0.5}}},
        "data": {"init_args": {"path": "rows.jsonl", "batch_size": 3}},
        "trainer": {"accelerator": "cpu", "max_steps": 1, "val_check_interval": 1},
    }
    (work_in / "mine.yaml").write_text(yaml.safe_dump(mine), encoding="utf-8")
    main(["fit", "--config=mine.yaml"])
    (last,) = work_in.rglob("last.ckpt")
    folder = last.parents[1]
    saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert saved["model"]["init_args"]["final_answer"] == MARKER
    (result,) = read_results(folder)
    assert all({"answer", "exact_match"} <= values.keys() for values in result.metrics.values())
    main(["fit", f"--config={folder / 'config.yaml'}", f"--ckpt_path={last}", "--trainer.max_steps=2"])
    assert [result.step for result in read_results(folder)] == [1, 2]
    main(["generate", f"--ckpt_path={last}", "--input=rows.jsonl", "--output_key=mine", "--output=out.jsonl"])
    written = [json.loads(line) for line in (work_in / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(written) == 40 and all("mine_answer" in row and row["answer"] for row in written)


SMALL = [
    "--data.batch_size=4",
    "--data.max_validation=4",
    "--data.source.prompts=12",
    "--data.source.answers=4",
    "--model.num_generations=2",
    "--test_after_fit=false",
]


def small(folder: Path, *more: str) -> Path:
    """gan.yaml with little data, whose discriminator begins at the second step; its last checkpoint."""
    phases = [
        {"start": 0, "coefficients": {"supervised": 1.0, "policy": 0.0, "discriminator_updates": 0}},
        {
            "start": 1,
            "coefficients": {"supervised": 0.0, "policy": 1.0, "adversarial": 1.0, "discriminator_updates": 1},
            "take_snapshot": True,
            "discriminator_from_generator": True,
        },
    ]
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": str(folder)}}
    curriculum = {"class_path": "lora_gan.callbacks.Curriculum", "init_args": {"phases": phases}}
    model = {"init_args": {"generator": {"scheduler": None}}}  # which would depend on the number of steps
    overlay = {"model": model, "trainer": {"accelerator": "cpu", "logger": logger, "callbacks+": [curriculum]}}
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
    main(["fit", f"--config={ROOT / 'configs' / 'gan.yaml'}", f"--config={folder / 'small.yaml'}", *SMALL, *more])
    return max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)


def test_the_default_experiment_resumes_bit_for_bit(tmp_path: Path) -> None:
    """With the intercept of its discriminator and the snapshot that it compares with."""
    whole = small(tmp_path / "whole", "--trainer.max_steps=4", "--trainer.val_check_interval=2")
    half = small(tmp_path / "half", "--trainer.max_steps=2", "--trainer.val_check_interval=2")
    small(tmp_path / "half", "--trainer.max_steps=4", "--trainer.val_check_interval=2", f"--ckpt_path={half}")
    first, second = (torch.load(path, weights_only=True) for path in (whole, half))
    assert first["global_step"] == second["global_step"] > 0
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert any("snapshot" in name for name in first["state_dict"])
    assert first["state_dict"]["discriminator.model.intercept"] != 0
    for name, tensor in first["state_dict"].items():
        assert torch.equal(tensor, second["state_dict"][name]), name


@pytest.mark.parametrize(
    ("experiment", "control"),
    [
        *(("gan", name) for name in ("answered_only", "agreement", "worked_only")),
        ("digits", "self_training"),
    ],
)
def test_controls_run(experiment: str, control: str, tmp_path: Path) -> None:
    files = [ROOT / "configs" / f"{experiment}.yaml", ROOT / "configs" / "control" / f"{control}.yaml"]
    few = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--data.batch_size=2", "--data.max_validation=2"]
    few += ["--test_after_fit=false", f"--trainer.logger.init_args.save_dir={tmp_path}", "--trainer.accelerator=cpu"]
    main(["fit", *(f"--config={path}" for path in files), *few])
    assert list(tmp_path.rglob("last.ckpt"))
