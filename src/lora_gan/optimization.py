"""Manual optimization: backward passes, clipping, learning-rate schedules, and the count of training steps."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, SequentialLR
from torch.optim.lr_scheduler import ReduceLROnPlateau as Plateau

from lora_gan.distributed import gathered, several
from lora_gan.errors import LoraGANError, NonFiniteError
from lora_gan.lightning_compat import count_one_step, last_of_sequence, scales_gradients, unscales_itself

log = logging.getLogger("lora_gan")
Made = TypeVar("Made")


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
        micro_batch_size: Most prompts in one pass of the model, in training and for the loss in validation; null: all
            of the batch. An optimizer step is that of the whole batch, but takes less memory.
    """

    max_grad_norm: float = 1.0
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        if not self.max_grad_norm > 0:
            raise LoraGANError(f"max_grad_norm must be > 0, got {self.max_grad_norm}; a large one, 1e9, never clips")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise LoraGANError(
                f"micro_batch_size must be at least 1, got {self.micro_batch_size}; null is the whole batch"
            )


class WarmupSchedule(LRScheduler, ABC):
    """The learning rate rises linearly to the optimizer's, then falls to a floor at the end, and stays there.

    Steps are those in which the role learned. A resumed run may have another end: from the step that it has reached its
    rate follows the new schedule, but it does not rise again: it stays where it is until a longer one has fallen to it.

    Args:
        optimizer: The optimizer, at its full learning rate.
        warmup_steps: Steps before the full rate; the first of them has 1 / (warmup_steps + 1) of it.
        total_steps: Steps until the floor; null: all of the run, as many as ``trainer.max_steps``.
        floor: Rate at the end, as a share of the full one.

    Raises:
        LoraGANError: The numbers do not fit together.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 0, total_steps: int | None = None, floor: float = 0.0
    ) -> None:
        if warmup_steps < 0 or not 0 <= floor <= 1:
            raise LoraGANError(f"need warmup_steps >= 0 and floor in [0, 1], got {warmup_steps} and {floor}")
        if total_steps is not None and total_steps <= warmup_steps:
            raise LoraGANError(f"total_steps must be more than warmup_steps, got {total_steps} and {warmup_steps}")
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.floor = floor
        self.end: float = math.inf if total_steps is None else total_steps
        self.highest = 1.0  # share of the full rate above which it does not rise again
        super().__init__(optimizer)

    @abstractmethod
    def decayed(self, progress: float) -> float:
        """Share of the fall that is still ahead, from 1 at progress 0 to 0 at progress 1."""

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of the optimizer's groups at this step."""
        return [rate * self.share(self.last_epoch) for rate in self.base_lrs]

    def share(self, step: int) -> float:
        """Share of the full rate at a step."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / (self.end - self.warmup_steps))
        return min(self.highest, self.floor + (1 - self.floor) * self.decayed(progress))

    def end_at(self, end: float) -> None:
        """Move the end: that of the run, or of the settings of a resumed one.

        Raises:
            LoraGANError: There is none, it lies in the warm-up, or the rate had already fallen to 0 for good.
        """
        if not self.warmup_steps < end < math.inf:
            raise LoraGANError(
                f"{type(self).__name__} with warmup_steps: {self.warmup_steps} and total_steps: null needs a "
                f"trainer.max_steps above it, got {end if end < math.inf else 'none'}; set it, or total_steps"
            )
        if end > self.end and self.last_epoch >= self.warmup_steps:
            self._keep_low(end)
        self.end = end
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def _keep_low(self, end: float) -> None:
        """Before a later end: the rate stays where it is until the longer schedule has fallen to it."""
        self.highest = self.share(self.last_epoch)
        change = f"{type(self).__name__} ends at step {end:.0f} instead of {self.end:.0f}"
        if self.highest == 0:
            raise LoraGANError(
                f"{change}, but its learning rate has already fallen to 0, so nothing would be learned: set its floor, "
                f"the share of the full rate at which to go on, or {NEW_RUN}"
            )
        log.warning("%s: the learning rate does not rise above %.2g of the full one again", change, self.highest)

    def state_dict(self) -> dict[str, Any]:
        """The step and the end; what a resumed run may set otherwise is left out."""
        return {name: value for name, value in super().state_dict().items() if name not in ("total_steps", "floor")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step; the end is that of the settings or, where the schedule follows the run, of this run."""
        end = self.end
        super().load_state_dict(state_dict)
        if end < math.inf:
            self.end_at(end)


