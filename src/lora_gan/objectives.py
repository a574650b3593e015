"""What the discriminator learns: scores of branches and rewards → its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_gan.types import LossTerm, Scores

SAMPLED, TARGET, JUNK = "sampled", "target", "junk"


class DiscriminatorObjective(ABC):
    """Turns the discriminator's scores into its loss."""

    @abstractmethod
    def __call__(self, judged: Mapping[str, Tensor], scores: Scores) -> LossTerm:
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

    def __call__(self, judged: Mapping[str, Tensor], scores: Scores) -> LossTerm:
        wanted = {
            SAMPLED: scores.total,
            TARGET: scores.target_total,
            JUNK: torch.full_like(judged[JUNK], self.junk_reward),
        }
        errors = {kind: (judged[kind] - wanted[kind]).square().mean() for kind in wanted if len(judged[kind])}
        return LossTerm(
            torch.stack(list(errors.values())).mean(),
            {f"judge/error_{kind}": error.detach() for kind, error in errors.items()},
        )


def judge_metrics(judged: Mapping[str, Tensor], scores: Scores, junk_prompt: Tensor) -> dict[str, Tensor]:
    """How good the discriminator was on answers that it had not learned from.

    Args:
        judged: Its scores by kind.
        scores: The rewards of the same answers.
        junk_prompt: (M,) the prompt that each junk branch answers.
    """
    metrics = {f"judge/score_{kind}": scored.mean() for kind, scored in judged.items() if len(scored)}
    if len(judged[JUNK]):
        metrics["judge/accuracy"] = (judged[TARGET][junk_prompt] > judged[JUNK]).float().mean()
    if len(scores.total) > 1:
        metrics["judge/correlation"] = _correlation(judged[SAMPLED], scores.total)
    return metrics


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's; 0 where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    return torch.nn.functional.cosine_similarity(x, y, dim=0)
