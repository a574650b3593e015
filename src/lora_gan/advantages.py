"""Whose merit was it: rewards of whole answers → advantages of their tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lora_gan.tensors import masked_mean
from lora_gan.types import Credit, Judgement, Rollout


class AdvantageEstimator(ABC):
    """Compares each answer's reward with what was to be expected."""

    needs_baseline = False  # True: a callback has to keep the module's knob ``baseline``
    needs_group = False  # True: needs at least two answers for each prompt

    @abstractmethod
    def __call__(self, rollout: Rollout, rewards: Tensor, judgement: Judgement, baseline: Tensor) -> Credit:
        """Advantages (N, T), without gradient.

        Args:
            rollout: The sampled answers.
            rewards: (N,) what the policy is paid, the adversarial part included.
            judgement: The discriminator's view of the answers.
            baseline: The module's knob, a scalar.
        """


class MovingAverage(AdvantageEstimator):
    """Reward less a moving average of past rewards (Williams 1992).

    The average is the knob ``baseline``, kept by ``lora_gan.callbacks.MovingAverageBaseline``.
    """

    needs_baseline = True

    def __call__(self, rollout: Rollout, rewards: Tensor, judgement: Judgement, baseline: Tensor) -> Credit:
        return _spread(rewards - baseline, rollout)


class LeaveOneOut(AdvantageEstimator):
    """Reward less the mean reward of the other answers to the same prompt (RLOO, arXiv 2402.14740)."""

    needs_group = True

    def __call__(self, rollout: Rollout, rewards: Tensor, judgement: Judgement, baseline: Tensor) -> Credit:
        groups = rewards.view(-1, rollout.k)
        others = (groups.sum(1, keepdim=True) - groups) / (rollout.k - 1)
        return _spread((groups - others).flatten(), rollout)


class GroupNormalised(AdvantageEstimator):
    """Reward less the mean of the prompt's answers, over their standard deviation (GRPO, arXiv 2402.03300).

    Args:
        epsilon: Added to the standard deviation, so that a group of equal rewards gives 0.
    """

    needs_group = True

    def __init__(self, epsilon: float = 1e-4) -> None:
        self.epsilon = epsilon

    def __call__(self, rollout: Rollout, rewards: Tensor, judgement: Judgement, baseline: Tensor) -> Credit:
        groups = rewards.view(-1, rollout.k)
        centred = groups - groups.mean(1, keepdim=True)
        return _spread((centred / (groups.std(1, keepdim=True) + self.epsilon)).flatten(), rollout)


def _spread(advantages: Tensor, rollout: Rollout) -> Credit:
    """Every token of an answer gets the answer's advantage: (N,) → (N, T)."""
    tokens = (advantages.detach()[:, None] * rollout.mask).float()
    return Credit(tokens, {"policy/advantage_abs": masked_mean(tokens.abs(), rollout.mask)})
