"""Nothing is lost: runs that are killed in real processes and resumed equal those that were left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor

from lora_gan.checkpoint_files import (
    LAST,
    read_checkpoint,
)
from lora_gan.cli import main
from lora_gan.embedding import SentenceEncoder

ROOT = Path(__file__).parents[1]
NAMED = {"auto_insert_metric_name": False, "enable_version_counter": False}
ROUNDS = 30
PATIENCE = 120  # seconds that a round may take on a busy machine


class Journal(L.Callback):
    """Writes what each round reported and each validation measured, a line each, so that a kill loses none.

    Args:
        path: Where to.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        prompts = [example.prompt for example in batch.examples]
        self._note("round", trainer, prompts=prompts, **{name: float(value) for name, value in outputs.items()})

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        measured = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("text/")}
        self._note("validation", trainer, **measured)

    def _note(self, what: str, trainer: L.Trainer, **told: Any) -> None:
        with open(self.path, "a") as stream:
            stream.write(json.dumps({"what": what, "round": trainer.global_step, **told}) + "\n")


def own(path: Path, word: str) -> dict[str, Any]:
    rows = [{"prompt": f"{word} {n}" + "!" * (n % 5), "response": f"{word[0]} {n}."} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"class_path": "lora_gan.data.OwnFile", "init_args": {"path": str(path)}}


