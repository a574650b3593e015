"""How fast a run is, and where its time goes."""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning as L

from lora_gan.callbacks.collapse import last_rollout

log = logging.getLogger("lora_gan")


class Throughput(L.Callback):
    """Logs sampled answers and tokens a second and, of the module's phases, their shares of the round.

    ``speed/answers``, ``speed/tokens`` and ``speed/round`` (seconds) of each round; ``speed/share_<phase>`` where the
    module times its phases. The totals of a run are told at its end, and go on after a resume. Validation and the wait
    for data do not count; of several devices each counts its own.
    """

    def __init__(self) -> None:
        self.totals = {"rounds": 0.0, "answers": 0.0, "tokens": 0.0, "seconds": 0.0}
        self.phases: dict[str, float] = {}
        self._started = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rollout = last_rollout(pl_module, type(self).__name__)
        tokens = int(rollout.mask.sum())  # waits for the device, so the clock is read after it
        seconds = max(time.perf_counter() - self._started, 1e-9)
        phases: dict[str, float] = dict(getattr(pl_module, "phase_seconds", {}))
        self._add(len(rollout), tokens, seconds, phases)
        metrics = {"round": seconds, "answers": len(rollout) / seconds, "tokens": tokens / seconds}
        metrics |= {f"share_{name}": spent / seconds for name, spent in phases.items()}
        pl_module.log_dict({f"speed/{name}": float(value) for name, value in metrics.items()}, batch_size=1)

    def _add(self, answers: int, tokens: int, seconds: float, phases: dict[str, float]) -> None:
        for name, value in {"rounds": 1, "answers": answers, "tokens": tokens, "seconds": seconds}.items():
            self.totals[name] += value
        for name, spent in phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + spent

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.totals["rounds"] and trainer.is_global_zero:
            log.info(self.summary())

    def summary(self) -> str:
        """One line about the run so far."""
        rounds, answers, tokens, seconds = (self.totals[name] for name in ("rounds", "answers", "tokens", "seconds"))
        speed = f"{answers / seconds:.1f} answers/s, {tokens / seconds:.0f} tokens/s"
        line = f"{rounds:.0f} rounds in {seconds:.1f} s: {speed}"
        shares = ", ".join(f"{name} {spent / seconds:.0%}" for name, spent in self.phases.items())
        return f"{line}; {shares}" if shares else line

    def state_dict(self) -> dict[str, Any]:
        return {"totals": dict(self.totals), "phases": dict(self.phases)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.totals = dict(state_dict["totals"])
        self.phases = dict(state_dict["phases"])
