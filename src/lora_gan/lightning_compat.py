"""Private API of Lightning, torch and transformers, each use behind a function named after what it does.

Tested with lightning 2.6.6, torch 2.13.0 and transformers 5.23.0. Each function checks that what it reads or replaces
exists, so that an upgrade that moves it fails here, with a message, instead of silently. ``torch.ops.mkldnn`` is
checked by its only user, :mod:`lora_gan.onednn`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import lightning as L
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lora_gan.errors import LoraGANError

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.loggers import TensorBoardLogger

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
    ``LightningCLI._run_subcommand``, and the methods of a layer of transformers' key-value cache.

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
    return loop._should_check_val_fx(fetcher)


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


def share_of_process(trainer: L.Trainer | None) -> dict[str, int]:
    """Number of processes and index of this one, as Lightning passes them to a sampler."""
    if trainer is None:
        return {"num_replicas": 1, "rank": 0}
    _require(trainer, "distributed_sampler_kwargs")
    return trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}


# the command line and the logger


def subcommand_setting(cli: LightningCLI, name: str) -> Any:
    """A setting of the current subcommand; None if it has none of this name."""
    _require(cli, "_get")
    return cli._get(cli.config, name)


def continue_in_folder(logger: TensorBoardLogger, name: str) -> None:
    """Write to the subfolder of an earlier run; Lightning fixes a logger's version when it is created."""
    _require(logger, "_version")
    logger._version = name
    if logger.version != name:
        raise _changed(logger, f"writes to {logger.version} and not to the resumed run's {name}")


# modules


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
