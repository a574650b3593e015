"""End of a run: its adapters, the held-out test of its best checkpoint, and the lines that say how to go on."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

from lora_gan.backbone import DISCRIMINATOR, GENERATOR
from lora_gan.callbacks.best_checkpoint import BestCheckpoint
from lora_gan.callbacks.last_checkpoint import Interrupted, last_checkpoint, resume_command, run_folder
from lora_gan.checkpointing.adapters import ROLES, save_role
from lora_gan.checkpointing.files import read_checkpoint
from lora_gan.module import LoraGANModule
from lora_gan.program import command
from lora_gan.report import write_report

log = logging.getLogger("lora_gan")


@dataclass(frozen=True)
class Best:
    """The best checkpoint of a run."""

    path: Path
    step: int
    metric: str | None  # that it was chosen by; None: it is the newest
    value: float | None  # of the metric
    start: float | None = None  # the metric's value before training

    @property
    def reason(self) -> str:
        """Why it is the best."""
        if self.value is None:
            return "the newest"
        before = "" if self.start is None else f", before training {self.start:.3f}"
        return f"by {self.metric} {self.value:.3f}{before}"


def end_run(
    trainer: L.Trainer, model: LoraGANModule, datamodule: L.LightningDataModule | None, test: bool, report: bool
) -> None:
    """Write the adapters of the best checkpoint, or of the last state, test it, and print what can be done with it.

    With ``report`` the run's folder gets its report.html.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    best, folder = load_best(trainer, model), run_folder(trainer)
    roles = [role for role in ROLES if role != DISCRIMINATOR or has_learned(model, role)]
    if trainer.is_global_zero:
        for role in roles:
            save_role(model, role, folder / "adapters" / role)
    lines, again = closing_lines(trainer, model, best, roles), test_command(trainer, best)
    show_best(trainer, best)
    try:
        if test and is_overridden("test_dataloader", datamodule):
            trainer.test(model, datamodule=datamodule, ckpt_path=best.path if best else None, verbose=False)
    except SystemExit as stopped:  # after Ctrl-C it is Lightning's, with status 1
        number = signal.SIGTERM if isinstance(stopped, Interrupted) else signal.SIGINT
        if trainer.is_global_zero:
            log.warning(
                "%s: the test was stopped and has no results; the run is complete. Test it: %s", number.name, again
            )
        raise Interrupted(128 + number) from None
    finally:
        if trainer.is_global_zero:
            print(with_report(lines, folder) if report else lines)


def with_report(lines: str, folder: Path) -> str:
    """Write the report of a run; the closing lines with its path behind the first of them."""
    path = write_report(folder)
    first, rest = lines.split("\n", 1)
    return lines if path is None else f"{first}\nreport       {_relative(path)}\n{rest}"


def load_best(trainer: L.Trainer, model: LoraGANModule) -> Best | None:
    """Give the model the weights of the best checkpoint; None, and the model unchanged, where there is none."""
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint) or (path := best_path(trainer, callback)) is None:
        return None
    checkpoint = read_checkpoint(path)
    model.load_state_dict(checkpoint["state_dict"], strict=False)
    model.trained_steps = checkpoint["global_step"]
    model.optimization.updates = dict(checkpoint["lora_gan"]["updates"])
    score = callback.best_model_score
    start = callback.before.get(str(callback.monitor)) if isinstance(callback, BestCheckpoint) else None
    return Best(path, checkpoint["global_step"], callback.monitor, None if score is None else float(score), start)


def best_path(trainer: L.Trainer, callback: ModelCheckpoint) -> Path | None:
    """The best checkpoint in the folder of this run, wherever it lay when it was written; None where there is none."""
    name = Path(callback.best_model_path).name
    here = Path(callback.dirpath or run_folder(trainer) / "checkpoints") / name
    return here if name and here.is_file() else None


def has_learned(model: LoraGANModule, role: str) -> bool:
    """Whether a role's weights come from training, in this run or in the one whose adapter it started from."""
    started = {GENERATOR: model.generator.settings.adapter, DISCRIMINATOR: model.discriminator.settings.adapter}[role]
    return started is not None or model.optimization.updates[role] > 0


def show_best(trainer: L.Trainer, best: Best | None) -> None:
    """Log the best value of the metric beside the settings of the run, for TensorBoard's table of hyperparameters."""
    for sink in trainer.loggers:
        if isinstance(sink, TensorBoardLogger) and best is not None and best.value is not None:
            sink.log_hyperparams(sink.hparams, {f"best/{best.metric}": best.value}, best.step)


def closing_lines(trainer: L.Trainer, model: LoraGANModule, best: Best | None, roles: list[str]) -> str:
    """Where the run's results lie and how to continue."""
    folder, last, resume = run_folder(trainer), last_checkpoint(trainer), resume_command(trainer)  # all processes ask
    lines = [f"run          {_relative(folder)}"]
    lines += [f"adapters     {', '.join(_relative(folder / 'adapters' / role) for role in roles)}"]
    if best is not None:
        lines += [f"best         step {best.step}, {best.reason}: {_relative(best.path)}"]
    if last.is_file():
        lines += [f"last         step {trainer.global_step}: {_relative(last)}"]
        floors = [f" --model.{role}.scheduler.init_args.floor 0.1" for role in model.optimization.ended()]
        lines += [f"resume       {resume} --trainer.max_steps <steps>{''.join(floors)}"]
    if best is not None or last.is_file():
        which = _relative(last if best is None else best.path)
        merged = ("--merge", "true", "--output", "exported")
        lines += [f"chat         {command('chat', '--ckpt_path', which)}"]
        lines += [f"export       {command('export', '--ckpt_path', which, *merged)}"]
    return "\n".join(lines)


def test_command(trainer: L.Trainer, best: Best | None) -> str:
    """Command line that tests what a run has made."""
    checkpoint = last_checkpoint(trainer) if best is None else best.path
    config = run_folder(trainer) / "config.yaml"
    return command("test", "--config", _relative(config), "--ckpt_path", _relative(checkpoint))


def _relative(path: Path) -> str:
    return os.path.relpath(path)
