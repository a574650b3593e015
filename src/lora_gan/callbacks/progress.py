"""Progress bar that counts steps."""

from __future__ import annotations

import math

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class StepProgressBar(TQDMProgressBar):
    """One bar over all steps of a fit, not one per epoch, with reward and losses.

    The time left and the rate count the steps of this fit, over its epochs and without those before a resume. A step
    that takes longer than a second is shown as seconds per step.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

    def init_train_tqdm(self) -> Tqdm:
        bar = super().init_train_tqdm()
        bar.unit = "step"
        return bar

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        bar: Tqdm = self.train_progress_bar
        bar.total = total_steps(trainer)
        bar.initial = bar.n = bar.last_print_n = trainer.global_step
        bar.set_description("steps")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The bar goes on; Lightning's would begin anew."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.train_progress_bar.update(trainer.global_step - self.train_progress_bar.n)
        self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Reward and losses, without the logger's version."""
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}


def total_steps(trainer: L.Trainer) -> int | None:
    """The step at which the fit ends, by ``max_steps`` or ``max_epochs``; None where neither says so."""
    ends = [math.inf]
    if trainer.max_steps > 0:
        ends.append(trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        ends.append(trainer.max_epochs * trainer.num_training_batches)
    end = min(ends)
    return None if math.isinf(end) else int(end)
