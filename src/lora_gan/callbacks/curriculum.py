"""Curriculum: phases of a run, such as a warm-up before adversarial training, and easy examples first."""

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
    """Changes at one step; whatever is not given stays the same.

    Args:
        start: First step of the phase, from 0.
        coefficients: New values of some of the :class:`~lora_gan.coefficients.Coefficients`, by name.
        take_snapshot: Whether to take a snapshot of the generator at the start.
        discriminator_from_generator: Whether to replace the discriminator's adapter by a copy of the generator's.
    """

    start: int
    coefficients: dict[str, float] = field(default_factory=dict)
    take_snapshot: bool = False
    discriminator_from_generator: bool = False

    def __post_init__(self) -> None:
        for name in self.coefficients:
            if name not in NAMES:
                raise LoraGANError(f"a phase cannot set {name!r}; choose from {', '.join(NAMES)}")
        Coefficients(**self.coefficients)  # type: ignore[arg-type]  # checks the values


class Curriculum(StepCallback):
    """Sets the module's coefficients at the first step of each phase.

    Args:
        phases: The phases, in the order of their first steps.
    """

    def __init__(self, phases: list[Phase]) -> None:
        starts = [phase.start for phase in phases]
        if starts != sorted(set(starts)) or (starts and starts[0] < 0):
            raise LoraGANError(f"phases must start at increasing steps >= 0, got {starts}")
        self.phases = phases
        self.begun: list[Phase] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that phases that have begun are unchanged after a resume.

        Raises:
            LoraGANError: One of them differs.
        """
        due = [phase for phase in self.phases if phase.start < trainer.global_step]
        if self.begun != due:
            raise LoraGANError(
                f"step {trainer.global_step} was reached with the phases {self.begun}, but the configuration now has "
                f"{due}: keep phases that have begun unchanged, and edit later phases or the module's settings"
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
    """Example curriculum: first the prompts whose completions the discriminator scores highest, then all.

    The coefficient ``easiest_share``, the share of each batch's prompts that the generator learns from, grows linearly
    to 1. It has an effect in steps in which the discriminator scores completions.

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
