"""The newest state of a run, for resuming it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lora_gan.errors import LoraGANError


class LastCheckpoint(L.Callback):
    """Writes ``checkpoints/last.ckpt`` in the run's folder every few rounds and after the last one.

    Args:
        every_n_rounds: Rounds between two writes.
    """

    def __init__(self, every_n_rounds: int = 100) -> None:
        if every_n_rounds < 1:
            raise LoraGANError(f"every_n_rounds must be at least 1, got {every_n_rounds}")
        self.every_n_rounds = every_n_rounds

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        over = trainer.should_stop or trainer.global_step == trainer.max_steps
        if over or trainer.global_step % self.every_n_rounds == 0:
            trainer.save_checkpoint(last_checkpoint(trainer))


def last_checkpoint(trainer: L.Trainer) -> Path:
    """Where :class:`LastCheckpoint` writes."""
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "last.ckpt"
