"""Two real processes (gloo, CPU) do what one does with the union of their batches."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_gan.checkpointing.files import read_checkpoint
from lora_gan.distributed import gathered, in_order, mean_of_all, shares
from tests.helpers import two_processes
from tests.helpers.steps import differing
from tests.system.test_resume import Experiment, check_equal, everything

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
PROGRAM = [sys.executable, "-m", "tests.helpers.two_processes"]
CLOSE = {"atol": 2e-6, "rtol": 2e-4}


def start(command: list[str]) -> str:
    """Run a command in the project's folder; what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, check=False, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results_of(base: str, processes: int, folder: Path, case: str, accelerator: str = "cpu") -> list[dict[str, Any]]:
    """The final results of each process."""
    if processes == 1:
        two_processes.main(base, 1, str(folder), case, accelerator)
    else:
        start([*PROGRAM, "main", base, str(processes), str(folder), case, accelerator])
    return [
        json.loads((folder / f"{processes}_{rank}.json").read_text())
        | torch.load(folder / f"{processes}_{rank}.pt", map_location="cpu", weights_only=True)
        for rank in range(processes)
    ]


def largest_difference(weights: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((weights[name] - other[name]).abs().max()) for name in weights)


SLOW = pytest.mark.slow


@SLOW
def test_a_process_without_pairs_does_not_stop_the_other(bases: dict[str, str], tmp_path: Path) -> None:
    """Its discriminator's loss depends on no parameter, but the gradient of the other process is averaged with it."""
    first, second = results_of(bases["gpt2"], 2, tmp_path, "pairs in one process")
    assert largest_difference(first["last"], second["last"]) == 0
    assert first["reports"][-1]["discriminator/grad_norm"] > 0


