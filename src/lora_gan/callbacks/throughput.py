"""Throughput of a run, and the time of its phases."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import lightning as L

from lora_gan.step_callback import StepCallback, StepModule, step_module
from lora_gan.types import PromptBatch, StepOutput

log = logging.getLogger("lora_gan")


class Throughput(StepCallback):
    """Logs sampled completions and tokens per second, and the share of each phase in the time of a step.

    ``speed/completions``, ``speed/tokens`` and ``speed/step`` (seconds) in each step, and ``speed/share_<phase>`` if
    the module times its phases. The totals of a run are logged at its end and continue after a resume. Validation and
    the wait for data do not count; each device counts its own completions. A GPU works while the program goes on, so
    the clock waits for it at the borders of the phases; without this callback nothing does.
    """

    def __init__(self) -> None:
        self.totals = {"steps": 0.0, "completions": 0.0, "tokens": 0.0, "seconds": 0.0}
        self.phases: dict[str, float] = {}
        self._started = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        step_module(pl_module, self).waits_for_device = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        step_module(pl_module, self).waits_for_device = False

    def before_step(self, trainer: L.Trainer, module: StepModule, batch: PromptBatch) -> None:
        self._started = module.clock()

    def after_step(self, trainer: L.Trainer, module: StepModule, output: StepOutput, batch: PromptBatch) -> None:
        rollout, phases = output.rollout, output.seconds
        seconds = max(module.clock() - self._started, 1e-9)
        tokens = int(rollout.mask.sum())
        self._add(len(rollout), tokens, seconds, phases)
        metrics = {"step": seconds, "completions": len(rollout) / seconds, "tokens": tokens / seconds}
        metrics |= {f"share_{name}": spent / seconds for name, spent in phases.items()}
        module.log_dict({f"speed/{name}": float(value) for name, value in metrics.items()}, batch_size=1)

    def _add(self, completions: int, tokens: int, seconds: float, phases: Mapping[str, float]) -> None:
        for name, value in {"steps": 1, "completions": completions, "tokens": tokens, "seconds": seconds}.items():
            self.totals[name] += value
        for name, spent in phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + spent

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.totals["steps"] and trainer.is_global_zero:
            log.info(self.summary())

    def summary(self) -> str:
        """Speed of the run so far, in one line."""
        steps, completions, tokens, seconds = (
            self.totals[name] for name in ("steps", "completions", "tokens", "seconds")
        )
        speed = f"{completions / seconds:.1f} completions/s, {tokens / seconds:.0f} tokens/s"
        line = f"{steps:.0f} steps in {seconds:.1f} s: {speed}"
        shares = ", ".join(f"{name} {spent / seconds:.0%}" for name, spent in self.phases.items())
        return f"{line}; {shares}" if shares else line

    def state_dict(self) -> dict[str, Any]:
        return {"totals": dict(self.totals), "phases": dict(self.phases)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.totals = dict(state_dict["totals"])
        self.phases = dict(state_dict["phases"])
