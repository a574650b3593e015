"""Checkpoint contents: what the module saves, and which checkpoints it accepts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import nn

from lora_gan.backbone import DISCRIMINATOR, GENERATOR, SNAPSHOT, Backbone, adapter_of
from lora_gan.coefficients import Coefficients
from lora_gan.data.base import TextDataModule
from lora_gan.data.templates import PromptFormat
from lora_gan.discriminator.restored import describe
from lora_gan.distributed import gathered
from lora_gan.errors import LoraGANError
from lora_gan.lightning_compat import is_fitting, refuse_other_weights
from lora_gan.sampling import Sampling, end_turns
from lora_gan.step_callback import StepModule
from lora_gan.tensors import fingerprint

CHECKPOINT_VERSION = 7  # since lora-gan 0.3.0


class Checkpointed(StepModule):
    """Saves the trained weights and the state between steps; the frozen base is identified, not stored.

    The state of random number generators is not part of it: the random numbers of a step depend only on the seed of the
    run, the rank of the process and the number of the step. So a resumed run draws the same numbers as an uninterrupted
    one, and the number of validations does not affect training.
    """

    configured_coefficients: Coefficients
    sampling: Sampling
    seed: int | None = None  # of the next runs; None: the seed of torch, or that of the checkpoint

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints do not store the base
        self.seed_of_run = 0
        self.trained_steps = 0  # training steps behind the present weights
        self.prompts = PromptFormat()  # of the data module, once the trainer has set the module up

    # random numbers

    def setup(self, stage: str) -> None:
        refuse_other_weights(self.trainer)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TextDataModule):
            self.prompts = data.prompts
        end_turns(self.backbone, self.prompts)
        given = torch.initial_seed() if self.seed is None else self.seed
        self.seed_of_run = self.trainer.strategy.broadcast(given)

    @property
    def step_seed(self) -> tuple[int, ...]:
        """Seed of the random numbers of a step: seed of the run, rank, step."""
        return self.seed_of_run, self.trainer.global_rank, self.trainer.global_step

    def seed_step(self) -> None:
        """Seed the next step."""
        seed_by(self.step_seed)

    def on_fit_end(self) -> None:
        """Seed what follows, so that it does not depend on whether the last step ran now or before a resume."""
        self.seed_step()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trained_steps = self.trainer.global_step

    # checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the weights of the base by a description."""
        kept = self._kept()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["lora_gan"] = self._description() | {
            "seed": self.seed_of_run,
            "updates": dict(self.optimization.updates),
            "fingerprint": self.backbone.fingerprint,
            "prompts": plain(asdict(self.prompts)),
            "sampling": asdict(self.sampling),
            "coefficients": asdict(self.configured_coefficients),
            "replay": gathered(self.discriminator.replay.state_dict()),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits the configuration; coefficients that were reconfigured keep their new values.

        Raises:
            LoraGANError: The checkpoint was not written by lora-gan, or does not fit; the message says where.
        """
        described = checkpoint.get("lora_gan")
        if described is None:
            raise LoraGANError("this checkpoint was not written by lora-gan; give a last.ckpt of one of its runs")
        fitting = is_fitting(self)
        differing = list(self._differences(described, fitting))
        if differing:
            raise LoraGANError(
                f"the checkpoint does not fit this configuration: {'; '.join(differing)}. "
                "Start a new run, or use the settings of the checkpoint"
            )
        if any(adapter_of(name) == SNAPSHOT for name in checkpoint["state_dict"]):
            self.backbone.add_snapshot()
        else:
            self.backbone.drop_snapshot()
        remembered = described["replay"]  # one for each process
        self.discriminator.replay.load_state_dict(remembered[self.global_rank % len(remembered)])
        missing = self._kept() - set(checkpoint["state_dict"])
        if missing:
            raise LoraGANError(
                f"the checkpoint lacks {len(missing)} tensors, such as {min(missing)}; start a new run, or use the "
                "settings of the checkpoint"
            )
        self.trained_steps = checkpoint["global_step"]
        self.optimization.updates = dict(described["updates"])
        if fitting:
            self.seed_of_run = described["seed"]
        for name, value in asdict(self.configured_coefficients).items():
            if described["coefficients"][name] != value:  # reconfigured for the resumed run
                checkpoint["state_dict"][f"coefficients.{name}"] = torch.tensor(float(value))

    def _differences(self, there: Mapping[str, Any], fitting: bool) -> Iterator[str]:
        """Differences that prevent loading, by the names of the settings."""
        here = self._description()
        if there["version"] != here["version"]:
            yield f"its format version is {there['version']}, this lora-gan reads {here['version']}"
            return
        if there["weights"] != here["weights"]:  # the same base may lie in another folder
            yield from differences(there["base"], here["base"], "base")
            if all(there[name] == here[name] for name in ("dtype", "quantization")):
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
            "quantization": self.backbone.settings.quantization,
            "weights": self._frozen_weights,
            "vocabulary": self._vocabulary,
            "model": describe(model),
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
        """Fingerprint of the frozen weights, which identifies a base even if its folder moved."""
        frozen = {n: p for n, p in self.named_parameters() if not p.requires_grad and adapter_of(n) != SNAPSHOT}
        return fingerprint(frozen)

    @cached_property
    def _vocabulary(self) -> str:
        return vocabulary_of(self.backbone)

    def _kept(self) -> set[str]:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        snapshot = {name for name, _ in self.named_parameters() if adapter_of(name) == SNAPSHOT}
        return trained | snapshot | {f"coefficients.{name}" for name, _ in self.coefficients.named_buffers()}


def vocabulary_of(backbone: Backbone) -> str:
    """Size and fingerprint of the tokenizer's vocabulary."""
    vocabulary = backbone.tokenizer.get_vocab()
    digest = sha256(repr(sorted(vocabulary.items())).encode()).hexdigest()[:16]
    return f"{len(vocabulary)} tokens ({digest})"


def seed_by(parts: tuple[int, ...]) -> None:
    """Seed torch (all devices), numpy and python."""
    seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def differences(there: Any, here: Any, name: str) -> Iterator[str]:
    """Describe each value that differs, by its full name."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in {**there, **here}:
            yield from differences(there.get(key), here.get(key), f"{name}.{key}")
    elif there != here:
        yield f"{name}: {there} in the checkpoint, {here} now"


def plain(value: Any) -> Any:
    """Settings as plain values for a checkpoint, without what follows the optimizer's rate or the run's length."""
    if isinstance(value, Mapping):
        followed = ("base_lrs", "_last_lr", "end")
        return {str(key): plain(item) for key, item in value.items() if key not in followed}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__name__)
