"""The seam of rewards, and their weighted sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError, RewardError
from lora_gan.types import PromptBatch, RewardContext


class Reward(ABC):
    """Scores N answers at once.

    Args:
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``.
    """

    def __init__(self, weight: float, name: str) -> None:
        self.weight = weight
        self.name = name

    @abstractmethod
    def __call__(self, answers: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        """(N,) scores, higher is better; answer n belongs to ``batch.examples[n // context.k]``."""


@dataclass(frozen=True)
class RewardSum:
    total: Tensor  # (N,)
    parts: Mapping[str, Tensor]  # name → (N,), before the weights


def weighted_sum(
    rewards: Sequence[Reward], answers: Sequence[str], batch: PromptBatch, context: RewardContext
) -> RewardSum:
    """Ask every reward and add them up by weight.

    Raises:
        RewardError: A reward gave something other than N finite numbers.
    """
    device = context.logprobs.device
    total = torch.zeros(len(answers), device=device)
    parts = {}
    for reward in rewards:
        part = reward(answers, batch, context)
        _check(reward, part, answers)
        parts[reward.name] = part.detach().float().to(device)
        total = total + reward.weight * parts[reward.name]
    return RewardSum(total, parts)


def check_names(rewards: Sequence[Reward]) -> None:
    """Two rewards of one name would overwrite each other in the logs."""
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise LoraGANError(f"two rewards are called {name!r}; give one of them another name: in its init_args")


def _check(reward: Reward, part: Tensor, answers: Sequence[str]) -> None:
    where = f"reward {reward.name!r} ({type(reward).__name__})"
    if not isinstance(part, Tensor) or part.shape != (len(answers),):
        got = f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
        raise RewardError(f"{where} must return a tensor of shape ({len(answers)},), one number an answer; got {got}")
    bad = (~part.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise RewardError(f"{where} returned {part[bad[0]].item()} for the answer {answers[bad[0]]!r}")