class WarmupCosine(WarmupSchedule):
    """Warm-up, then half a cosine (arXiv 1608.03983) down to a floor; its arguments are those of WarmupSchedule."""

    def decayed(self, progress: float) -> float:
        return (1 + math.cos(math.pi * progress)) / 2


class WarmupLinear(WarmupSchedule):
    """Warm-up, then a straight line down to a floor, 1 for a constant rate; arguments as in WarmupSchedule."""

    def decayed(self, progress: float) -> float:
        return 1 - progress


NEW_RUN = "start a new run from its adapters (generator.adapter, discriminator.adapter) with the schedule that you want"


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
        self.updates = dict.fromkeys(roles, 0)  # optimizer steps behind the present weights, by role
        self._stepped: set[str] = set()
        self._norms: dict[str, list[Tensor]] = {}  # of the gradients of this training step, by role

    def configure(self, parameters: Mapping[str, Sequence[nn.Parameter]]) -> tuple[list[Optimizer], list[Any]]:
        """The optimizers and the schedules, for ``configure_optimizers``."""
        self._stepped = set()
        optimizers = {
            role: made_by(f"{role}.optimizer", settings.optimizer, parameters[role])
            for role, settings in self.roles.items()
        }
        self._check_scaled(optimizers)
        schedulers = [
            made_by(f"{role}.scheduler", settings.scheduler, optimizers[role])
            for role, settings in self.roles.items()
            if settings.scheduler is not None
        ]
        return list(optimizers.values()), schedulers

    def _check_scaled(self, optimizers: Mapping[str, Optimizer]) -> None:
        """Refuse optimizers whose gradient would be clipped while it is still multiplied by the scale of 16-mixed."""
        for role, optimizer in optimizers.items():
            if scales_gradients(self.module.trainer) and unscales_itself(optimizer):
                raise LoraGANError(
                    f"{role}.optimizer: fused: true divides by the scale of trainer.precision 16-mixed itself, after "
                    "optimization.max_grad_norm has been applied; set fused: false, or trainer.precision to bf16-mixed"
                )

    def optimizer(self, role: str) -> Optimizer:
        """A role's optimizer."""
        return self.module.trainer.optimizers[list(self.roles).index(role)]

    def scheduler(self, role: str) -> Any:
        """A role's learning-rate schedule; None where it has none."""
        scheduled = [name for name, settings in self.roles.items() if settings.scheduler is not None]
        configs = self.module.trainer.lr_scheduler_configs
        return configs[scheduled.index(role)].scheduler if role in scheduled else None

    # steps

    def micro_batches(self, prompts: int) -> list[list[int]]:
        """Which of the prompts are in each forward and backward pass of one optimizer step.

        Every process has equally many passes, because they wait for each other; one of them may be empty.
        """
        return _split(prompts, max(gathered(self._passes(prompts))))

    def parts(self, prompts: int) -> list[list[int]]:
        """Which of the prompts are in each pass without gradient, for which no process waits."""
        return _split(prompts, self._passes(prompts))

    def _passes(self, prompts: int) -> int:
        return max(1, math.ceil(prompts / (self.settings.micro_batch_size or math.inf)))

    def backward(self, role: str, terms: Mapping[str, Tensor]) -> Tensor:
        """Add the gradient of the sum of the terms, none or several, to the role's; returns the sum, without gradient.

        The caller is inside the role's mode. With several processes the gradient becomes their mean.

        Raises:
            NonFiniteError: A term is infinite or not a number; no weight was changed.
        """
        for name, term in terms.items():
            if not term.isfinite():
                self.discard(role)
                raise NonFiniteError(self._stopped(f"loss/{name} is {term.item()}"))
        found = list(terms.values())
        if not found or several():  # others wait for this process, also where its terms depend on no parameter
            found.append(0 * self.optimizer(role).param_groups[0]["params"][0].sum())
        loss = torch.stack(found).sum()
        self.module.manual_backward(loss)
        return loss.detach()

    def step(self, role: str) -> None:
        """One optimizer step by the gradient of the backward passes since the last one.

        None is taken without a gradient, as in a batch from which the discriminator's objective cannot learn, nor in
        16-mixed by one that overflowed, after which the scale is lower.
        """
        optimizer = self.module.optimizers()[list(self.roles).index(role)]  # type: ignore[index]
        if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            return
        before = len(self._norms.get(role, ()))
        try:
            optimizer.step()
        finally:
            optimizer.zero_grad()
        if len(self._norms.get(role, ())) > before:
            self.updates[role] += 1
            self._stepped.add(role)

    def discard(self, role: str) -> None:
        """Forget the gradient."""
        self.optimizer(role).zero_grad()

    def clip(self, optimizer: Optimizer) -> None:
        """Clip one role's gradient, for ``on_before_optimizer_step``: fp16 gradients are unscaled by then."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        if norm.isfinite():
            role = list(self.roles)[self.module.trainer.optimizers.index(optimizer)]
            self._norms.setdefault(role, []).append(norm)
        elif not scales_gradients(self.module.trainer):  # else the step is left out and the scale lowered
            raise NonFiniteError(self._stopped(f"the gradient's norm is {norm.item()}"))

    def metrics(self) -> dict[str, Tensor]:
        """Of each role that learned in this step, its learning rate and the norm of its gradient before clipping."""
        metrics = {}
        for role, norms in self._norms.items():
            metrics[f"{role}/learning_rate"] = torch.tensor(float(self.optimizer(role).param_groups[0]["lr"]))
            metrics[f"{role}/grad_norm"] = torch.stack(norms).mean()
        self._norms.clear()
        return metrics

    # the run

    def check_trainer(self) -> None:
        """Refuse the trainer's settings of automatic optimization, and those that fail in the middle of a run.

        Raises:
            LoraGANError: One is set; the message names the setting that takes its place.
        """
        trainer = self.module.trainer
        for name in ("val_check_interval", "check_val_every_n_epoch"):
            given = getattr(trainer, name)
            if isinstance(given, int | float) and not given > 0:
                raise LoraGANError(
                    f"trainer.{name} must be more than 0, got {given}; without validation set limit_val_batches: 0"
                )
        if trainer.accumulate_grad_batches != 1:
            raise LoraGANError(
                f"trainer.accumulate_grad_batches: {trainer.accumulate_grad_batches} has no effect here: set "
                "data.batch_size to the prompts of an optimizer step, optimization.micro_batch_size to those of a pass"
            )
        if trainer.gradient_clip_val:
            raise LoraGANError(
                f"trainer.gradient_clip_val: {trainer.gradient_clip_val} has no effect here: set "
                "optimization.max_grad_norm, which holds for each role"
            )

    def check_schedules(self) -> None:
        """Tell schedules how long the run is, before its first step.

        Raises:
            LoraGANError: A schedule does not fit the run.
        """
        trainer = self.module.trainer
        end = trainer.estimated_stepping_batches
        for role in self.roles:
            scheduler = self.scheduler(role)
            if isinstance(scheduler, WarmupSchedule):
                scheduler.end_at(scheduler.total_steps or end)
            elif isinstance(scheduler, Plateau):
                self._check_plateau(role, scheduler)
            elif scheduler is not None and end < math.inf:
                self._check_end(role, scheduler, scheduler.last_epoch + int(end) - trainer.global_step)

    def step_schedulers(self) -> None:
        """Once per training step for each role whose optimizer took a step."""
        for role in self._stepped:
            scheduler = self.scheduler(role)
            if scheduler is not None and not isinstance(scheduler, Plateau):
                self._check_end(role, scheduler, scheduler.last_epoch + 1)
                scheduler.step()
        self._stepped.clear()

    def follow_metrics(self, metrics: Mapping[str, Tensor]) -> None:
        """Once per validation, for schedules that follow a metric of it.

        Raises:
            LoraGANError: A metric is missing.
        """
        for role in self.roles:
            scheduler = self.scheduler(role)
            if isinstance(scheduler, ReduceLROnPlateau):
                if scheduler.monitor not in metrics:
                    raise LoraGANError(
                        f"{role}.scheduler: ReduceLROnPlateau has monitor: {scheduler.monitor}, which the validation "
                        f"does not measure; choose one of {', '.join(sorted(metrics))}"
                    )
                scheduler.step(metrics[scheduler.monitor])

    def _check_plateau(self, role: str, scheduler: Plateau) -> None:
        if not isinstance(scheduler, ReduceLROnPlateau):
            raise LoraGANError(
                f"{role}.scheduler: torch's ReduceLROnPlateau does not say which metric it follows; use "
                "lightning.pytorch.cli.ReduceLROnPlateau with monitor: text/reward and mode: max, for example"
            )
        if not self.module.trainer.enable_validation:
            raise LoraGANError(
                f"{role}.scheduler: ReduceLROnPlateau follows a metric of the validation, and this run has none; "
                "use another schedule, such as lora_gan.optimization.WarmupCosine"
            )

    def _check_end(self, role: str, scheduler: LRScheduler, step: int) -> None:
        """Refuse a step behind the end of a schedule, from which its rate would rise again."""
        if step > (end := last_step(scheduler)):
            raise LoraGANError(
                f"{role}.scheduler: {type(scheduler).__name__} ends at step {end:.0f}, and its rate would rise again "
                f"behind it, up to step {step}. In a new run, let it end with the run, or use "
                "lora_gan.optimization.WarmupCosine, which follows trainer.max_steps, or stays at its floor from "
                f"total_steps on. To train on after a run with this schedule, {NEW_RUN}"
            )

    def ended(self) -> list[str]:
        """The roles whose schedule has fallen to 0: a longer run needs a floor for it, or another schedule."""
        schedules = {role: self.scheduler(role) for role in self.roles}
        return [r for r, s in schedules.items() if isinstance(s, WarmupSchedule) and s.share(s.last_epoch) == 0]

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


def made_by(name: str, make: Callable[[Any], Made], of: Any) -> Made:
    """An optimizer or a schedule.

    Raises:
        LoraGANError: It refuses its settings, or one of them is not a number.
    """
    try:
        made = make(of)
    except (ValueError, ZeroDivisionError) as error:
        raise error if isinstance(error, LoraGANError) else LoraGANError(f"{name} cannot be made: {error}") from error
    for setting, value in getattr(made, "defaults", {}).items():
        given = value if isinstance(value, tuple | list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in given):
            raise LoraGANError(f"{name}: {setting} must be finite, got {value}")
    return made


def _split(prompts: int, passes: int) -> list[list[int]]:
    return [part.tolist() for part in torch.arange(prompts).tensor_split(passes)]


def last_step(scheduler: LRScheduler) -> float:
    """Step at which a schedule of torch that falls is at its lowest, and behind which it rises or raises an error."""
    match scheduler:
        case CosineAnnealingLR():
            return scheduler.T_max
        case OneCycleLR():
            return scheduler.total_steps
        case SequentialLR():
            begins, last = last_of_sequence(scheduler)
            return begins + last_step(last)
    return math.inf
