"""Reward interface, and the aggregation of several rewards into one number."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError, RewardError
from lora_gan.final_answer import FinalAnswer, find_answer
from lora_gan.tensors import group_normalise, ranking_auc
from lora_gan.types import Example, PromptBatch, RewardContext


class Reward(ABC):
    """Scores N completions at once.

    Args:
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``.
    """

    needs_target: bool = False  # True: does not apply to prompts without a target
    asks_policy: bool = False  # True: needs ``RewardContext.policy``, which evolution cannot give
    needs_group: bool = False  # True: needs at least two completions for each prompt
    in_background: bool = False  # True: ``start`` computes it while other things are done
    may_skip: bool = False  # True: it may leave a prompt out, whose completions all get NaN

    def __init__(self, weight: float, name: str) -> None:
        if not math.isfinite(weight):
            raise LoraGANError(f"the weight of the reward {name} must be a finite number, got {weight}")
        self.weight = weight
        self.name = name

    def check(self, final_answer: FinalAnswer | None) -> None:  # noqa: B027
        """Refuse a module without what the reward needs; the module calls it before training."""

    @abstractmethod
    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        """(N,) scores, higher is better; completion n belongs to ``batch.examples[n // context.num_generations]``."""

    def applies(self, batch: PromptBatch, k: int) -> list[bool]:
        """Whether the reward applies to each of the B prompts; it only gets the k completions to those."""
        return [not self.needs_target or bool(references_of(example)) for example in batch.examples]

    def applies_in(self, batch: PromptBatch, context: RewardContext) -> list[bool]:
        """:meth:`applies`, for a reward that must know the context to decide it."""
        return self.applies(batch, context.num_generations)

    def prepare(self) -> None:  # noqa: B027 — optional
        """Check what only shows in use, such as a server; called when a fit starts.

        Raises:
            LoraGANError: The reward cannot be computed.
        """

    def start(self, completions: Sequence[str], batch: PromptBatch, num_generations: int) -> None:  # noqa: B027
        """Begin work that can go on in the background; called as soon as completions exist, before any ``__call__``."""

    def metrics(self) -> dict[str, float]:
        """What a step logs about the reward besides its value, by log key."""
        return {}


def references_of(example: Example) -> tuple[str, ...]:
    """The accepted completions of an example; empty for a prompt without a target."""
    return tuple(text for text in example.references or (example.target,) if text.strip())


def answers_of(example: Example, final_answer: FinalAnswer | None) -> tuple[str, ...]:
    """The accepted final answers of an example: those given, else those found in its references; empty for none."""
    given = tuple(text for text in example.answers if text.strip())
    found = (find_answer(text, final_answer) for text in references_of(example))
    return given or tuple(dict.fromkeys(text for text in found if text))


ADVERSARIAL = "adversarial"  # the discriminator's part among the rewards


@dataclass(frozen=True)
class RewardSum:
    total: Tensor  # (N,) weighted sum
    parts: Mapping[str, Tensor]  # name → (N,), before the weights; 0 where the reward does not apply
    applies: Mapping[str, Tensor]  # name → (N,) bool


def weighted_sum(
    rewards: Sequence[Reward], completions: Sequence[str], batch: PromptBatch, context: RewardContext
) -> RewardSum:
    """Compute every reward and add them up by weight, see :class:`WeightedSum`.

    Raises:
        RewardError: A reward returned something other than N finite numbers.
    """
    computed = {reward.name: _compute(reward, completions, batch, context) for reward in rewards}
    parts = {name: one.scores for name, one in computed.items()}
    applies = {name: one.applies for name, one in computed.items()}
    total = (
        WeightedSum()(parts, weights_of(rewards), applies, context.num_generations)
        if computed
        else torch.zeros(len(completions))
    )
    return RewardSum(total.to(context.logprobs.device), parts, applies)


def weights_of(rewards: Sequence[Reward]) -> dict[str, float]:
    """Weight by name."""
    return {reward.name: reward.weight for reward in rewards}


def check_names(rewards: Sequence[Reward]) -> None:
    """Check that no two rewards have the same name; they would overwrite each other in the logs.

    Raises:
        LoraGANError: Two rewards have the same name, or one that is taken.
    """
    names = [reward.name for reward in rewards]
    if ADVERSARIAL in names:
        raise LoraGANError("the name 'adversarial' stands for the discriminator's part; set another name: in init_args")
    for name in names:
        if names.count(name) > 1:
            raise LoraGANError(f"two rewards are named {name!r}; set another name: in the init_args of one of them")


# aggregation


class RewardAggregation(ABC):
    """Combines the rewards of each completion into one number, the reward of the policy."""

    needs_group = False  # True: needs at least two completions for each prompt

    def check(self, names: Sequence[str]) -> None:  # noqa: B027
        """Refuse rewards of these names; the module calls it before training."""

    @abstractmethod
    def __call__(
        self, parts: Mapping[str, Tensor], weights: Mapping[str, float], applies: Mapping[str, Tensor], k: int
    ) -> Tensor:
        """The combined reward, (N,).

        Args:
            parts: Rewards by name, at least one, each (N,); the adversarial reward may be among them.
            weights: The weight of each part.
            applies: By name, (N,) bool: False where the reward does not apply. A missing part applies everywhere.
            k: Completions for each prompt.
        """


class WeightedSum(RewardAggregation):
    """Sum of weight · reward.

    Where a reward does not apply, the sum of the others is scaled up: multiplied by the weight of all rewards and
    divided by the weight of those that apply (absolute values). So completions with and without a target are rewarded
    on one scale.
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
    """Weighted sum of normalised rewards: (reward − mean) / (std + epsilon) over each prompt's k completions.

    A reward with a small spread weighs as much as one with a large spread (GDPO, arXiv 2601.05242, without its last
    step, a normalisation over the batch). Needs k ≥ 2. Before clipping, the sum has mean 0 in every group: it compares
    the completions to one prompt and says nothing about the prompt. It is the policy's reward only: the discriminator
    still regresses the weighted sum (``Scores.total``), because it reads one completion at a time and cannot predict a
    number that is relative to the group.

    Args:
        clip: The sum is clipped to [−clip, clip].
        epsilon: Added to the standard deviation, so that a group of equal rewards gives 0.
    """

    needs_group = True

    def __init__(self, clip: float = 5.0, epsilon: float = 1e-4) -> None:
        if not clip > 0:
            raise LoraGANError(f"clip must be > 0, got {clip}; a large value such as 1e9 never clips")
        self.clip = clip
        self.epsilon = epsilon

    def __call__(
        self, parts: Mapping[str, Tensor], weights: Mapping[str, float], applies: Mapping[str, Tensor], k: int
    ) -> Tensor:
        if k == 1:
            raise LoraGANError(
                "NormalizeThenSum needs at least 2 completions for each prompt, got 1; set num_generations to 2 or more"
            )
        normalised = {n: group_normalise(part, k, self.epsilon) if len(part) else part for n, part in parts.items()}
        return WeightedSum()(normalised, weights, applies, k).clamp(-self.clip, self.clip)


class AdversarialElsewhere(RewardAggregation):
    """Weighted sum of the rewards where one applies; elsewhere the adversarial reward alone, times its weight.

    For few prompts of which the right answer is known, and many of which nothing is: the discriminator learns from
    the first to judge the others. Its reward does not count where it has learned it from.
    """

    def __call__(
        self, parts: Mapping[str, Tensor], weights: Mapping[str, float], applies: Mapping[str, Tensor], k: int
    ) -> Tensor:
        others = {name: part for name, part in parts.items() if name != ADVERSARIAL}
        if ADVERSARIAL not in parts or not others:
            return WeightedSum()(parts, weights, applies, k)
        everywhere = torch.ones_like(parts[ADVERSARIAL], dtype=torch.bool)
        known = torch.stack([applies.get(name, everywhere) for name in others]).any(0)
        summed = WeightedSum()(others, weights, applies, k)
        return torch.where(known, summed, weights[ADVERSARIAL] * parts[ADVERSARIAL])


class Guarded(RewardAggregation):
    """One reward where it applies; elsewhere the others, as far as they rank as it does where both are known.

    For few prompts of which the right answer is known: agreement, or the discriminator's score, can cease to mean
    right while the policy learns from it. On the known prompts of each step the AUC is measured: how often, of two
    completions of a prompt of which the trusted reward prefers one, the others prefer the same one (equal: half).
    Elsewhere the reward is their weighted sum times max(0, 2·AUC − 1): 1 for a perfect order, 0 from chance on
    downwards. Where there is no such pair, nothing speaks against them, and the factor is 1.

    Args:
        trusted: Name of the reward that is right where it applies.
    """

    needs_group = True

    def __init__(self, trusted: str = "answer") -> None:
        self.trusted = trusted

    def check(self, names: Sequence[str]) -> None:
        if self.trusted not in names:
            raise LoraGANError(
                f"Guarded trusts the reward {self.trusted!r}, and there is none of that name among {', '.join(names)}; "
                "set aggregation.init_args.trusted, or add the reward"
            )

    def __call__(
        self, parts: Mapping[str, Tensor], weights: Mapping[str, float], applies: Mapping[str, Tensor], k: int
    ) -> Tensor:
        self.check(list(parts))
        right = parts[self.trusted]
        known = applies.get(self.trusted, torch.ones_like(right, dtype=torch.bool))
        others = {name: part for name, part in parts.items() if name != self.trusted}
        if not others or not len(right):
            return WeightedSum()(parts, weights, applies, k)
        summed = WeightedSum()(others, weights, applies, k)
        trust = (2 * ranking_auc(summed, right, known, k) - 1).clamp(min=0)
        return torch.where(known, weights[self.trusted] * right, trust * summed)


# computing one reward


@dataclass(frozen=True)
class _Computed:
    scores: Tensor  # (N,)
    applies: Tensor  # (N,) bool


def _compute(reward: Reward, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> _Computed:
    """Compute a reward for the completions to which it applies; the others get 0."""
    device = context.logprobs.device
    scores = torch.zeros(len(completions), device=device)
    applies = torch.zeros(len(completions), dtype=torch.bool, device=device)
    if not completions:
        return _Computed(scores, applies)
    chosen = [b for b, there in enumerate(reward.applies_in(batch, context)) if there]
    rows = [n for b in chosen for n in range(b * context.num_generations, (b + 1) * context.num_generations)]
    if len(chosen) == len(batch):
        part = _checked(reward, completions, batch, context).to(device)
    elif rows:
        shown = [completions[n] for n in rows]
        part = _checked(reward, shown, batch.of(chosen), _rows(context, rows)).to(device)
    else:
        return _Computed(scores, applies)
    scores[rows] = part.nan_to_num()
    applies[rows] = ~part.isnan()  # NaN only where the reward left a prompt out
    return _Computed(scores, applies)


def _rows(context: RewardContext, rows: Sequence[int]) -> RewardContext:
    """The context of some of its completions."""
    values = {f.name: getattr(context, f.name) for f in fields(context)}
    tensors: dict[str, Any] = {name: x[list(rows)] for name, x in values.items() if isinstance(x, Tensor)}
    return replace(context, **tensors)


def _checked(reward: Reward, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
    part = reward(completions, batch, context)
    where = f"reward {reward.name!r} ({type(reward).__name__})"
    if not isinstance(part, Tensor) or part.shape != (len(completions),):
        got = f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
        raise RewardError(
            f"{where} must return a tensor of shape ({len(completions)},), one number per completion; got {got}"
        )
    left_out = part.isnan() & reward.may_skip
    groups = left_out.view(-1, context.num_generations)
    if (groups.any(1) != groups.all(1)).any():
        raise RewardError(f"{where} must leave out all completions to a prompt or none; it gave NaN to some of them")
    bad = (~part.isfinite() & ~left_out).nonzero().flatten().tolist()
    if bad:
        raise RewardError(
            f"{where} must return finite numbers, got {part[bad[0]].item()} for the completion {completions[bad[0]]!r}"
        )
    return part.detach().float()
