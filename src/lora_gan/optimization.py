"""Manual optimization: backward, accumulation, clipping, schedules, and the count of training steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lora_gan.errors import LoraGANError, NonFiniteError
from lora_gan.lightning_compat import count_one_step


def adamw(parameters: Iterable[nn.Parameter]) -> AdamW:
    """The default optimizer of both roles; a function with a name, so that a saved configuration can refer to it."""
    return AdamW(parameters, lr=1e-3, weight_decay=0.0)


class RoleSettings(Protocol):
    """How one role, generator or discriminator, is optimized."""

    @property
    def optimizer(self) -> OptimizerCallable:
        """Makes its optimizer."""

    @property
    def scheduler(self) -> LRSchedulerCallable | None:
        """Makes its learning-rate schedule."""


@dataclass(frozen=True)
class OptimizationSettings:
    """What both optimizers share.

    Args:
        max_grad_norm: Largest norm of a role's gradient; larger ones are scaled down to it.
        gradient_accumulation_steps: Training steps whose gradients are averaged into one step of both optimizers.
    """

    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1

    def __post_init__(self) -> None:
        if self.max_grad_norm <= 0:
            raise LoraGANError(f"max_grad_norm must be > 0, got {self.max_grad_norm}; a large one, 1e9, never clips")
        if self.gradient_accumulation_steps < 1:
            raise LoraGANError(
                f"gradient_accumulation_steps must be at least 1, got {self.gradient_accumulation_steps}"
            )


class Optimization:
    """The optimizers and schedules of a LightningModule with two roles.

    Args:
        module: Its trainer makes the optimizers from what :meth:`configure` returns.
        roles: Optimizer and schedule by role, in the order of the optimizers.
        settings: What they share.
    """

    def __init__(
        self, module: L.LightningModule, roles: Mapping[str, RoleSettings], settings: OptimizationSettings
    ) -> None:
        self.module = module
        self.roles = roles
        self.settings = settings
        self._stepped: set[str] = set()

    @property
    def accumulating(self) -> bool:
        """Whether this training step only adds to the gradients."""
        return bool((self.module.trainer.global_step + 1) % self.settings.gradient_accumulation_steps)

    def configure(self, parameters: Mapping[str, Sequence[nn.Parameter]]) -> tuple[list[Optimizer], list[Any]]:
        """The optimizers and the schedules, for ``configure_optimizers``."""
        self._stepped = set()
        optimizers = {role: settings.optimizer(parameters[role]) for role, settings in self.roles.items()}
        schedulers = [s.scheduler(optimizers[role]) for role, s in self.roles.items() if s.scheduler is not None]
        return list(optimizers.values()), schedulers

    def optimizer(self, role: str) -> Optimizer:
        """A role's optimizer."""
        return self.module.trainer.optimizers[list(self.roles).index(role)]

    def scheduler(self, role: str) -> Any:
        """A role's learning-rate schedule; None where it has none."""
        scheduled = [name for name, settings in self.roles.items() if settings.scheduler is not None]
        configs = self.module.trainer.lr_scheduler_configs
        return configs[scheduled.index(role)].scheduler if role in scheduled else None

    def step(self, role: str, terms: Mapping[str, Tensor]) -> None:
        """Backward over the sum of the terms and, when the accumulation is full, an optimizer step.

        The caller is inside the role's mode.

        Raises:
            NonFiniteError: A term is infinite or not a number; nothing was changed.
        """
        for name, term in terms.items():
            if not term.isfinite():
                raise NonFiniteError(self._stopped(f"loss/{name} is {term.item()}"))
        loss = torch.stack(list(terms.values())).sum() / self.settings.gradient_accumulation_steps
        self.module.manual_backward(loss)
        if self.accumulating:
            return
        optimizer = self.module.optimizers()[list(self.roles).index(role)]  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()
        self._stepped.add(role)

    def step_schedulers(self) -> None:
        """Once per training step for each role whose optimizer took a step."""
        for role in self._stepped:
            if (scheduler := self.scheduler(role)) is not None:
                scheduler.step()
        self._stepped.clear()

    def clip(self, optimizer: Optimizer) -> None:
        """Clip one role's gradient, for ``on_before_optimizer_step``: fp16 gradients are unscaled by then."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        skipped = self.module.trainer.precision == "16-mixed"  # which leaves such steps out and lowers its scale
        if not norm.isfinite() and not skipped:
            raise NonFiniteError(self._stopped(f"the gradient's norm is {norm.item()}"))

    def counted(self) -> AbstractContextManager[None]:
        """Within it ``trainer.global_step`` grows by one."""
        return count_one_step(self.module.trainer, self.module.optimizers())  # type: ignore[arg-type]

    def _stopped(self, what: str) -> str:
        trainer = self.module.trainer
        best = (
            trainer.checkpoint_callback.best_model_path
            if isinstance(trainer.checkpoint_callback, L.pytorch.callbacks.ModelCheckpoint)
            else ""
        )
        return (
            f"{what} in step {trainer.global_step}; the optimizer step was not taken. "
            f"Lower the learning rate or check the rewards; last good checkpoint: {best or 'none yet'}"
        )
