"""Balance of generator and discriminator: when the discriminator learns, and how much its score counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning as L

from lora_gan.errors import LoraGANError
from lora_gan.step_callback import StepCallback, StepModule, step_module
from lora_gan.tensors import moving_average
from lora_gan.types import ACCURACY, PromptBatch, StepOutput


class _WatchesAccuracy(StepCallback, ABC):
    """Keeps a moving average of the discriminator's accuracy on fresh completions, before its updates.

    Args:
        decay: Decay of the moving average, in [0, 1).
    """

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise LoraGANError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.accuracy: float | None = None

    def after_step(self, trainer: L.Trainer, module: StepModule, output: StepOutput, batch: PromptBatch) -> None:
        if ACCURACY in output.metrics:
            now = float(output.metrics[ACCURACY])
            self.accuracy = now if self.accuracy is None else moving_average(self.accuracy, now, self.decay)
            self.react(module, self.accuracy)

    @abstractmethod
    def react(self, module: StepModule, accuracy: float) -> None:
        """React to the average accuracy, by setting a coefficient for example."""

    def state_dict(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.accuracy = state_dict["accuracy"]


class DiscriminatorControl(_WatchesAccuracy):
    """Updates the discriminator in every n-th step only, and not while its accuracy is too high.

    It scores completions in every step. The number of updates in a step is the coefficient ``discriminator_updates``.

    Args:
        every_n_steps: Steps between two with updates.
        freeze_above: Average accuracy from which it stops learning; null never stops it.
        train_below: Average accuracy below which it learns again; by default ``freeze_above``.
        decay: Decay of the moving average, in [0, 1).
    """

    def __init__(
        self,
        every_n_steps: int = 1,
        freeze_above: float | None = None,
        train_below: float | None = None,
        decay: float = 0.9,
    ) -> None:
        super().__init__(decay)
        if every_n_steps < 1:
            raise LoraGANError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.freeze_above = 1.1 if freeze_above is None else freeze_above
        self.train_below = self.freeze_above if train_below is None else train_below
        if not self.train_below <= self.freeze_above:
            raise LoraGANError(f"train_below {train_below} must not be above freeze_above {freeze_above}")
        self.frozen = False

    def before_step(self, trainer: L.Trainer, module: StepModule, batch: PromptBatch) -> None:
        learns = not self.frozen and trainer.global_step % self.every_n_steps == 0
        module.coefficients.set(discriminator_gate=float(learns))

    def react(self, module: StepModule, accuracy: float) -> None:
        self.frozen = accuracy >= (self.train_below if self.frozen else self.freeze_above)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"frozen": self.frozen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.frozen = state_dict["frozen"]


class ConfidenceGate(_WatchesAccuracy):
    """Turns the adversarial reward off while the discriminator is always right: its scores then carry no information.

    Args:
        close_above: Average accuracy from which the adversarial reward does not count.
        open_below: Average accuracy below which it counts again; by default ``close_above``.
        decay: Decay of the moving average, in [0, 1).
    """

    def __init__(self, close_above: float = 0.98, open_below: float | None = None, decay: float = 0.9) -> None:
        super().__init__(decay)
        self.close_above = close_above
        self.open_below = close_above if open_below is None else open_below
        if not self.open_below <= close_above:
            raise LoraGANError(f"open_below {open_below} must not be above close_above {close_above}")

    def react(self, module: StepModule, accuracy: float) -> None:
        border = self.close_above if module.coefficients.adversarial_gate else self.open_below
        module.coefficients.set(adversarial_gate=float(accuracy < border))


class AdaptiveAdversarialWeight(_WatchesAccuracy):
    """Adaptive λ: the weight of the adversarial reward grows with the discriminator's accuracy.

    The coefficient ``adversarial_scale``, which multiplies ``adversarial``, is 0 up to an average accuracy of ``low``,
    1 from ``high`` on, and linear in between.

    Args:
        low: Accuracy at which the adversarial reward does not count; 0.5 is guessing.
        high: Accuracy from which it counts in full.
        decay: Decay of the moving average, in [0, 1).
    """

    def __init__(self, low: float = 0.5, high: float = 0.9, decay: float = 0.9) -> None:
        super().__init__(decay)
        if not 0 <= low < high <= 1:
            raise LoraGANError(f"low and high must be accuracies with 0 <= low < high <= 1, got {low} and {high}")
        self.low = low
        self.high = high

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.accuracy is None:
            step_module(pl_module, self).coefficients.set(adversarial_scale=0.0)

    def react(self, module: StepModule, accuracy: float) -> None:
        share = (accuracy - self.low) / (self.high - self.low)
        module.coefficients.set(adversarial_scale=min(max(share, 0.0), 1.0))
