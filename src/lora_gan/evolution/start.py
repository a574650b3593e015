"""Initial populations."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from lora_gan.backbone import GENERATOR, Backbone
from lora_gan.checkpointing.adapters import load_adapter
from lora_gan.discriminator.objectives import TARGET
from lora_gan.errors import LoraGANError
from lora_gan.evolution.lowrank import Weights
from lora_gan.evolution.population import read_weights, write_weights
from lora_gan.optimization import made_by
from lora_gan.tensors import masked_mean
from lora_gan.tree import grow_scored
from lora_gan.types import PromptBatch

log = logging.getLogger("lora_gan")


class Start(ABC):
    """Makes the initial members; mutations of them fill the rest of the population."""

    @abstractmethod
    def __call__(self, backbone: Backbone, batches: Iterable[PromptBatch], count: int) -> list[Weights]:
        """At least one and at most ``count`` members.

        Args:
            backbone: Its generator may be changed.
            batches: The training data; each iteration over it is an epoch.
            count: Size of the population.
        """


class AsItIs(Start):
    """The generator as it is: fresh or loaded from an adapter."""

    def __call__(self, backbone: Backbone, batches: Iterable[PromptBatch], count: int) -> list[Weights]:
        return [read_weights(backbone)]


class SavedAdapters(Start):
    """Trained adapters in PEFT format, of the same base, rank and alpha.

    Args:
        folders: Adapter folders, such as ``lightning_logs/gan/version_0/adapters/generator``, or hub ids.
    """

    def __init__(self, folders: list[str]) -> None:
        if not folders:
            raise LoraGANError("SavedAdapters needs at least one adapter folder, got an empty list: set folders")
        self.folders = folders

    def __call__(self, backbone: Backbone, batches: Iterable[PromptBatch], count: int) -> list[Weights]:
        if len(self.folders) > count:
            raise LoraGANError(
                f"{len(self.folders)} adapters do not fit into a population of {count}: raise population or list fewer "
                "folders"
            )
        members = []
        for folder in self.folders:
            load_adapter(backbone, GENERATOR, folder)
            members.append(read_weights(backbone))
        return members


class SupervisedStart(Start):
    """Supervised fine-tuning on the targets: a trunk shared by all members, then a branch for each.

    Each branch has its own prompts, and the learning rates alternate. So the members have similar skills in different
    weights, as crossover needs.

    Args:
        trunk: Steps shared by all members.
        branch: Steps of each member.
        prompts: Prompts in a step; each batch of the data is split into steps of this size.
        learning_rates: Factors of the optimizer's learning rate, which the branches cycle through; default 1, 0.5.
        optimizer: Function that makes an optimizer; the trunk and each branch get a new one.
        max_grad_norm: Largest norm of the gradient.
    """

    def __init__(
        self,
        trunk: int = 200,
        branch: int = 30,
        prompts: int = 16,
        learning_rates: list[float] | None = None,
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=2e-3, weight_decay=0.0),
        max_grad_norm: float = 1.0,
    ) -> None:
        if trunk < 0 or branch < 0 or prompts < 1:
            raise LoraGANError(f"need trunk >= 0, branch >= 0 and prompts >= 1, got {trunk}, {branch} and {prompts}")
        if not max_grad_norm > 0:
            raise LoraGANError(f"max_grad_norm must be > 0, got {max_grad_norm}; a large one, 1e9, never clips")
        self.trunk = trunk
        self.branch = branch
        self.prompts = prompts
        self.learning_rates = learning_rates or [1.0, 0.5]
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm

    def __call__(self, backbone: Backbone, batches: Iterable[PromptBatch], count: int) -> list[Weights]:
        endless = _endless(batches, self.prompts, backbone.device)
        log.info("supervised start: %d shared steps, then %d for each of %d members", self.trunk, self.branch, count)
        self._train(backbone, endless, self.trunk, 1.0)
        trunk, members = read_weights(backbone), []
        for number in range(count):
            write_weights(backbone, trunk)
            factor = self.learning_rates[number % len(self.learning_rates)]
            loss = self._train(backbone, endless, self.branch, factor)
            log.info("  member %d: loss %.3f, learning rate × %g", number, loss, factor)
            members.append(read_weights(backbone))
        return members

    def _train(self, backbone: Backbone, batches: Iterator[PromptBatch], steps: int, factor: float) -> float:
        """Train on the targets for some steps; returns the mean loss."""
        parameters = backbone.parameters_of(GENERATOR)
        optimizer = made_by("the optimizer of SupervisedStart", self.optimizer, parameters)
        for group in optimizer.param_groups:
            group["lr"] *= factor
        losses = []
        for _ in range(steps):
            with backbone.generator():
                loss = imitation_loss(backbone, next(batches))
                torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return sum(losses) / max(len(losses), 1)


def imitation_loss(backbone: Backbone, batch: PromptBatch) -> Tensor:
    """Cross-entropy of the targets in the active mode, token mean."""
    targets: Sequence[Sequence[Tensor]] = [[target] for target in batch.target_ids]
    predicted = backbone.predict(grow_scored(batch.prompt_ids, {TARGET: targets}))[TARGET]
    return -masked_mean(predicted.logprobs, predicted.branches.mask)


def _endless(batches: Iterable[PromptBatch], prompts: int, device: torch.device) -> Iterator[PromptBatch]:
    """Endless epochs in parts of at most ``prompts`` prompts, without prompts that have no target."""
    while True:
        steps = (part.to(device) for batch in batches for part in _parts(batch, prompts))
        first = next(steps, None)
        if first is None:
            raise LoraGANError(
                "no prompt of the training data has a target, which a supervised start needs: "
                "use data with targets, or another start"
            )
        yield first
        yield from steps


def _parts(batch: PromptBatch, prompts: int) -> Iterator[PromptBatch]:
    rows = batch.with_target
    yield from (batch.of(rows[i : i + prompts]) for i in range(0, len(rows), prompts))