CASES = ["moving average", pytest.param("ppo", marks=SLOW), pytest.param("missing targets", marks=SLOW)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs")
@pytest.mark.parametrize("case", CASES[:2])
def test_two_gpus_do_what_one_does_with_all_prompts(case: str, bases: dict[str, str], tmp_path: Path) -> None:
    (alone,) = results_of(bases["gpt2"], 1, tmp_path, case, "gpu")
    first, second = results_of(bases["gpt2"], 2, tmp_path, case, "gpu")
    assert largest_difference(first["last"], second["last"]) == 0
    for name, tensor in alone["last"].items():
        torch.testing.assert_close(first["last"][name], tensor, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does_with_all_prompts(case: str, bases: dict[str, str], tmp_path: Path) -> None:
    """SGD moves by the gradient: after one step and after three the weights agree to 2e-6 + 2e-4 of their values.

    The discriminator's gradient is the mean of the processes' only; it is that of all prompts where all processes show
    equally many completions of each kind, so not where targets are missing.
    """
    (alone,) = results_of(bases["gpt2"], 1, tmp_path, case)
    both = results_of(bases["gpt2"], 2, tmp_path, case)
    first, second = both
    assert largest_difference(first["last"], second["last"]) == 0, "the same on both"
    assert first["reports"] == second["reports"], "metrics are reduced"
    for when in ("first", "last"):
        for name, tensor in alone[when].items():
            if case == "missing targets" and (".discriminator." in name or "score_head" in name):
                continue
            torch.testing.assert_close(first[when][name], tensor, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    assert largest_difference(alone["first"], alone["last"]) > 1e-3, "and they moved"
    for mine, theirs in zip(first["reports"], alone["reports"], strict=True):
        names = {"loss/generator", "reward/total", "coefficient/baseline", "loss/discriminator"} & theirs.keys()
        for name in names - ({"loss/discriminator"} if case == "missing targets" else set()):
            if name in mine:
                assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name


def test_two_processes_resume_inside_an_epoch(bases: dict[str, str], tmp_path: Path) -> None:
    """From the second step of the second epoch: bit for bit the uninterrupted run."""
    results: dict[str, list[dict[str, Any]]] = {}
    for name, more in {"whole": [], "resumed": [str(tmp_path / "whole" / "7.ckpt")]}.items():
        (tmp_path / name).mkdir()
        start([*PROGRAM, "epochs", bases["gpt2"], "2", str(tmp_path / name), *more])
        results[name] = [json.loads((tmp_path / name / f"{rank}.json").read_text()) for rank in (0, 1)]
    for epoch in (0, 5):
        steps = [step for rank in results["whole"] for step in rank["steps"][epoch : epoch + 5]]
        prompts = [prompt for step in steps for prompt in step["prompts"]]
        assert len(set(prompts)) == len(prompts) == 20, "one of them has each prompt of the epoch"
    for whole, resumed in zip(results["whole"], results["resumed"], strict=True):
        assert repr(resumed["steps"]) == repr(whole["steps"][7:])
        assert resumed["logged"] == whole["logged"] and "collapse/template" in whole["logged"]
    saved = [read_checkpoint(tmp_path / run / "12.ckpt") for run in results]
    assert len(saved[0]["optimizer_states"]) == 2 and len(saved[0]["lora_gan"]["replay"]) == 2
    assert list(differing(*saved)) == []
    weights = [torch.load(tmp_path / run / f"{rank}.pt", weights_only=True) for run in results for rank in (0, 1)]
    assert [largest_difference(weights[0], other) for other in weights[1:]] == [0, 0, 0]


@SLOW
def test_killed_processes_resume(bases: dict[str, str], tmp_path: Path) -> None:
    """Twice, at random moments; resumed by the same command, they end as processes that were not killed."""
    experiment = Experiment(tmp_path, bases["gpt2"], everything())
    more = ["--ckpt_path=last", "--trainer.devices=2", "--trainer.strategy=ddp_find_unused_parameters_true"]

    def command(run: str) -> list[str]:
        return [sys.executable, "-m", "src.cli", "fit", *experiment.arguments(run), *more]

    start(command("whole"))
    for _ in range(2):
        process = subprocess.Popen(command("killed"), cwd=ROOT, env=ENV, start_new_session=True)
        experiment.wait_for("killed", lambda running=process: running.poll() is None, random.randint(4, 15))  # type: ignore[misc]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    start(command("killed"))
    check_equal(experiment, "killed", "whole")


@SLOW
def test_the_command_line_in_two_processes(bases: dict[str, str], tmp_path: Path) -> None:
    """With torchrun: one process writes files, one table has the whole test split, predictions are in order."""
    rows = [{"instruction": f"Say number {n}.", "input": "", "output": f"It is {n}."} for n in range(41)]
    (tmp_path / "mine.json").write_text(json.dumps(rows), encoding="utf-8")
    reward = {
        "class_path": "lora_gan.rewards.FunctionReward",
        "init_args": {"function": "tests.helpers.steps.share_of_a"},
    }
    given = [
        f"--config={ROOT / 'configs' / 'qa.yaml'}",
        f"--config={ROOT / 'configs' / 'overlay' / 'few_steps.yaml'}",
        f"--model.init_args.base={bases['gpt2']}",
        f"--model.init_args.rewards={json.dumps([reward])}",
        "--model.init_args.sampling.max_new_tokens=4",
        "--data.init_args.source=lora_gan.data.Alpaca",
        f"--data.init_args.path={tmp_path / 'mine.json'}",
        "--data.init_args.batch_size=3",
        "--data.init_args.max_test=7",
        "--data.init_args.eval_batch_size=2",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.strategy=ddp_find_unused_parameters_true",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        f"--trainer.logger.init_args.save_dir={tmp_path / 'run'}",
    ]
    more = ["--trainer.callbacks+=lora_gan.callbacks.AdapterCheckpoints"]
    more += ["--trainer.callbacks.every_n_steps=2"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "src.cli"]
    printed = start([*launch, "fit", *given, *more])
    assert printed.count("Held-out test split, 7 prompts") == 1
    assert printed.count("\nadapters ") == 1
    (folder,) = (tmp_path / "run" / "qa").iterdir()
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "held_out.md", "checkpoints/last.ckpt", "checkpoints/best-2.ckpt"} <= names
    assert {f"checkpoints/step-2/{p}/optimizer.pt" for p in ("generator", "discriminator")} <= names
    assert len({name.split(".")[-2] for name in names if "tfevents" in name}) == 1, "one process logs"
    assert not any("partial" in name for name in names)

    last = folder / "checkpoints" / "last.ckpt"
    more = ["--trainer.callbacks+=lora_gan.callbacks.PredictionWriter", f"--ckpt_path={last}"]
    start([*launch, "predict", *given, *more])
    start([sys.executable, "-m", "src.cli", "predict", *given, *more, "--trainer.devices=1"])
    files = sorted((tmp_path / "run" / "qa").glob("*/predictions.jsonl"))
    two, one = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert [row["prompt"] for row in two] == [row["prompt"] for row in one]
    assert [row["completion"] for row in two] == [row["completion"] for row in one]
    assert len(two) == 7


def test_in_one_process_nothing_happens() -> None:
    metrics = {"a": torch.tensor(1.0)}
    assert gathered(3) == [3] and in_order("abc") == ["a", "b", "c"] and in_order("abc", 2) == ["a", "b"]
    assert shares(3, 0) == [1.0, 1.0]
    assert mean_of_all(metrics) == metrics


def test_processes_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 0 has 3 tokens and process 1 has 1: means of 2.0 and 6.0 are 3.0 of all four."""
    monkeypatch.setattr("lora_gan.distributed.several", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("lora_gan.distributed.gathered", lambda value: [(3, 0), (1, 0)])
    mine, nothing = shares(3, 0)
    assert (mine, nothing) == (1.5, 1.0)
    assert (mine * 2.0 + (2 - mine) * 6.0) / 2 == 3.0
    monkeypatch.setattr("lora_gan.distributed.gathered", lambda value: [[0, 2, 4], [1, 3, 0]])
    assert in_order([0, 2, 4], 5) == [0, 1, 2, 3, 4]
    monkeypatch.setattr("lora_gan.distributed.gathered", lambda value: [{"a": 1.0, "b": 2.0}, {"a": 3.0}])
    assert mean_of_all({}) == {"a": 2.0, "b": 2.0}
