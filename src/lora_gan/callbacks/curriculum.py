"""Phases of a run: warm up, then mix."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import lightning as L

from lora_gan.errors import LoraGANError
from lora_gan.module import LoraGANModule


@dataclass(frozen=True)
class Phase:
    """What counts from one round on; what is not given stays as it was.

    Args:
        start: First round of the phase, from 0.
        supervised_weight: Weight of the supervised loss.
        policy_weight: Weight of the policy loss; at 0, and with the discriminator not learning, nothing is sampled.
        adversarial_weight: Weight of the discriminator's payoff in the reward.
        coupled_weight: Weight of the discriminator's loss that is differentiated through relaxed samples.
        kl_coefficient: Weight of the KL term in the loss.
        kl_penalty: Weight of the KL term in the reward.
        entropy_coefficient: Weight of the entropy bonus.
        discriminator_updates: Updates of the discriminator in a round; 0: it does not learn.
        take_snapshot: Whether a snapshot of the generator is taken as the phase begins.
        judge_from_generator: Whether the discriminator starts anew from the generator's adapter as the phase begins.
    """

    start: int
    supervised_weight: float | None = None
    policy_weight: float | None = None
    adversarial_weight: float | None = None
    coupled_weight: float | None = None
    kl_coefficient: float | None = None
    kl_penalty: float | None = None
    entropy_coefficient: float | None = None
    discriminator_updates: int | None = None
    take_snapshot: bool = False
    judge_from_generator: bool = False


EVENTS = ("start", "take_snapshot", "judge_from_generator")


class Curriculum(L.Callback):
    """Turns the module's knobs at the first round of each phase.

    Args:
        phases: The phases, by their first rounds.
    """

    def __init__(self, phases: list[Phase]) -> None:
        starts = [phase.start for phase in phases]
        if starts != sorted(set(starts)) or (starts and starts[0] < 0):
            raise LoraGANError(f"phases must start at growing rounds from 0 on, got {starts}")
        self.phases = phases
        self.begun: list[Phase] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Phases that are over cannot be changed any more."""
        due = [phase for phase in self.phases if phase.start < trainer.global_step]
        if self.begun != due:
            raise LoraGANError(
                f"round {trainer.global_step} was reached with the phases {self.begun}, and the configuration now says "
                f"{due}: leave phases that have begun as they were, and change those to come or the module's settings"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LoraGANModule)
        for phase in self.phases:
            if phase.start == trainer.global_step:
                self._begin(phase, pl_module)
                self.begun = [*(earlier for earlier in self.begun if earlier.start < phase.start), phase]

    def _begin(self, phase: Phase, module: LoraGANModule) -> None:
        settings = {f.name: getattr(phase, f.name) for f in fields(phase) if f.name not in EVENTS}
        module.knobs.set(**{name: value for name, value in settings.items() if value is not None})
        if phase.take_snapshot:
            module.backbone.take_snapshot()
        if phase.judge_from_generator:
            module.discriminator.judge.start_from_generator(module.backbone)

    def state_dict(self) -> dict[str, Any]:
        return {"begun": [asdict(phase) for phase in self.begun]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.begun = [Phase(**phase) for phase in state_dict["begun"]]


class EasyFirst(L.Callback):
    """Example curriculum: the generator learns from the prompts whose answers the discriminator likes best, then all.

    The share of each batch's prompts that count, the knob ``easiest_share``, grows along a straight line to 1. It acts
    in rounds in which the discriminator takes part.

    Args:
        first: Share at round ``start``.
        start: First round of the curriculum.
        end: Round from which all prompts count.
    """

    def __init__(self, first: float = 0.5, start: int = 0, end: int = 200) -> None:
        if not 0 < first <= 1 or not 0 <= start < end:
            raise LoraGANError(f"need first in (0, 1] and 0 <= start < end; got {first}, rounds {start} to {end}")
        self.first, self.start, self.end = first, start, end

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, LoraGANModule)
        share = min(max((trainer.global_step - self.start) / (self.end - self.start), 0.0), 1.0)
        pl_module.knobs.set(easiest_share=self.first + share * (1 - self.first))
