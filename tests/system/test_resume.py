"""Nothing is lost: runs that are killed in real processes and resumed equal those that were left alone."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lora_gan.callbacks import Curriculum, Phase
from lora_gan.callbacks.last_checkpoint import last_checkpoint
from lora_gan.checkpointing.files import (
    LAST,
    PREVIOUS,
    DamagedCheckpoint,
    intact_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from lora_gan.cli import main
from lora_gan.discriminator import AdapterDiscriminator, CompletionOnly
from lora_gan.errors import LoraGANError
from lora_gan.sentence_encoder import SentenceEncoder
from lora_gan.step_callback import OUTPUT
from lora_gan.types import PromptBatch
from tests.conftest import CONFIGS
from tests.helpers.settings import in_groups
from tests.helpers.steps import Build, Recorder, differing, fit, trainer

ROOT = Path(__file__).parents[2]
NAMED = {"auto_insert_metric_name": False, "enable_version_counter": False}
STEPS = 30
PATIENCE = 120  # seconds that a step may take on a busy machine


class Journal(L.Callback):
    """Writes what each step reported and each validation measured, a line each, so that a kill loses none.

    Of several processes the first one writes.

    Args:
        path: Where to.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        prompts = [example.prompt for example in batch.examples]
        self._note(
            "step", trainer, prompts=prompts, **{name: float(value) for name, value in outputs[OUTPUT].metrics.items()}
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        measured = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("text/")}
        self._note("validation", trainer, **measured)

    def _note(self, what: str, trainer: L.Trainer, **record: Any) -> None:
        if trainer.is_global_zero:
            with open(self.path, "a") as stream:
                stream.write(json.dumps({"what": what, "step": trainer.global_step, **record}) + "\n")


