"""Adapter checkpoints, written during a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lora_gan.callbacks.last_checkpoint import run_folder
from lora_gan.checkpointing.adapters import ROLES, keep_newest, write_roles
from lora_gan.errors import LoraGANError
from lora_gan.step_callback import StepCallback, StepModule, step_module
from lora_gan.types import PromptBatch, StepOutput


class AdapterCheckpoints(StepCallback):
    """Writes ``checkpoints/step-<step>/{generator,discriminator}`` in the run's folder, each a PEFT adapter.

    Each holds ``adapter_config.json``, ``adapter_model.safetensors`` and ``optimizer.pt``, that of the discriminator
    also ``head.pt``. Another run can start from it, by the settings ``generator.adapter`` and
    ``discriminator.adapter``.

    Args:
        every_n_steps: Steps between two checkpoints.
        keep_last: Number of checkpoints to keep; 0 keeps all.
        monitor: A logged metric, such as ``text/rouge_l``: ``checkpoints/best`` holds the adapters of the validation
            with its best value.
        mode: Whether a good metric is large ("max") or small ("min").
    """

    def __init__(
        self, every_n_steps: int = 100, keep_last: int = 3, monitor: str | None = None, mode: str = "max"
    ) -> None:
        if every_n_steps < 1 or keep_last < 0:
            raise LoraGANError(f"need every_n_steps >= 1 and keep_last >= 0, got {every_n_steps} and {keep_last}")
        if mode not in ("max", "min"):
            raise LoraGANError(f"mode must be max or min, got {mode!r}")
        self.every_n_steps = every_n_steps
        self.keep_last = keep_last
        self.monitor = monitor
        self.sign = 1.0 if mode == "max" else -1.0
        self.best = -math.inf

    def after_step(self, trainer: L.Trainer, module: StepModule, output: StepOutput, batch: PromptBatch) -> None:
        if trainer.global_step % self.every_n_steps:
            return
        folder = self._write(trainer, module, f"step-{trainer.global_step}")
        if trainer.is_global_zero:
            keep_newest(folder.parent, "step-", self.keep_last)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if trainer.global_step == 0:  # not trained yet
            return
        if self.monitor not in trainer.callback_metrics:
            names = ", ".join(sorted(trainer.callback_metrics))
            raise LoraGANError(
                f"metric {self.monitor!r}, the monitor of AdapterCheckpoints, was not logged; available: {names}"
            )
        value = self.sign * float(trainer.callback_metrics[self.monitor])
        if value > self.best:
            self.best = value
            self._write(trainer, step_module(pl_module, self), "best")

    def _write(self, trainer: L.Trainer, module: StepModule, name: str) -> Path:
        folder = run_folder(trainer) / "checkpoints" / name
        if trainer.is_global_zero:
            write_roles(module, folder, dict(zip(ROLES, trainer.optimizers, strict=True)))
        return folder

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
