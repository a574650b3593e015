"""Snapshots of the generator: opponents in self-play, references of the KL term."""

from __future__ import annotations

import lightning as L

from lora_gan.errors import LoraGANError
from lora_gan.step_callback import StepCallback, StepModule
from lora_gan.types import PromptBatch


class Snapshot(StepCallback):
    """Takes a snapshot of the generator every few steps, replacing the last one.

    Args:
        every_n_steps: Steps between two snapshots.
        start: Step before which the first one is taken.
    """

    def __init__(self, every_n_steps: int = 50, start: int = 0) -> None:
        if every_n_steps < 1 or start < 0:
            raise LoraGANError(f"need every_n_steps >= 1 and start >= 0, got {every_n_steps} and {start}")
        self.every_n_steps = every_n_steps
        self.start = start

    def before_step(self, trainer: L.Trainer, module: StepModule, batch: PromptBatch) -> None:
        since = trainer.global_step - self.start
        if since >= 0 and since % self.every_n_steps == 0:
            module.backbone.take_snapshot()
