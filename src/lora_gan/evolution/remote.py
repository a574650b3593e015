"""Remote workers: a process with a module of the same settings that runs tasks, sent and returned as bytes."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch

from lora_gan.backbone import DISCRIMINATOR, GENERATOR
from lora_gan.data.templates import PromptFormat
from lora_gan.evolution.tasks import MemberModule, Task
from lora_gan.step_callback import OUTPUT
from lora_gan.stepper import Stepper


class Worker(MemberModule):
    """Runs each task as a step of its trainer, with that trainer's precision, optimizers and hooks."""

    def training_step(self, task: Task[Any], batch_idx: int) -> dict[str, Any]:  # type: ignore[override]
        with self.optimization.counted():
            return {OUTPUT: task(self)}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch

    def configure_callbacks(self) -> list[L.Callback]:
        """None: callbacks run in the main process only."""
        return []


@dataclass(frozen=True)
class WorkerSpec:
    """Settings of a worker."""

    settings: Mapping[str, Any]  # of the module
    device: str  # "cpu" or "cuda"
    precision: Any  # of the run's trainer
    threads: int  # torch threads; the last bits of sums depend on it
    prompts: PromptFormat  # which says how completions end

    @classmethod
    def like(cls, module: MemberModule, device: str) -> WorkerSpec:
        """Settings of a worker for ``module``, computing on ``device``."""
        settings = {  # without adapters: tasks carry the weights
            **module.settings,
            "backbone": module.backbone.settings,  # with the data type that this process found
            GENERATOR: replace(module.generator.settings, adapter=None),
            DISCRIMINATOR: replace(module.discriminator.settings, adapter=None),
        }
        return cls(settings, device, module.trainer.precision, torch.get_num_threads(), module.prompts)


class WorkerActor:
    """A worker in its own process.

    Args:
        spec: A :class:`WorkerSpec` as bytes.
    """

    def __init__(self, spec: bytes) -> None:
        self._spec = spec

    def open(self) -> None:
        """Build the worker.

        Raises:
            LoraGANError: A setting refers to something missing on this machine.
        """
        spec: WorkerSpec = from_bytes(self._spec, "cpu")
        torch.set_num_threads(spec.threads)
        worker = Worker(**spec.settings)
        worker.prompts = spec.prompts
        self._stepper = Stepper(worker, torch.device(spec.device), spec.precision)

    def run(self, task: bytes, global_step: int) -> bytes:
        """The result of a task, both as bytes.

        Args:
            task: The task.
            global_step: Step of the run, for messages.
        """
        self._stepper.global_step = global_step
        return to_bytes(self._stepper.step(from_bytes(task, self._stepper.module.device)))


def to_bytes(value: object, pickler: Any = pickle) -> bytes:
    """The value as bytes; its tensors may be on any device."""
    file = io.BytesIO()
    torch.save(value, file, pickle_module=pickler)
    return file.getvalue()


def from_bytes(data: bytes, device: torch.device | str) -> Any:
    """The inverse of :func:`to_bytes`, its tensors on ``device``."""
    return torch.load(io.BytesIO(data), map_location=device, weights_only=False)
