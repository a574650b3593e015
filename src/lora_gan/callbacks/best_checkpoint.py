"""Best checkpoint: the state of a run at its best validation, by a metric that fits the data."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lora_gan.callbacks.last_checkpoint import run_folder
from lora_gan.checkpointing.state import Checkpointed
from lora_gan.errors import LoraGANError

log = logging.getLogger("lora_gan")

AUTO = "auto"
ANSWER, EXACT, REWARD, LOSS = "text/answer", "text/exact_match", "text/reward", "validation/loss"
MATCHED = 0.1  # from this share on, exact match tells checkpoints apart
NOTED = ("first", "before", "moved", "validations", "mode")  # besides the state of a ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """Keeps the state at the best validation as ``checkpoints/best-<step>.ckpt`` in the run's folder.

    By default the metric depends on the data: the share of right final answers, once one is right; else exact match,
    once a tenth of the completions match their targets. Until then, and so for free text, it is the reward if the
    policy learns from rewards, or else the loss of the held-out targets. As long as the metric has the same value in
    all validations, it says nothing, and the newest state is kept; later the first of equally good ones.

    Args:
        monitor: A logged metric, such as ``text/rouge_l``; "auto" chooses as described.
        mode: Whether a good value of a given monitor is large ("max") or small ("min").
        filename: Name of the file without its ending.
        dirpath: Folder of the file instead of that in the run's folder.
    """

    def __init__(
        self, monitor: str = AUTO, mode: str = "max", filename: str = "best-{step}", dirpath: str | None = None
    ) -> None:
        if mode not in ("max", "min"):
            raise LoraGANError(f"mode must be max or min, got {mode!r}")
        super().__init__(
            dirpath, filename, monitor, mode=mode, auto_insert_metric_name=False, enable_version_counter=False
        )
        self.given = monitor
        self.first: float | None = None  # value of the metric in the first validation
        self.before: dict[str, float] = {}  # values of possible metrics before training
        self.moved = False  # whether there were different values
        self.validations = 0
        self.fits = True  # whether there is a best to look for, unlike in a test or a prediction

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(run_folder(trainer) / "checkpoints")
        super().setup(trainer, pl_module, stage)
        self.fits = stage == "fit"

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}{{'filename': {self.filename!r}}}"

    # validation

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self.given == AUTO:
            self._watch(self._fitting_metric(trainer, pl_module))
        if self.monitor is not None:
            self._note(self._value(trainer))
        if trainer.global_step == 0:
            possible = (ANSWER, EXACT, REWARD, LOSS, self.monitor)
            self.before = {name: float(value) for name, value in trainer.callback_metrics.items() if name in possible}
        super().on_validation_end(trainer, pl_module)

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        return current is not None and (not self.moved or super().check_monitor_top_k(trainer, current))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.validations > 1 and not self.moved:
            log.warning(
                "%s was %.3f in all %d validations, so the newest checkpoint counts as the best; to choose by another "
                "metric, set the monitor of BestCheckpoint",
                self.monitor,
                self.first,
                self.validations,
            )

    def _fitting_metric(self, trainer: L.Trainer, module: L.LightningModule) -> str | None:
        """The metric that fits the data and what the run learns from; None if nothing suitable was logged."""
        logged = trainer.callback_metrics
        answer = self.monitor == ANSWER or float(logged.get(ANSWER, 0.0)) > 0
        exact = self.monitor == EXACT or float(logged.get(EXACT, 0.0)) >= MATCHED
        wanted = [ANSWER] * answer + [EXACT] * exact + [REWARD] * _learns_from_rewards(module) + [LOSS, REWARD]
        return next((name for name in wanted if name in logged), None)

    def _watch(self, monitor: str | None) -> None:
        """Follow a metric; if it is another one than before, whatever comes next replaces the best so far."""
        if monitor == self.monitor:
            return
        self.first, self.moved, self.validations = None, self.monitor != AUTO, 0
        self.monitor, self.mode = monitor, "min" if monitor == LOSS else "max"
        worst = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        self.best_k_models = dict.fromkeys(self.best_k_models, worst)
        self.kth_value = worst

    def _value(self, trainer: L.Trainer) -> float:
        if self.monitor not in trainer.callback_metrics:
            names = ", ".join(sorted(trainer.callback_metrics))
            raise LoraGANError(
                f"metric {self.monitor!r}, the monitor of BestCheckpoint, was not logged; available: {names}"
            )
        return float(trainer.callback_metrics[self.monitor])

    def _note(self, value: float) -> None:
        """Keep whether the metric moves."""
        self.first = value if self.first is None else self.first
        self.moved |= value != self.first
        self.validations += 1

    # resume

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **{name: getattr(self, name) for name in NOTED}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the search for the best, if the best so far is a file of this run, wherever its folder is now."""
        if not self.fits:
            return
        if self.given != AUTO and (self.monitor, self.mode) != (state_dict["monitor"], state_dict["mode"]):
            log.info("the best was chosen by %s, now by %s: from here on", state_dict["monitor"], self.monitor)
            return
        paths = [path for path in state_dict["best_k_models"] if path]
        moved = {path: os.path.join(str(self.dirpath), Path(path).name) for path in paths}
        lost = [path for path, here in moved.items() if not Path(here).is_file()]
        if lost:
            log.info("%s is not in the folder of this run: the best is looked for from here on", Path(lost[0]).name)
            return
        moved[""] = ""
        super().load_state_dict(
            {
                **state_dict,
                "dirpath": self.dirpath,
                "best_k_models": {moved[path]: score for path, score in state_dict["best_k_models"].items()},
                "best_model_path": moved[state_dict["best_model_path"]],
                "kth_best_model_path": moved[state_dict["kth_best_model_path"]],
            }
        )
        self.monitor = state_dict["monitor"]
        for name in NOTED:
            setattr(self, name, state_dict[name])


def _learns_from_rewards(module: L.LightningModule) -> bool:
    """Whether rewards, and not only targets, decide what the policy learns."""
    if not isinstance(module, Checkpointed):
        return False
    return bool(module.configured_coefficients.policy) and any(reward.weight for reward in module.rewards)
