"""Phases of a run: warm up, then mix."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import lightning as L

from lora_gan.coefficients import NAMES, Coefficients
from lora_gan.errors import LoraGANError
from lora_gan.step_callback import StepCallback, StepModule
from lora_gan.types import PromptBatch


@dataclass(frozen=True)
class Phase:
    """What changes at one step; what is not given stays as it was.

    Args:
        start: First step of the phase, from 0.
        coefficients: New values of some of the :class:`~lora_gan.coefficients.Coefficients`, by name.
        take_snapshot: Whether a snapshot of the generator is taken as the phase begins.
        discriminator_from_generator: Whether the discriminator starts anew from the generator's adapter.
    """

    start: int
    coefficients: dict[str, float] = field(default_factory=dict)
    take_snapshot: bool = False
    discriminator_from_generator: bool = False

    def __post_init__(self) -> None:
        for name in self.coefficients:
            if name not in NAMES:
                raise LoraGANError(f"a phase cannot set {name!r}; its coefficients are {', '.join(NAMES)}")
        Coefficients(**self.coefficients)  # type: ignore[arg-type]  # checks the values


class Curriculum(StepCallback):
    """Turns the module's coefficients at the first step of each phase.

    Args:
        phases: The phases, by their first steps.
    """

    def __init__(self, phases: list[Phase]) -> None:
        starts = [phase.start for phase in phases]
        if starts != sorted(set(starts)) or (starts and starts[0] < 0):
            raise LoraGANError(f"phases must start at growing steps from 0 on, got {starts}")
        self.phases = phases
        self.begun: list[Phase] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Phases that are over cannot be changed any more."""
        due = [phase for phase in self.phases if phase.start < trainer.global_step]
        if self.begun != due:
            raise LoraGANError(
                f"step {trainer.global_step} was reached with the phases {self.begun}, and the configuration now says "
                f"{due}: leave phases that have begun as they were, and change those to come or the module's settings"
            )

    def before_step(self, trainer: L.Trainer, module: StepModule, batch: PromptBatch) -> None:
        for phase in self.phases:
            if phase.start == trainer.global_step:
                self._begin(phase, module)
                self.begun = [*(earlier for earlier in self.begun if earlier.start < phase.start), phase]

    def _begin(self, phase: Phase, module: StepModule) -> None:
        module.coefficients.set(**phase.coefficients)
        if phase.take_snapshot:
            module.backbone.take_snapshot()
        if phase.discriminator_from_generator:
            module.discriminator.model.start_from_generator(module.backbone)

    def state_dict(self) -> dict[str, Any]:
        return {"begun": [asdict(phase) for phase in self.begun]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.begun = [Phase(**phase) for phase in state_dict["begun"]]


class EasyFirst(StepCallback):
    """Example curriculum: the generator learns from the prompts whose completions the discriminator likes best, then
    all.

    The share of each batch's prompts that count, the coefficient ``easiest_share``, grows along a straight line to 1.
    It acts in steps in which the discriminator takes part.

    Args:
        first: Share at step ``start``.
        start: First step of the curriculum.
        end: Step from which all prompts count.
    """

    def __init__(self, first: float = 0.5, start: int = 0, end: int = 200) -> None:
        if not 0 < first <= 1 or not 0 <= start < end:
            raise LoraGANError(f"need first in (0, 1] and 0 <= start < end; got {first}, steps {start} to {end}")
        self.first, self.start, self.end = first, start, end

    def before_step(self, trainer: L.Trainer, module: StepModule, batch: PromptBatch) -> None:
        share = min(max((trainer.global_step - self.start) / (self.end - self.start), 0.0), 1.0)
        module.coefficients.set(easiest_share=self.first + share * (1 - self.first))