class Keeper(L.Callback):
    """Keeps the last checkpoint of every step.

    Args:
        folder: Where.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if last_checkpoint(trainer).exists():
            self.folder.mkdir(exist_ok=True)
            shutil.copy(last_checkpoint(trainer), self.folder / f"{trainer.global_step}.ckpt")


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
            "replay": of("discriminator.Replay", capacity=6, per_step=2),
            "kl": 0.05,
            "generator_scheduler": scheduler(step_size=4, gamma=0.8),
            "discriminator_scheduler": scheduler(step_size=3, gamma=0.9),
        },
        "data": {"batch_size": 3},
        "val_check_interval": 5,
        "every_n_steps": 3,
        "callbacks": [
            of(
                "callbacks.Curriculum",
                phases=[
                    {"start": 0, "coefficients": {"policy": 0.0, "discriminator_updates": 0}},
                    {"start": 3, "coefficients": {"discriminator_updates": 2}, "take_snapshot": True},
                    {"start": 7, "coefficients": {"policy": 1.0, "adversarial": 0.3}},
                    {"start": 20, "coefficients": {"supervised": 0.3}},
                ],
            ),
            of("callbacks.MovingAverageBaseline"),
            of("callbacks.AdaptiveKL", target=0.5, horizon=50),
            of("callbacks.EasyFirst", first=0.4, start=5, end=25),
            of("callbacks.DiscriminatorControl", every_n_steps=2, freeze_above=0.9, decay=0.5),
            of("callbacks.AdaptiveAdversarialWeight", decay=0.7),
            of("callbacks.CollapseMonitor", every_n_steps=4),
        ],
    }


def micro_batches(folder: Path) -> dict[str, Any]:
    """Two passes make an optimizer step; warm-up and decay; from a mixture, in batches of like length."""
    second = own(folder / "second.jsonl", "Count")
    return {
        "model": {
            "micro_batch_size": 3,
            "generator_scheduler": of("optimization.WarmupLinear", warmup_steps=4, total_steps=24, floor=0.1),
            "discriminator_scheduler": scheduler(step_size=2, gamma=0.5),
            "advantage": of("advantages.LeaveOneOut"),
            "adversarial": 0.5,
            "negatives": [of("discriminator.ShuffledWords"), of("discriminator.Swapped")],
        },
        "data": {
            "batch_size": 4,
            "bucket_batches": 3,
            "num_workers": 1,
            "source": of("data.Mixture", sources=[own(folder / "first.jsonl", "Say"), second], weights=[2.0, 1.0]),
        },
        "val_check_interval": 6,
        "every_n_steps": 5,
        "callbacks": [of("callbacks.KLSchedule", first=0.0, last=0.2, start=3, end=20)],
    }


def self_play() -> dict[str, Any]:
    """PPO in minibatches with a value head against snapshots, a discriminator of pairs; validation once an epoch."""
    return {
        "model": {
            "advantage": of("advantages.ValueGAE"),
            "policy_loss": of("losses.ClippedPPO", num_iterations=2, num_minibatches=2),
            "adversarial_reward": of("rewards.WinRate"),
            "objective": of("discriminator.BradleyTerry"),
            "adversarial": 0.5,
            "coupled": 0.1,
            "kl_penalty": 0.1,
            "kl_reference": "snapshot",
            "discriminator_updates": 2,
            "sampling": {"max_new_tokens": 4, "top_p": 0.9, "temperature": 0.8},
        },
        "data": {"batch_size": 3},
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 1,
        "every_n_steps": 4,
        "callbacks": [
            of("callbacks.Snapshot", every_n_steps=6, start=2),
            of("callbacks.AdaptiveEntropy", target=3.0),
            of("callbacks.ConfidenceGate", close_above=0.8, open_below=0.6, decay=0.5),
        ],
    }


def evolution() -> dict[str, Any]:
    """A population, refined beside a discriminator that learns and remembers; its picture, too."""
    return {
        "class_path": "lora_gan.evolution.EvolutionModule",
        "model": {
            "population": 4,
            "elites": 1,
            "refined": 2,
            "refinement_steps": 2,
            "start": of("evolution.SupervisedStart", trunk=2, branch=1, prompts=2),
            "crossover": of("evolution.MixUpdates"),
            "mutation": of("evolution.GaussianMutation", rms=0.01, decay=0.9, anchor=0.1),
            "num_generations": 2,
            "adversarial": 0.3,
            "replay": of("discriminator.Replay", capacity=4, per_step=2),
            "generator_scheduler": scheduler(step_size=2, gamma=0.9),
        },
        "data": {"batch_size": 3},
        "val_check_interval": 3,
        "every_n_steps": 2,
        "max_steps": 7,
        "callbacks": [of("callbacks.MovingAverageBaseline"), of("callbacks.FitnessPlot", every_n_generations=100)],
    }


@dataclass(frozen=True)
class Experiment:
    """One configuration; every run of it in a folder of its own."""

    folder: Path
    base: str
    chosen: dict[str, Any]

    def arguments(self, run: str) -> list[str]:
        """configs/qa.yaml on a tiny base, with this configuration over it."""
        chosen = self.chosen
        best = {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"filename": "best-{step}", "monitor": "text/reward", "mode": "max", **NAMED},
        }
        model = {
            "base": self.base,
            "rewards": [of("rewards.FunctionReward", function="tests.helpers.steps.share_of_a")],
            "sampling": {"max_new_tokens": 4},
            "generator_lora": {"rank": 4, "alpha": 8},
            "discriminator_lora": {"rank": 4, "alpha": 8},
            "generator_scheduler": None,
        }
        data = {"source": own(self.folder / "rows.jsonl", "Say"), "max_validation": 3, "max_test": 3}
        settings = {
            "model": {
                "class_path": chosen.get("class_path", "lora_gan.module.LoraGANModule"),
                "init_args": in_groups({**model, **chosen["model"]}),
            },
            "data": {"init_args": {**data, **chosen["data"]}},
            "trainer": {
                "max_steps": self.steps,
                "accelerator": "cpu",
                "enable_progress_bar": False,
                "val_check_interval": chosen["val_check_interval"],
                "check_val_every_n_epoch": chosen.get("check_val_every_n_epoch"),
                "logger": {"init_args": {"save_dir": str(self.folder / run)}},
                "callbacks": [
                    of("callbacks.LastCheckpoint", every_n_steps=chosen["every_n_steps"]),
                    of("callbacks.TextMetrics", samples=1),
                    best,
                    *chosen["callbacks"],
                    {"class_path": f"{__name__}.Journal", "init_args": {"path": str(self.journal(run))}},
                ],
            },
        }
        path = self.folder / f"{run}.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return [f"--config={ROOT / 'configs' / 'qa.yaml'}", f"--config={path}"]

    @property
    def steps(self) -> int:
        return int(self.chosen.get("max_steps", STEPS))

    def journal(self, run: str) -> Path:
        return self.folder / f"{run}.jsonl"

    def records(self, run: str) -> list[dict[str, Any]]:
        """The journal's whole lines."""
        path = self.journal(run)
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def start(self, run: str, *more: str) -> BaseProcess:
        """A process that fits; it goes on where the run has a checkpoint."""
        arguments = ["fit", *self.arguments(run), "--ckpt_path=last", *more]
        process = multiprocessing.get_context("fork").Process(
            target=fit_by_command, args=(arguments, self.folder / f"{run}.log")
        )
        process.start()
        return process

    def finish(self, run: str, *more: str) -> None:
        process = self.start(run, *more)
        process.join(PATIENCE)
        assert process.exitcode == 0, (self.folder / f"{run}.log").read_text()[-3000:]

    def wait_for(self, run: str, alive: Callable[[], bool], lines: int) -> None:
        """Until the journal has grown by so many lines."""
        before, until = len(self.records(run)), time.monotonic() + PATIENCE
        while len(self.records(run)) < before + lines and alive() and time.monotonic() < until:
            time.sleep(0.002)

    def checkpoints(self, run: str) -> Path:
        """Of the newest run: one that is killed before its first file starts anew."""
        return max((self.folder / run).glob("qa/*/checkpoints"), default=self.folder)