def of(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": f"lora_gan.{name}", "init_args": settings}


def scheduler(**settings: Any) -> dict[str, Any]:
    return {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": settings}


def everything() -> dict[str, Any]:
    """Curriculum, replay, baseline, controllers, monitors, snapshot; validation in the middle of an epoch."""
    return {
        "model": {
            "replay": of("replay.Replay", capacity=6, per_round=2),
            "kl_coefficient": 0.05,
            "generator_scheduler": scheduler(step_size=4, gamma=0.8),
            "discriminator_scheduler": scheduler(step_size=3, gamma=0.9),
        },
        "data": {"batch_size": 3},
        "val_check_interval": 5,
        "every_n_rounds": 3,
        "callbacks": [
            of(
                "callbacks.Curriculum",
                phases=[
                    {"start": 0, "policy_weight": 0.0, "discriminator_updates": 0},
                    {"start": 3, "discriminator_updates": 2, "take_snapshot": True},
                    {"start": 7, "policy_weight": 1.0, "adversarial_weight": 0.3},
                    {"start": 20, "supervised_weight": 0.3},
                ],
            ),
            of("callbacks.MovingAverageBaseline"),
            of("callbacks.AdaptiveKL", target=0.5, horizon=50),
            of("callbacks.EasyFirst", first=0.4, start=5, end=25),
            of("callbacks.DiscriminatorControl", every_n_rounds=2, freeze_above=0.9, decay=0.5),
            of("callbacks.AdaptiveAdversarialWeight", decay=0.7),
            of("callbacks.CollapseMonitor", every_n_rounds=4),
        ],
    }


def accumulation(folder: Path) -> dict[str, Any]:
    """Four rounds make a step, from a mixture, in batches of like length; validation and files come between."""
    second = own(folder / "second.jsonl", "Count")
    return {
        "model": {
            "accumulate_rounds": 4,
            "discriminator_scheduler": scheduler(step_size=2, gamma=0.5),
            "advantage": of("advantages.LeaveOneOut"),
            "adversarial_weight": 0.5,
            "negatives": [of("negatives.ShuffledWords"), of("negatives.Swapped")],
        },
        "data": {
            "batch_size": 4,
            "bucket_batches": 3,
            "num_workers": 1,
            "source": of("data.Mixture", sources=[own(folder / "first.jsonl", "Say"), second], weights=[2.0, 1.0]),
        },
        "val_check_interval": 6,
        "every_n_rounds": 5,
        "callbacks": [of("callbacks.KLSchedule", first=0.0, last=0.2, start=3, end=20)],
    }


def self_play() -> dict[str, Any]:
    """PPO in minibatches with a value head against snapshots, judged by pairs; validation once an epoch."""
    return {
        "model": {
            "advantage": of("advantages.ValueGAE"),
            "policy_loss": of("losses.ClippedPPO", epochs=2, minibatches=2),
            "payoff": of("payoffs.Win"),
            "objective": of("objectives.BradleyTerry"),
            "adversarial_weight": 0.5,
            "coupled_weight": 0.1,
            "kl_penalty": 0.1,
            "kl_reference": "snapshot",
            "discriminator_updates": 2,
            "sampling": {"max_new_tokens": 4, "top_p": 0.9, "temperature": 0.8},
        },
        "data": {"batch_size": 3},
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 1,
        "every_n_rounds": 4,
        "callbacks": [
            of("callbacks.Snapshot", every_n_rounds=6, start=2),
            of("callbacks.AdaptiveEntropy", target=3.0),
            of("callbacks.ConfidenceGate", close_above=0.8, open_below=0.6, decay=0.5),
        ],
    }


@dataclass(frozen=True)
class Experiment:
    """One configuration; every run of it in a folder of its own."""

    folder: Path
    base: str
    chosen: dict[str, Any]

    def arguments(self, run: str) -> list[str]:
        """configs/gan.yaml on a tiny base, with this configuration over it."""
        chosen = self.chosen
        best = {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"filename": "best-{step}", "monitor": "text/reward", "mode": "max", **NAMED},
        }
        model = {
            "base": self.base,
            "rewards": [of("rewards.FunctionReward", function="rounds.share_of_a")],
            "sampling": {"max_new_tokens": 4},
            "generator_lora": {"rank": 4, "alpha": 8},
            "discriminator_lora": {"rank": 4, "alpha": 8},
            "generator_scheduler": None,
        }
        data = {"source": own(self.folder / "rows.jsonl", "Say"), "max_validation": 3, "max_test": 3}
        settings = {
            "model": {"init_args": {**model, **chosen["model"]}},
            "data": {"init_args": {**data, **chosen["data"]}},
            "trainer": {
                "max_steps": ROUNDS,
                "accelerator": "cpu",
                "enable_progress_bar": False,
                "val_check_interval": chosen["val_check_interval"],
                "check_val_every_n_epoch": chosen.get("check_val_every_n_epoch"),
                "logger": {"init_args": {"save_dir": str(self.folder / run)}},
                "callbacks": [
                    of("callbacks.LastCheckpoint", every_n_rounds=chosen["every_n_rounds"]),
                    of("callbacks.TextMetrics", samples=1),
                    best,
                    *chosen["callbacks"],
                    {"class_path": f"{__name__}.Journal", "init_args": {"path": str(self.journal(run))}},
                ],
            },
        }
        path = self.folder / f"{run}.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return [f"--config={ROOT / 'configs' / 'gan.yaml'}", f"--config={path}"]

    def journal(self, run: str) -> Path:
        return self.folder / f"{run}.jsonl"

    def told(self, run: str) -> list[dict[str, Any]]:
        """The journal's whole lines."""
        path = self.journal(run)
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def start(self, run: str, *more: str) -> BaseProcess:
        """A process that fits; it goes on where the run has a checkpoint."""
        arguments = ["fit", *self.arguments(run), "--ckpt_path=last", *more]
        process = multiprocessing.get_context("fork").Process(target=fit, args=(arguments, self.folder / f"{run}.log"))
        process.start()
        return process

    def finish(self, run: str, *more: str) -> None:
        process = self.start(run, *more)
        process.join(PATIENCE)
        assert process.exitcode == 0, (self.folder / f"{run}.log").read_text()[-3000:]

    def wait_for(self, run: str, process: BaseProcess, lines: int) -> None:
        """Until the journal has grown by so many lines."""
        before, until = len(self.told(run)), time.monotonic() + PATIENCE
        while len(self.told(run)) < before + lines and process.is_alive() and time.monotonic() < until:
            time.sleep(0.002)

    def checkpoints(self, run: str) -> Path:
        (folder,) = (self.folder / run).glob("gan/*/checkpoints")
        return folder


def fit(arguments: list[str], log: Path) -> None:
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        main(arguments)


@pytest.fixture
def experiment(bases: dict[str, str], tmp_path: Path) -> Callable[[dict[str, Any]], Experiment]:
    return lambda chosen: Experiment(tmp_path, bases["gpt2"], chosen)


def differing(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """Names of the values in two checkpoints that are not bit for bit the same."""
    if isinstance(one, dict) and isinstance(other, dict):
        if set(one) != set(other):
            yield f"{name}: {set(one) ^ set(other)}"
        for key in set(one) & set(other):
            yield from differing(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differing(*pair, f"{name}[{index}]")
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield f"{name}: {one} {other}"
    elif repr(one) != repr(other):
        yield f"{name}: {one!r} {other!r}"


def anywhere(value: Any, folder: Path) -> Any:
    """A checkpoint without the folder in which it was written, and without a score that Lightning does not restore."""
    if isinstance(value, dict):
        return {anywhere(k, folder): anywhere(item, folder) for k, item in value.items() if k != "current_score"}
    if isinstance(value, list):
        return [anywhere(item, folder) for item in value]
    return value.replace(str(folder), "") if isinstance(value, str) else value


def check_equal(experiment: Experiment, killed: str, whole: str) -> None:
    """Every line of every process, the last state with all that it knows, the best one and the held-out table."""
    wanted = {(line["what"], line["round"]): line for line in experiment.told(whole)}
    found = experiment.told(killed)
    assert {(line["what"], line["round"]) for line in found} == set(wanted)
    for line in found:
        assert repr(line) == repr(wanted[line["what"], line["round"]])
    one, other = experiment.checkpoints(killed), experiment.checkpoints(whole)
    mine, theirs = (anywhere(read_checkpoint(folder / LAST), folder) for folder in (one, other))
    assert list(differing(mine, theirs)) == []
    tables = [folder.with_name("held_out.md").read_text() for folder in (one, other)]
    assert tables[0] == tables[1]


def kill_and_compare(experiment: Experiment, kills: int) -> None:
    """Kill a run at random moments, let it finish, and compare it with one that was left alone."""
    experiment.finish("whole")
    seed = int.from_bytes(os.urandom(4), "big")
    chance, lost = random.Random(seed), []
    for _ in range(kills):
        process = experiment.start("killed")
        experiment.wait_for("killed", process, chance.randint(1, 2 * ROUNDS // (kills + 1)))
        time.sleep(chance.uniform(0, 0.1))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        lost.append(len({line["round"] for line in experiment.told("killed")}))
    experiment.finish("killed")
    print("seed", seed, "reached", lost)
    check_equal(experiment, "killed", "whole")


def test_a_killed_run_is_resumed_bit_for_bit(experiment: Callable[[dict[str, Any]], Experiment]) -> None:
    kill_and_compare(experiment(everything()), 2)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_runs_killed_ten_times(number: int, experiment: Callable[[dict[str, Any]], Experiment], tmp_path: Path) -> None:
    chosen = [everything, lambda: accumulation(tmp_path), self_play][number]
    kill_and_compare(experiment(chosen()), [4, 3, 3][number])


def test_an_embedding_does_not_depend_on_its_company() -> None:
    """Else a resumed run, which has to encode texts anew, would be paid a little differently."""
    texts = [" ".join(["Paris", "is", "the", "capital", "of", "France"][n % 5 :]) + f" {n}" for n in range(30)]
    together = SentenceEncoder().encode(texts)
    for chosen in ([3], [7, 8], list(range(0, 30, 3))):
        assert torch.equal(SentenceEncoder().encode([texts[i] for i in chosen]), together[chosen])
