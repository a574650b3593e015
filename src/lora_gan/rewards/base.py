"""The seam of rewards, and how several of them become one number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError, RewardError
from lora_gan.tensors import group_normalise
from lora_gan.types import Example, PromptBatch, RewardContext


class Reward(ABC):
    """Scores N completions at once.

    Args:
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``.
    """

    needs_target: bool = False  # True: says nothing of completions to a prompt without target

    def __init__(self, weight: float, name: str) -> None:
        self.weight = weight
        self.name = name

    @abstractmethod
    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        """(N,) scores, higher is better; completion n belongs to ``batch.examples[n // context.num_generations]``."""

    def applies(self, batch: PromptBatch, k: int) -> list[bool]:
        """For each of the B prompts, whether its k completions can be scored; the others are not shown to it."""
        return [not self.needs_target or bool(references_of(example)) for example in batch.examples]


def references_of(example: Example) -> tuple[str, ...]:
    """Everything that is accepted as a completion; nothing for a prompt without target."""
    return tuple(text for text in example.references or (example.target,) if text.strip())


@dataclass(frozen=True)
class RewardSum:
    total: Tensor  # (N,) weighted sum
    parts: Mapping[str, Tensor]  # name → (N,), before the weights; 0 where the reward does not apply
    applies: Mapping[str, Tensor]  # name → (N,) bool


def weighted_sum(
    rewards: Sequence[Reward], completions: Sequence[str], batch: PromptBatch, context: RewardContext
) -> RewardSum:
    """Ask every reward and add them up by weight, see :class:`WeightedSum`.

    Raises:
        RewardError: A reward gave something other than N finite numbers.
    """
    asked = {reward.name: _ask(reward, completions, batch, context) for reward in rewards}
    parts = {name: one.scores for name, one in asked.items()}
    applies = {name: one.applies for name, one in asked.items()}
    total = (
        WeightedSum()(parts, weights_of(rewards), applies, context.num_generations)
        if asked
        else torch.zeros(len(completions))
    )
    return RewardSum(total.to(context.logprobs.device), parts, applies)


def weights_of(rewards: Sequence[Reward]) -> dict[str, float]:
    """Weight by name."""
    return {reward.name: reward.weight for reward in rewards}


def check_names(rewards: Sequence[Reward]) -> None:
    """Two rewards of one name would overwrite each other in the logs."""
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise LoraGANError(f"two rewards are called {name!r}; give one of them another name: in its init_args")


# combinations


class RewardAggregation(ABC):
    """Makes one number of the rewards of a completion: the reward of the policy."""

    needs_group = False  # True: needs at least two completions for each prompt

    @abstractmethod
    def __call__(
        self, parts: Mapping[str, Tensor], weights: Mapping[str, float], applies: Mapping[str, Tensor], k: int
    ) -> Tensor:
        """(N,) from (N,) parts, by name.

        Args:
            parts: At least one reward of N completions; the discriminator's score may be among them.
            weights: The weight of each part.
            applies: (N,) bool for each part: False where its reward says nothing. A part not named applies everywhere.
            k: Completions for each prompt.
        """


class WeightedSum(RewardAggregation):
    """Sum of weight · reward.

    Where a reward does not apply, the others stand in for it: the sum over those that apply is scaled by the weight of
    all over the weight of those (absolute values). So completions with and without target are paid on one scale.
    """

    def __call__(
        self, parts: Mapping[str, Tensor], weights: Mapping[str, float], applies: Mapping[str, Tensor], k: int
    ) -> Tensor:
        total, present, whole = (torch.zeros_like(next(iter(parts.values()))) for _ in range(3))
        for name, part in parts.items():
            there = applies.get(name, torch.ones_like(part, dtype=torch.bool))
            total = total + weights[name] * torch.where(there, part, 0.0)
            present = present + abs(weights[name]) * there
            whole = whole + abs(weights[name])
        return torch.where(present > 0, total * whole / present.where(present > 0, 1.0), 0.0)


class NormalizeThenSum(RewardAggregation):
    """Each reward less its mean over the prompt's k completions, over their standard deviation; then the weighted sum.

    A reward of small spread weighs as much as one of large spread (GDPO, arXiv 2601.05242, without its last step, a
    normalisation over the batch). Needs k ≥ 2. Before it is clipped the sum has mean 0 in every group: it says which of
    a prompt's completions is better and nothing about the prompt. It is the policy's reward only: the discriminator
    still regresses the weighted sum (``Scores.total``), since a number that is relative to its group is no property of
    one completion, which is all that the discriminator reads.

    Args:
        clip: The sum is cut to ± this.
        epsilon: Added to the standard deviation, so that a group of equal rewards gives 0.
    """

    needs_group = True

    def __init__(self, clip: float = 5.0, epsilon: float = 1e-4) -> None:
        if clip <= 0:
            raise LoraGANError(f"clip must be > 0, got {clip}; a large one, 1e9 say, never clips")
        self.clip = clip
        self.epsilon = epsilon

    def __call__(
        self, parts: Mapping[str, Tensor], weights: Mapping[str, float], applies: Mapping[str, Tensor], k: int
    ) -> Tensor:
        if k == 1:
            raise LoraGANError(
                "NormalizeThenSum compares the completions to one prompt: set num_generations to 2 or more"
            )
        normalised = {n: group_normalise(part, k, self.epsilon) if len(part) else part for n, part in parts.items()}
        return WeightedSum()(normalised, weights, applies, k).clamp(-self.clip, self.clip)


# asking one reward


@dataclass(frozen=True)
class _Asked:
    scores: Tensor  # (N,)
    applies: Tensor  # (N,) bool


def _ask(reward: Reward, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> _Asked:
    """Show a reward the completions that it applies to, if any; the others get 0."""
    device = context.logprobs.device
    if not completions:
        return _Asked(torch.zeros(0, device=device), torch.zeros(0, dtype=torch.bool, device=device))
    chosen = [b for b, there in enumerate(reward.applies(batch, context.num_generations)) if there]
    if len(chosen) == len(batch):
        scores = _checked(reward, completions, batch, context).to(device)
        return _Asked(scores, torch.ones_like(scores, dtype=torch.bool))
    rows = [n for b in chosen for n in range(b * context.num_generations, (b + 1) * context.num_generations)]
    scores = torch.zeros(len(completions), device=device)
    applies = torch.zeros(len(completions), dtype=torch.bool, device=device)
    if rows:
        shown = _checked(reward, [completions[n] for n in rows], batch.of(chosen), _rows(context, rows))
        scores[rows] = shown.to(device)
        applies[rows] = True
    return _Asked(scores, applies)


def _rows(context: RewardContext, rows: Sequence[int]) -> RewardContext:
    """Some of the context's completions."""
    tensors = {f.name: getattr(context, f.name) for f in fields(context) if f.name != "num_generations"}
    return replace(context, **{name: tensor[list(rows)] for name, tensor in tensors.items()})


def _checked(reward: Reward, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
    part = reward(completions, batch, context)
    where = f"reward {reward.name!r} ({type(reward).__name__})"
    if not isinstance(part, Tensor) or part.shape != (len(completions),):
        got = f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
        raise RewardError(
            f"{where} must return a tensor of shape ({len(completions)},), one number a completion; got {got}"
        )
    bad = (~part.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise RewardError(f"{where} returned {part[bad[0]].item()} for the completion {completions[bad[0]]!r}")
    return part.detach().float()