def fit_by_command(arguments: list[str], log: Path) -> None:
    with log.open("a", buffering=1) as stream, redirect_stdout(stream), redirect_stderr(stream):
        logging.getLogger("lora_gan").handlers.clear()  # those of earlier tests write elsewhere
        main(arguments)


@pytest.fixture
def experiment(bases: dict[str, str], tmp_path: Path) -> Callable[[dict[str, Any]], Experiment]:
    return lambda chosen: Experiment(tmp_path, bases["gpt2"], chosen)


def anywhere(value: Any, folder: Path) -> Any:
    """A checkpoint without the folder in which it was written, and without a score that Lightning does not restore."""
    if isinstance(value, dict):
        return {anywhere(k, folder): anywhere(item, folder) for k, item in value.items() if k != "current_score"}
    if isinstance(value, list):
        return [anywhere(item, folder) for item in value]
    return value.replace(str(folder), "") if isinstance(value, str) else value


def check_equal(experiment: Experiment, killed: str, whole: str) -> None:
    """Every line of every process, the last state with all that it knows, the best one and the held-out table."""
    wanted = {(line["what"], line["step"]): line for line in experiment.records(whole)}
    found = experiment.records(killed)
    assert {(line["what"], line["step"]) for line in found} == set(wanted)
    for line in found:
        assert repr(line) == repr(wanted[line["what"], line["step"]])
    one, other = experiment.checkpoints(killed), experiment.checkpoints(whole)
    mine, theirs = (anywhere(read_checkpoint(folder / LAST), folder) for folder in (one, other))
    assert list(differing(mine, theirs)) == []
    tables = [folder.with_name("held_out.md").read_text() for folder in (one, other)]
    assert tables[0] == tables[1]


