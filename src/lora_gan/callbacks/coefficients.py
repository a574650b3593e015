"""Coefficients of the generator's loss that follow a schedule or a measurement."""

from __future__ import annotations

from typing import Any

import lightning as L

from lora_gan.errors import LoraGANError
from lora_gan.module import LoraGANModule

KL_KNOBS = ("kl_coefficient", "kl_penalty")


class KLSchedule(L.Callback):
    """Moves a KL coefficient along a straight line from one round to another; before, it stays as it was given.

    Args:
        first: Coefficient in round ``start``.
        last: Coefficient from round ``end`` on.
        start: Round at which it begins to move.
        end: Round at which it has arrived.
        knob: "kl_coefficient" (in the loss) or "kl_penalty" (in the reward).
    """

    def __init__(self, first: float, last: float, start: int, end: int, knob: str = "kl_coefficient") -> None:
        if min(first, last) < 0 or not 0 <= start < end:
            raise LoraGANError(
                f"need coefficients >= 0 and 0 <= start < end; got {first} and {last}, rounds {start} to {end}"
            )
        self.first, self.last, self.start, self.end = first, last, start, end
        self.knob = _kl_knob(knob)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LoraGANModule)
        if trainer.global_step < self.start:
            return
        share = min((trainer.global_step - self.start) / (self.end - self.start), 1.0)
        pl_module.knobs.set(**{self.knob: self.first + share * (self.last - self.first)})


class AdaptiveKL(L.Callback):
    """Holds KL(generator‖reference) near a target: k ← k·(1 + clip(KL/target − 1, ±0.2)·n/horizon).

    The controller of Ziegler et al. (arXiv 1909.08593), n the answers of a round. It acts in rounds that sampled, from
    the coefficient that the module was given, which must not be 0.

    Args:
        target: Wanted KL in nats an answer.
        horizon: Answers in which the coefficient moves by a fifth at most.
        knob: "kl_coefficient" (in the loss) or "kl_penalty" (in the reward).
    """

    def __init__(self, target: float = 6.0, horizon: int = 10_000, knob: str = "kl_coefficient") -> None:
        if target <= 0 or horizon < 1:
            raise LoraGANError(f"target must be > 0 and horizon at least 1, got {target} and {horizon}")
        self.target = target
        self.horizon = horizon
        self.knob = _kl_knob(knob)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LoraGANModule)
        if "policy/kl" not in outputs:
            return
        kl = float(outputs["policy/kl"] * outputs["policy/length"])
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        factor = 1 + error * len(pl_module.rollout) / self.horizon
        pl_module.knobs.set(**{self.knob: getattr(pl_module.knobs, self.knob) * factor})


class AdaptiveEntropy(L.Callback):
    """Holds the policy's entropy above a target: coefficient ← max(0, coefficient + rate·(target − entropy)).

    The dual ascent of maximum-entropy methods (arXiv 1812.05905, section 5) on the knob ``entropy_coefficient``.

    Args:
        target: Wanted entropy in nats a token.
        rate: Step of the coefficient.
        largest: Bound of the coefficient.
    """

    def __init__(self, target: float, rate: float = 0.01, largest: float = 1.0) -> None:
        if target < 0 or rate <= 0 or largest <= 0:
            raise LoraGANError(f"need target >= 0, rate > 0, largest > 0; got {target}, {rate}, {largest}")
        self.target = target
        self.rate = rate
        self.largest = largest

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LoraGANModule)
        if "policy/entropy" not in outputs:
            return
        moved = float(pl_module.knobs.entropy_coefficient) + self.rate * (
            self.target - float(outputs["policy/entropy"])
        )
        pl_module.knobs.set(entropy_coefficient=min(max(moved, 0.0), self.largest))


def _kl_knob(name: str) -> str:
    if name not in KL_KNOBS:
        raise LoraGANError(f"knob must be one of {', '.join(KL_KNOBS)}, got {name!r}")
    return name
