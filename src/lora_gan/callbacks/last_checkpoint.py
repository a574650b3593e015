"""Last checkpoint: the newest state of a run, for resuming it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from lora_gan.checkpointing.files import LAST, PREVIOUS
from lora_gan.errors import LoraGANError
from lora_gan.lightning_compat import is_last_batch, validates_after_this_batch
from lora_gan.program import command

log = logging.getLogger("lora_gan")


class Interrupted(SystemExit):
    """A signal ended the run after the step was finished and saved; the exit status is 128 + its number."""


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what runs within it at once, with status 143, unless a callback finishes its step first.

    Lightning would go on with the batch, then end without a word and with status 0.
    """

    def stop(received: int, frame: FrameType | None) -> None:
        log.warning("SIGTERM: stopped")
        raise Interrupted(128 + received)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class LastCheckpoint(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` in the run's folder every few steps and after the last one.

    The one before is kept as ``previous.ckpt``. After Ctrl-C or SIGTERM the run finishes its step, writes the file and
    logs how to resume; a second Ctrl-C stops at once. In a step with a validation the file is written after it, because
    Lightning does not repeat an interrupted validation; all other callbacks have run by then.

    Args:
        every_n_steps: Steps between two writes, and so the most that can be lost.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise LoraGANError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.waits_for_validation = False
        self.signal: signal.Signals | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle signals; Lightning restores the earlier handlers after the fit."""
        self.waits_for_validation, self.signal = False, None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._listen(number, signal.getsignal(number))

    def _listen(self, number: signal.Signals, before: Any) -> None:
        def note(received: int, frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, before)
            log.warning("%s: finishing this step, then stopping; press again to stop at once", number.name)

        signal.signal(number, note)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not (self._interrupted(trainer) or _over(trainer) or trainer.global_step % self.every_n_steps == 0):
            return
        self.waits_for_validation = not trainer.should_stop and validates_after_this_batch(trainer)
        if not self.waits_for_validation:
            self._write(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self.waits_for_validation or self._interrupted(trainer) or trainer.should_stop:
            self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._interrupted(trainer):
            self._stop(trainer)

    def _interrupted(self, trainer: L.Trainer) -> bool:
        """Whether any process has received a signal."""
        return trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)

    def _write(self, trainer: L.Trainer) -> None:
        path = last_checkpoint(trainer)
        if trainer.is_global_zero and path.exists():
            path.replace(path.with_name(PREVIOUS))
        trainer.save_checkpoint(path, weights_only=False)
        self.waits_for_validation = False
        if self._interrupted(trainer):
            self._stop(trainer)

    def _stop(self, trainer: L.Trainer) -> None:
        number = self.signal or signal.SIGTERM
        log.warning("%s after step %d; resume: %s", number.name, trainer.global_step, resume_command(trainer))
        raise Interrupted(128 + number)


WITH_FOLDERS = (TensorBoardLogger, CSVLogger)  # loggers that give each run a folder version_<n>


def run_folder(trainer: L.Trainer) -> Path:
    """Folder of a run's files; with ``fast_dev_run``, which leaves nothing, one that is deleted at the end.

    It is that of the first logger that gives each run a folder, else the trainer's ``default_root_dir``, which the
    command line makes a folder of the run's own.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return Path(_scratch().name)
    ours = next((sink for sink in trainer.loggers if isinstance(sink, WITH_FOLDERS)), None)
    folder = trainer.default_root_dir if ours is None else ours.log_dir
    return Path(trainer.strategy.broadcast(folder))


@cache
def _scratch() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="lora-gan-")


def last_checkpoint(trainer: L.Trainer) -> Path:
    """Path that :class:`LastCheckpoint` writes to."""
    return run_folder(trainer) / "checkpoints" / LAST


def resume_command(trainer: L.Trainer) -> str:
    """Command line that resumes a run."""
    last = last_checkpoint(trainer)
    config = os.path.relpath(last.parents[1] / "config.yaml")
    return command("fit", "--config", config, "--ckpt_path", os.path.relpath(last))


def _over(trainer: L.Trainer) -> bool:
    """Whether this is the last step, as far as the data loader knows."""
    last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.should_stop or trainer.global_step == trainer.max_steps or (last_epoch and is_last_batch(trainer))