def kill_and_compare(experiment: Experiment, kills: int) -> None:
    """Kill a run at random moments and at last cut off its newest file; it ends as one that was left alone."""
    experiment.finish("whole")
    seed = int.from_bytes(os.urandom(4), "big")
    chance = random.Random(seed)
    lost: list[int] = []
    for _ in range(kills):
        process = experiment.start("killed")
        experiment.wait_for("killed", process.is_alive, chance.randint(1, 2 * experiment.steps // (kills + 1)))
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        lost.append(steps_lost(experiment, "killed"))
    cut = cut_off(experiment.checkpoints("killed") / LAST)
    experiment.finish("killed")
    print("seed", seed, "steps lost by each kill", lost)
    check_equal(experiment, "killed", "whole")
    assert ("is damaged" in (experiment.folder / "killed.log").read_text()) == cut


def steps_lost(experiment: Experiment, run: str) -> int:
    """Steps that were computed and are in no file."""
    files = (experiment.folder / run).glob("qa/*/checkpoints/*.ckpt")
    saved = max((read_checkpoint(file)["global_step"] for file in files), default=0)
    return max((line["step"] for line in experiment.records(run)), default=0) - int(saved)


def cut_off(last: Path) -> bool:
    """Damage the newest file where there is one before it; a kill may have come between the two."""
    there = last.exists() and last.with_name(PREVIOUS).exists()
    if there:
        last.write_bytes(last.read_bytes()[:-1000])
    return there


@pytest.mark.parametrize(("chosen", "kills"), [(everything, 2), (evolution, 1)], ids=["steps", "generations"])
def test_a_killed_run_is_resumed_bit_for_bit(
    chosen: Callable[[], dict[str, Any]], kills: int, experiment: Callable[[dict[str, Any]], Experiment]
) -> None:
    kill_and_compare(experiment(chosen()), kills)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_every_step_can_be_resumed(
    number: int, experiment: Callable[[dict[str, Any]], Experiment], tmp_path: Path
) -> None:
    """From each step's checkpoint three steps more: ends of epochs and validations are among them."""
    setting = [everything, lambda: micro_batches(tmp_path), self_play][number]()
    keeper = {"class_path": f"{__name__}.Keeper", "init_args": {"folder": str(tmp_path / "kept")}}
    setting |= {"every_n_steps": 1, "callbacks": [*setting["callbacks"], keeper]}
    chosen = experiment(setting)
    chosen.finish("whole", "--test_after_fit=false")
    wanted = {(line["what"], line["step"]): line for line in chosen.records("whole")}
    for done in range(1, STEPS):
        end = min(done + 3, STEPS)
        more = [f"--ckpt_path={tmp_path / 'kept' / f'{done}.ckpt'}", f"--trainer.max_steps={end}"]
        chosen.finish(f"from_{done}", *more, "--test_after_fit=false")
        for what in ("step", "validation"):
            due = [wanted[what, at] for at in range(done + 1, end + 1) if (what, at) in wanted]
            found = [line for line in chosen.records(f"from_{done}") if line["what"] == what]
            assert repr(found) == repr(due), f"from step {done}"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_runs_killed_thirteen_times(
    number: int, experiment: Callable[[dict[str, Any]], Experiment], tmp_path: Path
) -> None:
    chosen = [everything, lambda: micro_batches(tmp_path), self_play, evolution][number]
    kill_and_compare(experiment(chosen()), [4, 3, 3, 3][number])


# signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_says_how_to_resume(
    number: signal.Signals, status: int, experiment: Callable[[dict[str, Any]], Experiment], tmp_path: Path
) -> None:
    chosen = experiment({**everything(), "every_n_steps": 1000, "max_steps": 12})
    process = chosen.start("stopped", "--test_after_fit=false")
    chosen.wait_for("stopped", process.is_alive, 4)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(PATIENCE)
    assert process.exitcode == status
    done = max(line["step"] for line in chosen.records("stopped"))
    assert read_checkpoint(chosen.checkpoints("stopped") / LAST)["global_step"] == done < 12
    log = (tmp_path / "stopped.log").read_text()
    (line,) = [line for line in log.splitlines() if f"{number.name} after step {done}; resume: " in line]
    command = line.split("resume: python -m src.cli ")[1].split()
    assert "Traceback" not in log

    if number == signal.SIGINT:
        return
    again = multiprocessing.get_context("fork").Process(target=fit_by_command, args=(command, tmp_path / "again.log"))
    again.start()
    again.join(PATIENCE)
    assert again.exitcode == 0, (tmp_path / "again.log").read_text()[-3000:]
    steps = [line["step"] for line in chosen.records("stopped") if line["what"] == "step"]
    assert steps == list(range(1, 13))


# damaged files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints of about the shape of real ones."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    for name, at in ((PREVIOUS, 10), (LAST, 20)):
        state = {f"layer.{n}": torch.randn(16, 8) + at for n in range(12)}
        write_checkpoint({"global_step": at, "state_dict": state, "optimizer_states": [{"lr": 0.1}]}, folder / name)
    return folder


def test_damaged_files_are_noticed(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """200 truncations and changed bits: a refusal that names the file, or contents that are bit for bit the same."""
    whole = (saved / LAST).read_bytes()
    wanted, chance = read_checkpoint(saved / LAST), random.Random(5)
    (tmp_path / PREVIOUS).write_bytes((saved / PREVIOUS).read_bytes())
    damaged, refused = tmp_path / LAST, 0
    for case in range(200):
        changed = bytearray(whole)
        if case % 2:
            for _ in range(chance.choice([1, 1, 3])):
                changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        damaged.write_bytes(changed if case % 2 else changed[: chance.randrange(len(changed))])
        caplog.clear()
        if intact_checkpoint(damaged) == damaged:  # the bit is nowhere that matters, such as in a date
            assert case % 2 and list(differing(read_checkpoint(damaged), wanted)) == []
            continue
        refused += 1
        assert f"{damaged} is damaged" in caplog.text and "previous.ckpt of step 10" in caplog.text
        with pytest.raises(DamagedCheckpoint, match=r"last\.ckpt is damaged"):
            read_checkpoint(damaged)
    print("refused", refused)
    assert refused > 150


def test_nothing_intact_is_left(saved: Path, tmp_path: Path) -> None:
    for name in (LAST, PREVIOUS):
        (tmp_path / name).write_bytes((saved / name).read_bytes()[:-100])
    with pytest.raises(LoraGANError, match=r"no other intact checkpoint in its folder: start a new run"):
        intact_checkpoint(tmp_path / LAST)


def test_a_missing_last_one_is_made_up_for_but_no_other(saved: Path, tmp_path: Path) -> None:
    (tmp_path / PREVIOUS).write_bytes((saved / PREVIOUS).read_bytes())
    assert intact_checkpoint(tmp_path / LAST) == tmp_path / PREVIOUS
    with pytest.raises(LoraGANError, match=r"no checkpoint at .*best-300\.ckpt"):
        intact_checkpoint(tmp_path / "best-300.ckpt")


def test_a_foreign_file_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / PREVIOUS).write_bytes((saved / PREVIOUS).read_bytes())
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / LAST)
    with pytest.raises(LoraGANError, match="more than tensors and plain values"):
        intact_checkpoint(tmp_path / LAST)


def test_a_write_that_fails_leaves_the_old_file(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / LAST
    write_checkpoint({"global_step": 1}, path)

    def full(value: Any, draft: Path) -> None:
        draft.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(LoraGANError, match=r"No space left on device.*free disk space"):
        write_checkpoint({"global_step": 2}, path)
    assert read_checkpoint(path) == {"global_step": 1}
    assert [file.name for file in tmp_path.iterdir()] == [LAST]


# settings that are changed on a resume; coefficients and data: test_module.py, test_data.py


def adam(**settings: Any) -> Callable[[Any], AdamW]:
    return lambda parameters: AdamW(parameters, lr=1e-3, **settings)


def cosine(steps: int) -> Callable[[Any], CosineAnnealingLR]:
    return lambda optimizer: CosineAnnealingLR(optimizer, steps)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"generator_optimizer": adam(betas=(0.8, 0.999))},
            r"generator\.optimizer\.betas: \[0\.9, 0\.999\] in the checkpoint, \[0\.8",
        ),
        ({"discriminator_optimizer": adam(eps=1e-6)}, r"discriminator\.optimizer\.eps: 1e-08 in the checkpoint, 1e-06"),
        (
            {"generator_optimizer": lambda parameters: SGD(parameters, lr=1e-3)},
            r"generator\.optimizer\.class: AdamW in the checkpoint, SGD now",
        ),
        ({"generator_scheduler": cosine(20)}, r"generator\.scheduler\.T_max: 10 in the checkpoint, 20 now"),
        ({"generator_scheduler": None}, r"generator\.scheduler\.class: CosineAnnealingLR in the checkpoint, None now"),
        (
            {"model": AdapterDiscriminator(CompletionOnly())},
            r"discriminator\.model\.input_format: PromptAndCompletion in the checkpoint, CompletionOnly now",
        ),
    ],
)
def test_a_setting_that_could_not_take_effect_is_refused_by_name(
    changed: dict[str, Any], message: str, build: Build, batch: PromptBatch, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "generator_optimizer": adam(),
        "discriminator_optimizer": adam(),
        "generator_scheduler": cosine(10),
    }
    fit(build(**settings), [batch], 1)[1].save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(LoraGANError, match=message):
        fit(build(**{**settings, **changed}), [batch], 2, ckpt_path=tmp_path / "one.ckpt")


