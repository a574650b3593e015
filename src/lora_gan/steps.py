"""Training steps of a module one at a time, each as a trainer plays it in a fit."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader, Dataset

from lora_gan.checkpoints import Checkpointed


class Steps:
    """A module with a trainer of its own; n steps do what n rounds of a fit on the same batches do.

    Args:
        module: It stays on the device and keeps its optimizers from one step to the next.
        device: Where it computes.
        precision: Lightning's number format of the computation, "32-true" or "bf16-mixed" say.
        callbacks: Callbacks of the trainer.
    """

    def __init__(
        self,
        module: Checkpointed,
        device: torch.device,
        precision: Any = "32-true",
        callbacks: Sequence[L.Callback] = (),
    ) -> None:
        self.module = module
        self._one = _OneStep()
        with _quiet():
            self.trainer = L.Trainer(
                accelerator=device.type,
                devices=[device.index or 0] if device.type == "cuda" else 1,
                strategy=_Staying(device),
                precision=precision,
                callbacks=[*callbacks, self._one],
                max_epochs=-1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
        self._fit()

    def play(self, batch: Any) -> Mapping[str, Any]:
        """One step on a batch; what ``training_step`` returned."""
        self._fit(batch)
        return self.report

    @property
    def report(self) -> Mapping[str, Any]:
        """What the last step returned."""
        return self._one.report

    @property
    def rounds(self) -> int:
        """How many were played, ``trainer.global_step``."""
        return self.trainer.global_step

    @rounds.setter
    def rounds(self, rounds: int) -> None:
        counted = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
        counted.ready = counted.completed = rounds

    def _fit(self, *batches: Any) -> None:
        """Without batches it only makes the optimizers."""
        batches_only = cast(Dataset[Any], batches)
        with _quiet():
            self.trainer.fit(self.module, DataLoader(batches_only, batch_size=None, generator=torch.Generator()))


class _OneStep(L.Callback):
    """Ends a fit after one step; keeps its report and, for the next one, the gradients that it accumulated."""

    report: Mapping[str, Any]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.report = outputs
        assert isinstance(pl_module, Checkpointed)
        pl_module.accumulated = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        trainer.should_stop = True


class _Staying(SingleDeviceStrategy):
    """Between two fits, the module stays on its device and the optimizers stay the same."""

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        if not self.optimizers:
            super().setup_optimizers(trainer)

    def teardown(self) -> None:
        pass


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the trainer's own remarks, which it would make at every step."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        log.setLevel(level)
