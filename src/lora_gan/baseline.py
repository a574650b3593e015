"""The moving average that REINFORCE compares rewards with."""

from __future__ import annotations

from typing import Any

import lightning as L

from lora_gan.errors import LoraGANError
from lora_gan.step_callback import StepCallback, StepModule
from lora_gan.tensors import moving_average
from lora_gan.types import REWARD, PromptBatch, StepOutput


class MovingAverageBaseline(StepCallback):
    """Sets the coefficient ``baseline`` ← decay·baseline + (1 − decay)·mean reward; it starts at the first mean reward.

    A module whose advantage needs it adds it to the trainer, unless a callback of the run says ``sets_baseline``.

    Args:
        decay: How slowly it forgets, in [0, 1).
    """

    sets_baseline = True

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise LoraGANError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.started = False

    def after_step(self, trainer: L.Trainer, module: StepModule, output: StepOutput, batch: PromptBatch) -> None:
        reward = output.metrics.get(REWARD)
        if reward is None:
            return
        old = module.coefficients.baseline if self.started else reward
        module.coefficients.set(baseline=moving_average(old, reward, self.decay))
        self.started = True

    def state_dict(self) -> dict[str, Any]:
        return {"started": self.started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.started = state_dict["started"]
