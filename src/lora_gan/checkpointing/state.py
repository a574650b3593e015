"""What a checkpoint of the module holds, and which ones it accepts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_gan.backbone import DISCRIMINATOR, GENERATOR, SNAPSHOT
from lora_gan.coefficients import Coefficients
from lora_gan.distributed import gathered
from lora_gan.errors import LoraGANError
from lora_gan.lightning_compat import is_fitting
from lora_gan.step_callback import StepModule
from lora_gan.tensors import fingerprint

CHECKPOINT_VERSION = 5  # of lora-gan 0.2.0


class Checkpointed(StepModule):
    """Keeps what is trained and what crosses steps; the frozen base is named, not stored.

    Random numbers do not cross steps: those of a step depend on the run's seed and the step's number only. So a
    resumed run draws what the uninterrupted one draws, and how often a run is validated does not change what it learns.
    """

    configured_coefficients: Coefficients
    seed: int | None = None  # of the runs to come; None: what torch was seeded with, or what the checkpoint says

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # of the base nothing is stored
        self.seed_of_run = 0
        self.accumulated: dict[str, Tensor] = {}  # gradients of a checkpoint, until training starts

    # random numbers

    def setup(self, stage: str) -> None:
        given = torch.initial_seed() if self.seed is None else self.seed
        self.seed_of_run = self.trainer.strategy.broadcast(given)

    @property
    def step_seed(self) -> tuple[int, ...]:
        """What the random numbers of a step depend on."""
        return self.seed_of_run, self.trainer.global_rank, self.trainer.global_step

    def seed_step(self) -> None:
        """Seed the step to come."""
        seed_by(self.step_seed)

    def on_fit_end(self) -> None:
        """What is drawn after a fit is the same, whether its last step was played now or before a resume."""
        self.seed_step()

    # a half-filled accumulation

    def on_train_start(self) -> None:
        parameters = dict(self.named_parameters())
        for name, gradient in self.accumulated.items():
            parameters[name].grad = gradient.to(parameters[name].device)
        self.accumulated = {}

    def on_validation_model_zero_grad(self) -> None:
        """A validation in the middle of an accumulation leaves its gradients alone; Lightning would drop them."""
        if self.trainer.global_step % self.optimization.settings.gradient_accumulation_steps == 0:
            super().on_validation_model_zero_grad()

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the base out and describe it."""
        kept = self._kept()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["lora_gan"] = self._description() | {
            "seed": self.seed_of_run,
            "coefficients": asdict(self.configured_coefficients),
            "replay": gathered(self.discriminator.replay.state_dict()),
            "gradients": {name: p.grad for name, p in self.named_parameters() if p.grad is not None},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else, saying what differs; a coefficient configured anew keeps its new
        value.
        """
        described = checkpoint.get("lora_gan")
        if described is None:
            raise LoraGANError("this checkpoint was not written by lora-gan")
        fitting = is_fitting(self)
        differing = list(self._differences(described, fitting))
        if differing:
            raise LoraGANError("the checkpoint does not fit this configuration: " + "; ".join(differing))
        if any(f".{SNAPSHOT}." in name for name in checkpoint["state_dict"]):
            self.backbone.add_snapshot()
        remembered = described["replay"]  # by each process
        self.discriminator.replay.load_state_dict(remembered[self.global_rank % len(remembered)])
        missing = self._kept() - set(checkpoint["state_dict"])
        if missing:
            raise LoraGANError(f"the checkpoint lacks {len(missing)} tensors, {min(missing)} for one")
        if fitting:
            self.seed_of_run = described["seed"]
            self.accumulated = described["gradients"]
        for name, value in asdict(self.configured_coefficients).items():
            if described["coefficients"][name] != value:  # set anew for the resumed run
                checkpoint["state_dict"][f"coefficients.{name}"] = torch.tensor(float(value))

    def _differences(self, there: Mapping[str, Any], fitting: bool) -> Iterator[str]:
        """What stands in the way, by the names of the settings."""
        here = self._description()
        if there["version"] != here["version"]:
            yield f"its version is {there['version']}, this is {here['version']}"
            return
        if there["weights"] != here["weights"]:  # a base may have moved
            yield from differences(there["base"], here["base"], "base")
            if there["dtype"] == here["dtype"]:
                yield from differences(there["weights"], here["weights"], "weights of the base")
        yield from differences(there["vocabulary"], here["vocabulary"], "vocabulary")
        yield from differences(there["model"], here["model"], "discriminator.model")
        for role, lora in here["lora"].items():
            yield from differences(there["lora"][role], lora, f"{role}.lora")
        if fitting:  # the saved state of the optimizers and schedulers would override new settings
            for name, settings in here["optimization"].items():
                yield from differences(there["optimization"][name], settings, name)
            if self.seed is not None:
                yield from differences(there["seed"], self.seed, "seed_everything")

    def _description(self) -> dict[str, Any]:
        model = self.discriminator.model
        lora = {GENERATOR: self.generator.settings.lora, DISCRIMINATOR: self.discriminator.settings.lora}
        return {
            "version": CHECKPOINT_VERSION,
            "base": self.base,
            "dtype": self.backbone.settings.dtype,
            "weights": self._frozen_weights,
            "vocabulary": self._vocabulary,
            "model": {"class": type(model).__name__, "input_format": type(model.input_format).__name__},
            "optimization": self._optimizer_settings(),
            "lora": {role: asdict(settings) for role, settings in lora.items()},
        }

    def _optimizer_settings(self) -> dict[str, dict[str, Any]]:
        """Settings of the optimizers and of their schedulers."""
        described = {}
        for role, settings in self.optimization.roles.items():
            optimizer = settings.optimizer([nn.Parameter(torch.zeros(1))])
            described[f"{role}.optimizer"] = {"class": type(optimizer).__name__, **plain(optimizer.defaults)}
            described[f"{role}.scheduler"] = {"class": None}
            if settings.scheduler is not None:
                scheduler = settings.scheduler(optimizer)
                described[f"{role}.scheduler"] = {"class": type(scheduler).__name__, **plain(scheduler.state_dict())}
        return described

    @cached_property
    def _frozen_weights(self) -> str:
        """By them a base is known again, also where it has moved."""
        frozen = {name: p for name, p in self.named_parameters() if not p.requires_grad and f".{SNAPSHOT}." not in name}
        return fingerprint(frozen)

    @cached_property
    def _vocabulary(self) -> str:
        vocabulary = self.backbone.tokenizer.get_vocab()
        digest = sha256(repr(sorted(vocabulary.items())).encode()).hexdigest()[:16]
        return f"{len(vocabulary)} tokens ({digest})"

    def _kept(self) -> set[str]:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        snapshot = {name for name, _ in self.named_parameters() if f".{SNAPSHOT}." in name}
        return trained | snapshot | {f"coefficients.{name}" for name, _ in self.coefficients.named_buffers()}


def seed_by(parts: tuple[int, ...]) -> None:
    """Seed torch (all devices), numpy and python."""
    seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def differences(there: Any, here: Any, name: str) -> Iterator[str]:
    """Each value that is another one here, by its full name."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in {**there, **here}:
            yield from differences(there.get(key), here.get(key), f"{name}.{key}")
    elif there != here:
        yield f"{name}: {there} there, {here} here"


def plain(value: Any) -> Any:
    """Settings as a checkpoint can hold them; the rates that follow from the optimizer's are left out."""
    if isinstance(value, Mapping):
        followed = ("base_lrs", "_last_lr")
        return {str(key): plain(item) for key, item in value.items() if key not in followed}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__name__)
