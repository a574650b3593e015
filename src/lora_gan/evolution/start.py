"""The first members of a population."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from lora_gan.adapters import load_adapter
from lora_gan.backbone import GENERATOR, Backbone
from lora_gan.errors import LoraGANError
from lora_gan.evolution.lowrank import Weights
from lora_gan.evolution.population import read_weights, write_weights
from lora_gan.objectives import TARGET
from lora_gan.tensors import masked_mean
from lora_gan.tree import grow_scored
from lora_gan.types import PromptBatch

log = logging.getLogger("lora_gan")


class Start(ABC):
    """Makes the members with which evolution begins; where they are too few, mutations of them fill the population."""

    @abstractmethod
    def __call__(self, backbone: Backbone, batches: Iterable[PromptBatch], count: int) -> list[Weights]:
        """At least one and at most ``count`` members.

        Args:
            backbone: Its generator may be used to make them.
            batches: The training data, an epoch at each iteration.
            count: Size of the population.
        """


class AsItIs(Start):
    """The generator as it is: fresh, or as a checkpoint has it."""

    def __call__(self, backbone: Backbone, batches: Iterable[PromptBatch], count: int) -> list[Weights]:
        return [read_weights(backbone)]


class SavedAdapters(Start):
    """Trained adapters in PEFT's format, of the same base, rank and alpha.

    Args:
        folders: Such as ``lightning_logs/gan/version_0/adapters/generator``, or hub ids.
    """

    def __init__(self, folders: list[str]) -> None:
        if not folders:
            raise LoraGANError("SavedAdapters needs at least one folder of an adapter")
        self.folders = folders

    def __call__(self, backbone: Backbone, batches: Iterable[PromptBatch], count: int) -> list[Weights]:
        if len(self.folders) > count:
            raise LoraGANError(
                f"{len(self.folders)} adapters do not fit into a population of {count}: raise population or name fewer"
            )
        members = []
        for folder in self.folders:
            load_adapter(backbone, GENERATOR, folder)
            members.append(read_weights(backbone))
        return members


class SupervisedStart(Start):
    """Supervised learning of targets: a trunk that all members share, then a branch for each.

    Each branch has prompts of its own, and the learning rates take turns: the members know much the same by different
    weights, which is what crossover needs.

    Args:
        trunk: Rounds that all share.
        branch: Rounds of each member.
        prompts: Prompts of a round; those of the generations' batches are dealt out to as many rounds as they make.
        learning_rates: Factors of the optimizer's learning rate in the branches, taken in turns.
        optimizer: The optimizer; each branch begins with a fresh one.
        gradient_clip: Largest norm of the gradient.
    """

    def __init__(
        self,
        trunk: int = 200,
        branch: int = 30,
        prompts: int = 16,
        learning_rates: list[float] | None = None,
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=2e-3, weight_decay=0.0),
        gradient_clip: float = 1.0,
    ) -> None:
        if trunk < 0 or branch < 0 or prompts < 1:
            raise LoraGANError(f"need trunk >= 0, branch >= 0 and prompts >= 1, got {trunk}, {branch} and {prompts}")
        self.trunk = trunk
        self.branch = branch
        self.prompts = prompts
        self.learning_rates = learning_rates or [1.0, 0.5]
        self.optimizer = optimizer
        self.gradient_clip = gradient_clip

    def __call__(self, backbone: Backbone, batches: Iterable[PromptBatch], count: int) -> list[Weights]:
        endless = _endless(batches, self.prompts, backbone.device)
        log.info("supervised start: %d rounds for all, then %d for each of %d members", self.trunk, self.branch, count)
        self._learn(backbone, endless, self.trunk, 1.0)
        trunk, members = read_weights(backbone), []
        for number in range(count):
            write_weights(backbone, trunk)
            factor = self.learning_rates[number % len(self.learning_rates)]
            loss = self._learn(backbone, endless, self.branch, factor)
            log.info("  member %d: loss %.3f, learning rate × %g", number, loss, factor)
            members.append(read_weights(backbone))
        return members

    def _learn(self, backbone: Backbone, batches: Iterator[PromptBatch], rounds: int, factor: float) -> float:
        """Imitate targets for some rounds; the mean loss."""
        parameters = backbone.parameters_of(GENERATOR)
        optimizer = self.optimizer(parameters)
        for group in optimizer.param_groups:
            group["lr"] *= factor
        losses = []
        for _ in range(rounds):
            with backbone.generator():
                loss = imitation_loss(backbone, next(batches))
                torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(parameters, self.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return sum(losses) / max(len(losses), 1)


def imitation_loss(backbone: Backbone, batch: PromptBatch) -> Tensor:
    """Cross-entropy on the targets in the active mode, token mean."""
    targets: Sequence[Sequence[Tensor]] = [[target] for target in batch.target_ids]
    told = backbone.predict(grow_scored(batch.prompt_ids, {TARGET: targets}))[TARGET]
    return -masked_mean(told.logprobs, told.branches.mask)


def _endless(batches: Iterable[PromptBatch], prompts: int, device: torch.device) -> Iterator[PromptBatch]:
    """Epoch after epoch ``prompts`` at a time, only what has a target."""
    while True:
        rounds = (part.to(device) for batch in batches for part in _parts(batch, prompts))
        first = next(rounds, None)
        if first is None:
            raise LoraGANError("no prompt of the training data has a target: a supervised start needs some")
        yield first
        yield from rounds


def _parts(batch: PromptBatch, prompts: int) -> Iterator[PromptBatch]:
    answered = batch.answered
    yield from (batch.of(answered[i : i + prompts]) for i in range(0, len(answered), prompts))
