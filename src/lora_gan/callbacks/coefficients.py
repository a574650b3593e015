"""Coefficient callbacks: coefficients of the generator's loss that follow a schedule or a measurement."""

from __future__ import annotations

import lightning as L

from lora_gan.errors import LoraGANError
from lora_gan.step_callback import StepCallback, StepModule
from lora_gan.types import ENTROPY, KL, MEAN_LENGTH, PromptBatch, StepOutput

KL_COEFFICIENTS = ("kl", "kl_penalty")


class KLSchedule(StepCallback):
    """Changes a KL coefficient linearly from one step to another; before, it keeps its configured value.

    Args:
        first: Coefficient in step ``start``.
        last: Coefficient from step ``end`` on.
        start: Step at which the change begins.
        end: Step at which the change ends.
        coefficient: "kl" (in the loss) or "kl_penalty" (in the reward).
    """

    def __init__(self, first: float, last: float, start: int, end: int, coefficient: str = "kl") -> None:
        if not (first >= 0 and last >= 0) or not 0 <= start < end:
            raise LoraGANError(
                f"need coefficients >= 0 and 0 <= start < end; got {first} and {last}, steps {start} to {end}"
            )
        self.first, self.last, self.start, self.end = first, last, start, end
        self.coefficient = _kl_coefficient(coefficient)

    def before_step(self, trainer: L.Trainer, module: StepModule, batch: PromptBatch) -> None:
        if trainer.global_step < self.start:
            return
        share = min((trainer.global_step - self.start) / (self.end - self.start), 1.0)
        module.coefficients.set(**{self.coefficient: self.first + share * (self.last - self.first)})


class AdaptiveKL(StepCallback):
    """Holds KL(generator‖reference) near a target: k ← k·(1 + clip(KL/target − 1, ±0.2)·n/horizon).

    The controller of Ziegler et al. (arXiv 1909.08593); n is the number of completions in a step. It acts in steps that
    sample and starts from the configured coefficient, which must not be 0.

    Args:
        target: Target KL in nats per completion.
        horizon: Number of completions in which the coefficient changes by at most a fifth.
        coefficient: "kl" (in the loss) or "kl_penalty" (in the reward).
    """

    def __init__(self, target: float = 6.0, horizon: int = 10_000, coefficient: str = "kl") -> None:
        if not target > 0 or horizon < 1:
            raise LoraGANError(f"target must be > 0 and horizon at least 1, got {target} and {horizon}")
        self.target = target
        self.horizon = horizon
        self.coefficient = _kl_coefficient(coefficient)

    def after_step(self, trainer: L.Trainer, module: StepModule, output: StepOutput, batch: PromptBatch) -> None:
        if KL not in output.metrics:
            return
        kl = float(output.metrics[KL] * output.metrics[MEAN_LENGTH])
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        factor = 1 + error * len(output.rollout) / self.horizon
        module.coefficients.set(**{self.coefficient: getattr(module.coefficients, self.coefficient) * factor})


class AdaptiveEntropy(StepCallback):
    """Holds the policy's entropy above a target: coefficient ← max(0, coefficient + rate·(target − entropy)).

    The dual ascent of maximum-entropy methods (arXiv 1812.05905, section 5) on the coefficient ``entropy``.

    Args:
        target: Target entropy in nats per token.
        rate: Step size of the coefficient.
        largest: Upper bound of the coefficient.
    """

    def __init__(self, target: float, rate: float = 0.01, largest: float = 1.0) -> None:
        if not (target >= 0 and rate > 0 and largest > 0):
            raise LoraGANError(f"need target >= 0, rate > 0, largest > 0; got {target}, {rate}, {largest}")
        self.target = target
        self.rate = rate
        self.largest = largest

    def after_step(self, trainer: L.Trainer, module: StepModule, output: StepOutput, batch: PromptBatch) -> None:
        if ENTROPY not in output.metrics:
            return
        moved = float(module.coefficients.entropy) + self.rate * (self.target - float(output.metrics[ENTROPY]))
        module.coefficients.set(entropy=min(max(moved, 0.0), self.largest))


def _kl_coefficient(name: str) -> str:
    if name not in KL_COEFFICIENTS:
        raise LoraGANError(f"coefficient must be one of {', '.join(KL_COEFFICIENTS)}, got {name!r}")
    return name
