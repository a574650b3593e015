"""A run in which final answers decide, from its file to what it writes: rewards, discriminator, metrics, resume."""

from __future__ import annotations

import json
from pathlib import Path

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
