"""What the discriminator learns: scores of branches and rewards → its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_gan.types import Scores

SAMPLED, TARGET, JUNK = "sampled", "target", "junk"


@dataclass(frozen=True)
class ObjectiveResult:
    loss: Tensor  # scalar with gradient
    metrics: Mapping[str, Tensor]


class DiscriminatorObjective(ABC):
    """Turns the discriminator's scores into its loss."""

    @abstractmethod
    def __call__(self, judged: Mapping[str, Tensor], scores: Scores) -> ObjectiveResult:
        """The loss of one round.

        Args:
            judged: Discriminator's scores by kind: "sampled" (N,), "target" (B,), "junk" (M,).
            scores: The rewards of the same sampled answers (N,) and targets (B,).
        """


class RewardRegression(DiscriminatorObjective):
    """Predict the reward: mean squared error over all branches, each kind weighing the same.

    Junk is labelled by hand, because a similarity reward gives a fluent wrong answer nearly the target's score.

    Args:
        junk_reward: What the discriminator shall predict for junk and hard negatives.
    """

    def __init__(self, junk_reward: float = 0.0) -> None:
        self.junk_reward = junk_reward

    def __call__(self, judged: Mapping[str, Tensor], scores: Scores) -> ObjectiveResult:
        wanted = {
            SAMPLED: scores.total,
            TARGET: scores.target_total,
            JUNK: torch.full_like(judged[JUNK], self.junk_reward),
        }
        errors = {kind: (judged[kind] - wanted[kind]).square().mean() for kind in wanted if len(judged[kind])}
        return ObjectiveResult(
            torch.stack(list(errors.values())).mean(),
            {f"judge/error_{kind}": error.detach() for kind, error in errors.items()},
        )
