"""Whose merit was it: rewards of whole answers → advantages of their tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError
from lora_gan.tensors import masked_mean, whiten
from lora_gan.types import Credit, Earnings, Rollout


class AdvantageEstimator(ABC):
    """Compares each answer's reward with what was to be expected."""

    needs_baseline = False  # True: a callback has to keep the module's knob ``baseline``
    needs_group = False  # True: needs at least two answers for each prompt
    needs_judge = False  # True: needs the discriminator's scores
    needs_values = False  # True: needs a value head

    @abstractmethod
    def __call__(self, rollout: Rollout, earnings: Earnings) -> Credit:
        """Advantages (N, T), without gradient.

        Args:
            rollout: The sampled answers.
            earnings: What the policy was paid, the adversarial part included, and what was to be expected.
        """


class MovingAverage(AdvantageEstimator):
    """Reward less a moving average of past rewards (Williams 1992).

    The average is the knob ``baseline``, kept by ``lora_gan.callbacks.MovingAverageBaseline``.
    """

    needs_baseline = True

    def __call__(self, rollout: Rollout, earnings: Earnings) -> Credit:
        return _spread(earnings.per_answer - earnings.baseline, rollout)


class LeaveOneOut(AdvantageEstimator):
    """Reward less the mean reward of the other answers to the same prompt (RLOO, arXiv 2402.14740)."""

    needs_group = True

    def __call__(self, rollout: Rollout, earnings: Earnings) -> Credit:
        groups = earnings.per_answer.view(-1, rollout.k)
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

    def __call__(self, rollout: Rollout, earnings: Earnings) -> Credit:
        groups = earnings.per_answer.view(-1, rollout.k)
        centred = groups - groups.mean(1, keepdim=True)
        return _spread((centred / (groups.std(1, keepdim=True) + self.epsilon)).flatten(), rollout)


class PredictedReward(AdvantageEstimator):
    """Reward less what the discriminator predicted for the answer: the discriminator as critic.

    Meant for a discriminator that learns :class:`~lora_gan.objectives.RewardRegression`.
    """

    needs_judge = True

    def __call__(self, rollout: Rollout, earnings: Earnings) -> Credit:
        return _spread(earnings.per_answer - earnings.predicted, rollout)


class ValueGAE(AdvantageEstimator):
    """Generalised advantage estimation over tokens with a value head (arXiv 1506.02438).

    Args:
        discount: γ, what a reward one token later is worth.
        trace: λ, from 0 (one-step temporal difference) to 1 (reward to go less the value).
        normalise: Whether advantages get mean 0 and standard deviation 1 over the tokens of the batch.
    """

    needs_values = True

    def __init__(self, discount: float = 1.0, trace: float = 0.95, normalise: bool = True) -> None:
        if not (0 <= discount <= 1 and 0 <= trace <= 1):
            raise LoraGANError(f"discount and trace must be in [0, 1], got {discount} and {trace}")
        self.discount = discount
        self.trace = trace
        self.normalise = normalise

    def __call__(self, rollout: Rollout, earnings: Earnings) -> Credit:
        assert earnings.values is not None
        values = earnings.values.detach()
        advantages = gae(earnings.rewards.detach(), values, rollout.mask, self.discount, self.trace)
        returns = torch.where(rollout.mask, advantages + values, 0)
        shown = {
            "policy/advantage_abs": masked_mean(advantages.abs(), rollout.mask),
            "value/mean": masked_mean(values, rollout.mask),
            "value/explained": _explained(returns, values, rollout.mask),
        }
        used = whiten(advantages, rollout.mask) if self.normalise else advantages
        return Credit(used, shown, returns, values)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, discount: float, trace: float) -> Tensor:
    """A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ·V_{t+1} − V_t, all (N, T); 0 where masked (arXiv 1506.02438, eq. 16).

    After the last token the value is 0.
    """
    values = torch.where(mask, values, 0)
    later = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    deltas = torch.where(mask, rewards + discount * later - values, 0)
    running, advantages = torch.zeros_like(deltas[:, 0]), torch.zeros_like(deltas)
    for t in range(deltas.shape[1] - 1, -1, -1):
        running = deltas[:, t] + discount * trace * running
        advantages[:, t] = running
    return torch.where(mask, advantages, 0)


def _explained(returns: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the values explain: 1 is all, 0 none, negative worse than their mean."""
    wanted, error = returns[mask], (returns - values)[mask]
    return 1 - error.var(correction=0) / wanted.var(correction=0).clamp(min=1e-8)


def _spread(advantages: Tensor, rollout: Rollout) -> Credit:
    """Every token of an answer gets the answer's advantage: (N,) → (N, T)."""
    tokens = (advantages.detach()[:, None] * rollout.mask).float()
    return Credit(tokens, {"policy/advantage_abs": masked_mean(tokens.abs(), rollout.mask)})
