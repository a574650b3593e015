"""The typed base of callbacks that follow training steps, and what they can rely on in a module."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import lightning as L
import torch

from lora_gan.backbone import Backbone
from lora_gan.coefficients import CoefficientState
from lora_gan.discriminator import Discriminator
from lora_gan.errors import LoraGANError
from lora_gan.generator import Generator
from lora_gan.optimization import Optimization
from lora_gan.rewards import Reward
from lora_gan.types import PromptBatch, StepOutput

OUTPUT = "output"  # where ``training_step`` returns its StepOutput: Lightning takes a dictionary


class StepModule(L.LightningModule):
    """A module of these parts, whose ``training_step`` returns ``{OUTPUT: StepOutput}``."""

    base: str  # as it was given: "builtin", a hub id or a folder
    backbone: Backbone
    generator: Generator
    discriminator: Discriminator
    coefficients: CoefficientState
    rewards: list[Reward]
    optimization: Optimization
    waits_for_device: bool = False  # whether the clock waits until a GPU has done what it was given; slower

    def clock(self) -> float:
        """Seconds, for the time that parts of a step take."""
        if self.waits_for_device and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()


class StepCallback(L.Callback):
    """Called before and after each training step of a :class:`StepModule`."""

    sets_baseline: bool = False  # True: it sets the coefficient ``baseline``, so the module adds no moving average

    def before_step(self, trainer: L.Trainer, module: StepModule, batch: PromptBatch) -> None:
        """Before the step, whose number is ``trainer.global_step``."""

    def after_step(self, trainer: L.Trainer, module: StepModule, output: StepOutput, batch: PromptBatch) -> None:
        """After the step; ``trainer.global_step`` counts it."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.before_step(trainer, step_module(pl_module, self), batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        module = step_module(pl_module, self)
        output: StepOutput = outputs[OUTPUT]
        self.after_step(trainer, module, output, output.batch or batch)


def step_module(module: L.LightningModule, callback: L.Callback) -> StepModule:
    """``module``, checked.

    Raises:
        LoraGANError: It is another kind of module.
    """
    if not isinstance(module, StepModule):
        raise LoraGANError(f"{type(callback).__name__} needs a LoraGANModule, got a {type(module).__name__}")
    return module
