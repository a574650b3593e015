"""The moving average that REINFORCE compares rewards with."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor

from lora_gan.errors import LoraGANError
from lora_gan.module import LoraGANModule


class MovingAverageBaseline(L.Callback):
    """Keeps the knob ``baseline`` ← decay·baseline + (1 − decay)·mean reward; it starts at the first mean reward.

    Args:
        decay: How slowly it forgets, in [0, 1).
    """

    keeps_baseline = True

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise LoraGANError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.started = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LoraGANModule)
        reward: Tensor | None = outputs.get("reward/total")
        if reward is None:
            return
        knobs = pl_module.knobs
        old = knobs.baseline if self.started else reward
        knobs.set(baseline=self.decay * old + (1 - self.decay) * reward)
        self.started = True

    def state_dict(self) -> dict[str, Any]:
        return {"started": self.started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.started = state_dict["started"]
