"""Stepper: runs single training steps of a module with the results of a fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader, Dataset

from lora_gan.checkpointing.state import Checkpointed
from lora_gan.lightning_compat import set_global_step
from lora_gan.number_formats import auto_precision, use_tensor_cores
from lora_gan.program import errors_alone
from lora_gan.step_callback import OUTPUT


class Stepper:
    """A module with its own trainer; n steps do the same as n steps of a fit on the same batches.

    Args:
        module: The module; it stays on the device and keeps its optimizers between steps.
        device: Device of the computation.
        precision: Lightning's ``precision``, such as "32-true"; None: bf16-mixed on a GPU that computes in it.
        callbacks: Callbacks of the trainer.
    """

    def __init__(
        self,
        module: Checkpointed,
        device: torch.device,
        precision: Any = None,
        callbacks: Sequence[L.Callback] = (),
    ) -> None:
        self.module = module
        self._one = _OneStep()
        use_tensor_cores(device)
        with _quiet():
            self.trainer = L.Trainer(
                accelerator=device.type,
                devices=[device.index or 0] if device.type == "cuda" else 1,
                strategy=_PersistentDevice(device),
                precision=precision or auto_precision(device),
                callbacks=[*callbacks, self._one],
                max_epochs=-1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
        self._fit()

    def step(self, batch: Any) -> Any:
        """Run one step on a batch; returns its output."""
        self._fit(batch)
        return self._one.output

    @property
    def global_step(self) -> int:
        """Number of steps so far, ``trainer.global_step``."""
        return self.trainer.global_step

    @global_step.setter
    def global_step(self, step: int) -> None:
        set_global_step(self.trainer, step)

    def _fit(self, *batches: Any) -> None:
        """Fit for one step on a batch; without a batch, only make the optimizers."""
        batches_only = cast(Dataset[Any], batches)
        with _quiet():
            self.trainer.fit(self.module, DataLoader(batches_only, batch_size=None, generator=torch.Generator()))


class _OneStep(L.Callback):
    """Ends a fit after one step and keeps its output."""

    output: Any

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.output = outputs[OUTPUT]
        trainer.should_stop = True


class _PersistentDevice(SingleDeviceStrategy):
    """Keeps the module on its device and the same optimizers between two fits."""

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        if not self.optimizers:
            super().setup_optimizers(trainer)

    def teardown(self) -> None:
        pass


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the trainer's messages, which would repeat at every step."""
    with errors_alone("lightning.pytorch"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield
