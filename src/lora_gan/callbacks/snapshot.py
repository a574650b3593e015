"""Frozen earlier generators: opponents in self-play, anchors of the KL term."""

from __future__ import annotations

from typing import Any

import lightning as L

from lora_gan.errors import LoraGANError
from lora_gan.module import LoraGANModule


class Snapshot(L.Callback):
    """Takes a snapshot of the generator every few rounds, in place of the last one.

    Args:
        every_n_rounds: Rounds from one snapshot to the next.
        start: Round of the first one, taken before the round is played.
    """

    def __init__(self, every_n_rounds: int = 50, start: int = 0) -> None:
        if every_n_rounds < 1 or start < 0:
            raise LoraGANError(f"need every_n_rounds >= 1 and start >= 0, got {every_n_rounds} and {start}")
        self.every_n_rounds = every_n_rounds
        self.start = start

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LoraGANModule)
        since = trainer.global_step - self.start
        if since >= 0 and since % self.every_n_rounds == 0:
            pl_module.backbone.take_snapshot()
