"""Every data set trains on the built-in model, from a local file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_gan.cli import main

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
RUNS = {
    "alpaca": ("qa", "alpaca.json"),
    "dolly": ("qa", "dolly.jsonl"),
    "oasst": ("qa", "oasst_trees.jsonl"),
    "truthfulqa": ("qa", "truthfulqa.csv", "--data.source.allow_train=true"),
    "arc": ("qa", "arc.jsonl"),
    "twon": ("rlgaf", "twon_replies.jsonl"),
    "own": ("qa", "alpaca.json", "--data.source.template={instruction}", "--data.source.target=output"),
    "stream": ("qa", "alpaca.json", "--data.validation_rows=2", "--data.stop_after_seconds=0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_three_steps(name: str, work_in: Path) -> None:
    experiment, file, *more = RUNS[name]
    path = FIXTURES / file
    if name == "stream":
        path = work_in / "stream.jsonl"
        path.write_text('{"instruction": "Say a.", "output": "a"}\n' * 8)
    else:
        more += ["--data.validation=0", "--data.test=0"]
    files = [ROOT / "configs" / f"{experiment}.yaml", ROOT / "configs" / "data" / f"{name}.yaml"]
    configs = [argument for file in files for argument in ("--config", str(file))]
    steps = ["--trainer.max_steps=3", "--trainer.log_every_n_steps=1", "--test_after_fit=false"]
    main(["fit", *configs, f"--data.path={path}", "--data.batch_size=2", *steps, *more])
    assert list(work_in.rglob("last.ckpt"))