def test_the_seed_cannot_change_and_need_not_be_given(build: Build, batch: PromptBatch, tmp_path: Path) -> None:
    whole, _ = fit(build(), [batch], 3)
    fit(build(), [batch], 1)[1].save_checkpoint(tmp_path / "one.ckpt")
    module = build()
    torch.manual_seed(99)
    runner = trainer(3, recorder := Recorder())
    loader = DataLoader([batch], batch_size=None)
    runner.fit(module, loader, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert recorder.reports == whole.reports[1:]
    other = build()
    other.seed = 6
    with pytest.raises(LoraGANError, match="seed_everything: 5 in the checkpoint, 6 now"):
        fit(other, [batch], 3, ckpt_path=tmp_path / "one.ckpt")


def test_phases_that_have_begun_cannot_change(build: Build, batch: PromptBatch, tmp_path: Path) -> None:
    def curriculum(warm: float, late: float) -> Curriculum:
        return Curriculum([Phase(0, {"supervised": warm}), Phase(3, {"supervised": late})])

    path = tmp_path / "two.ckpt"
    fit(build(), [batch], 2, curriculum(0.5, 0.2))[1].save_checkpoint(path)
    resumed, _ = fit(build(), [batch], 4, curriculum(0.5, 0.1), ckpt_path=path)
    assert [report["coefficient/supervised"] for report in resumed.reports] == pytest.approx([0.5, 0.1])
    for other in (curriculum(0.6, 0.2), Curriculum([Phase(0, {"supervised": 0.5}), Phase(1, {"policy": 0.0})])):
        with pytest.raises(LoraGANError, match="step 2 was reached with the phases"):
            fit(build(), [batch], 4, other, ckpt_path=path)


def test_a_base_may_move_but_not_change(
    build: Build, bases: dict[str, str], batch: PromptBatch, tmp_path: Path
) -> None:
    path = tmp_path / "one.ckpt"
    fit(build(), [batch], 1)[1].save_checkpoint(path)
    moved = shutil.copytree(bases["gpt2"], tmp_path / "moved")
    fit(build(base=str(moved)), [batch], 2, ckpt_path=path)
    with torch.random.fork_rng():
        torch.manual_seed(77)
        AutoModelForCausalLM.from_config(CONFIGS["gpt2"]).save_pretrained(moved)
    with pytest.raises(LoraGANError, match="weights of the base: "):
        fit(build(base=str(moved)), [batch], 2, ckpt_path=path)
    AutoModelForCausalLM.from_pretrained(bases["gpt2"]).save_pretrained(moved)
    tokens = json.loads((moved / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (moved / "tokenizer.json").write_text(json.dumps(tokens), encoding="utf-8")
    with pytest.raises(LoraGANError, match=r"vocabulary: 257 tokens \(\w+\) in the checkpoint, 257 tokens"):
        fit(build(base=str(moved)), [batch], 2, ckpt_path=path)


# the same numbers


def test_an_embedding_does_not_depend_on_its_batch() -> None:
    """Else a resumed run, which has to encode texts anew, would be paid a little differently."""
    texts = [" ".join(["Paris", "is", "the", "capital", "of", "France"][n % 5 :]) + f" {n}" for n in range(30)]
    together = SentenceEncoder().encode(texts)
    for chosen in ([3], [7, 8], list(range(0, 30, 3))):
        assert torch.equal(SentenceEncoder().encode([texts[i] for i in chosen]), together[chosen])
