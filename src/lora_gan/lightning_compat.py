"""Private API of Lightning, torch, transformers and PEFT, each use behind a function named after what it does.

Tested with lightning 2.6.6, torch 2.13.0, transformers 5.23.0 and peft 0.21.2. Each function checks that what it reads
or replaces exists, so that an upgrade that moves it fails here, with a message, instead of silently.
``torch.ops.mkldnn`` is checked by its only user, :mod:`lora_gan.onednn`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import lightning as L
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from lora_gan.errors import LoraGANError

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

Function = TypeVar("Function", bound=Callable[..., Any])
Module = TypeVar("Module", bound=nn.Module)


def _require(owner: object, *names: str) -> None:
    """Check that the attributes exist."""
    for name in names:
        if not hasattr(owner, name):
            raise _changed(owner, f"has no {name}")


def _changed(owner: object, what: str) -> LoraGANError:
    kind = owner if isinstance(owner, type) else type(owner)
    return LoraGANError(
        f"{kind.__module__}.{kind.__name__} {what} in this version, but lora-gan relies on it; "
        "install the versions of requirements.txt, and report this"
    )


def overrides(base: type) -> Callable[[Function], Function]:
    """Mark a method that replaces a private one of ``base``; it must exist there, or the override is never called.

    Used for ``LightningCLI._parse_ckpt_path``, which lets the settings that a checkpoint holds override those given,
    and for the methods of a layer of transformers' key-value cache.

    Raises:
        LoraGANError: While the class is made, if ``base`` has no method of this name.
    """

    def check(method: Function) -> Function:
        _require(base, method.__name__)
        return method

    return check


# counting steps


@contextmanager
def count_one_step(trainer: L.Trainer, optimizers: Sequence[LightningOptimizer]) -> Iterator[None]:
    """Make ``trainer.global_step``, and so ``max_steps`` and checkpoints, grow by one within the context.

    In manual optimization Lightning counts every optimizer's steps (https://github.com/Lightning-AI/pytorch-lightning/
    issues/17958); here a training step counts once, however many optimizer steps it takes.
    """
    profiler = trainer.profiler  # type: ignore[attr-defined]
    for optimizer in optimizers:
        _require(optimizer, "_on_before_step", "_on_after_step")
        optimizer._on_before_step = lambda: profiler.start("optimizer_step")
        optimizer._on_after_step = lambda: profiler.stop("optimizer_step")
    before = trainer.global_step
    progress = _optimizer_progress(trainer)
    progress.increment_ready()
    yield
    progress.increment_completed()
    if trainer.global_step != before + 1:
        raise _changed(trainer, f"counted {trainer.global_step - before} steps instead of one")


def set_global_step(trainer: L.Trainer, step: int) -> None:
    """Make ``trainer.global_step`` this number."""
    progress = _optimizer_progress(trainer)
    progress.total.ready = progress.total.completed = step


def _optimizer_progress(trainer: L.Trainer) -> Any:
    loop = trainer.fit_loop.epoch_loop
    _require(loop, "manual_optimization")
    _require(loop.manual_optimization, "optim_step_progress")
    return loop.manual_optimization.optim_step_progress


# the state of a fit


def validates_after_this_batch(trainer: L.Trainer) -> bool:
    """Whether a validation follows the training batch that has just ended."""
    _require(trainer.fit_loop, "_data_fetcher", "epoch_loop")
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    _require(loop, "_should_check_val_fx")
    assert fetcher is not None, "a fit is running"
    return loop._should_check_val_fx(fetcher) and sum(trainer.num_val_batches) > 0  # none of an empty split


def validate_now(trainer: L.Trainer) -> None:
    """Run a validation at the start of a fit, before the first step; nothing where the fit has no validation."""
    loop = trainer.fit_loop.epoch_loop
    _require(loop, "val_loop")
    if not trainer.enable_validation:
        return
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True


def forget_logged(trainer: L.Trainer, hook: str) -> None:
    """Forget what a hook has logged before, which Lightning logs again in every step until the end of the epoch.

    So a value that only some steps have, such as a loss that a curriculum ends, would be a flat line afterwards.
    """
    _require(trainer, "_results")
    for logged in (trainer._results or {}).values():
        _require(logged, "has_reset", "meta")
        if logged.meta.fx == hook and not logged.meta.on_epoch:
            logged.has_reset = True


def is_last_batch(trainer: L.Trainer) -> bool:
    """Whether this training batch is the last one of its epoch, as far as the data loader knows."""
    loop = trainer.fit_loop.epoch_loop
    _require(loop, "batch_progress")
    _require(loop.batch_progress, "is_last_batch")
    return loop.batch_progress.is_last_batch


def is_fitting(module: L.LightningModule) -> bool:
    """Whether the module is in a trainer's ``fit``; the public ``module.trainer`` raises where there is no trainer."""
    _require(module, "_trainer")
    return module._trainer is not None and module._trainer.state.fn == TrainerFn.FITTING


def refuse_other_weights(trainer: L.Trainer) -> None:
    """Refuse the precisions that convert all weights: adapters and heads learn in float32.

    Raises:
        LoraGANError: ``trainer.precision`` is such a one.
    """
    if str(trainer.precision) not in ("32-true", "bf16-mixed", "16-mixed"):
        raise LoraGANError(
            f"trainer.precision {trainer.precision} would convert the adapters, too, which learn in float32, since "
            "their updates are too small for 16 bits; set model.backbone.dtype: bfloat16 for the frozen base, and "
            "trainer.precision to 32-true or bf16-mixed"
        )


def scales_gradients(trainer: L.Trainer) -> bool:
    """Whether losses are multiplied by a scale before the backward pass, and gradients divided by it: in 16-mixed."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def unscales_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer divides by that scale in its step, as fused ones do, instead of Lightning before it."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def share_of_process(trainer: L.Trainer | None) -> dict[str, int]:
    """Number of processes and index of this one, as Lightning passes them to a sampler."""
    if trainer is None:
        return {"num_replicas": 1, "rank": 0}
    _require(trainer, "distributed_sampler_kwargs")
    return trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}


# schedules


def last_of_sequence(scheduler: SequentialLR) -> tuple[int, LRScheduler]:
    """The last schedule of a sequence, and the step at which it begins."""
    _require(scheduler, "_milestones", "_schedulers")
    return scheduler._milestones[-1], scheduler._schedulers[-1]


# the command line and the logger


def subcommand_setting(cli: LightningCLI, name: str) -> Any:
    """A setting of the current subcommand; None if it has none of this name."""
    _require(cli, "_get")
    return cli._get(cli.config, name)


def has_version(logger: TensorBoardLogger | CSVLogger) -> bool:
    """Whether the logger's subfolder is settled; asking for ``logger.version`` would settle it."""
    _require(logger, "_version")
    return logger._version is not None


def set_version(logger: TensorBoardLogger | CSVLogger, version: int | str) -> None:
    """Write to this subfolder, ``version_<n>`` for a number; Lightning offers it only when a logger is created."""
    _require(logger, "_version")
    logger._version = version
    if logger.version != version:
        raise _changed(logger, f"writes to {logger.version} and not to the run's folder {version}")


# modules


def set_root(trainer: L.Trainer, folder: Path) -> None:
    """Give a trainer another ``default_root_dir``."""
    _require(trainer, "_default_root_dir")
    trainer._default_root_dir = str(folder)  # type: ignore[attr-defined]


@contextmanager
def patched_forward(modules: Iterable[Module], make: Callable[[Module], Callable[..., Any]]) -> Iterator[None]:
    """Replace each module's ``forward`` by ``make(module)`` within the context.

    ``make`` may use the original ``module.forward``. A ``forward`` that another library, such as accelerate, has set on
    the instance is restored afterwards.

    Raises:
        LoraGANError: A module is compiled: it would ignore the replacement.
    """
    replaced: list[tuple[nn.Module, Callable[..., Any] | None]] = []
    try:
        for module in modules:
            _require(module, "_compiled_call_impl")
            if module._compiled_call_impl is not None:
                raise LoraGANError(f"{type(module).__name__} is compiled; leave out torch.compile")
            forward = make(module)
            replaced.append((module, vars(module).get("forward")))
            vars(module)["forward"] = forward
        yield
    finally:
        for module, before in reversed(replaced):
            del vars(module)["forward"]
            if before is not None:
                vars(module)["forward"] = before


def switch_adapter(layers: Iterable[BaseTunerLayer], adapter: str | None) -> None:
    """Make this the adapter of the layers, or none, and leave all gradients as they are.

    PEFT's own calls also turn the gradients of the inactive adapters off, parameter by parameter: with 196 layers that
    takes several milliseconds.
    """
    _require(BaseTunerLayer, "_active_adapter", "_disable_adapters")
    state = {"_disable_adapters": adapter is None} | ({} if adapter is None else {"_active_adapter": [adapter]})
    for layer in layers:
        vars(layer).update(state)  # several times faster than a module's own setattr
