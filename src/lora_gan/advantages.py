"""Advantage estimators: rewards of completions → advantages of their tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_gan.errors import LoraGANError
from lora_gan.tensors import group_normalise, masked_mean, whiten
from lora_gan.types import Advantages, Rollout, TokenRewards


class AdvantageEstimator(ABC):
    """Compares each completion's reward with a baseline."""

    needs_baseline = False  # True: a callback must update the module's coefficient ``baseline``
    needs_group = False  # True: needs at least two completions for each prompt
    needs_discriminator = False  # True: needs the discriminator's scores
    needs_values = False  # True: needs a value head

    @abstractmethod
    def __call__(self, rollout: Rollout, rewards: TokenRewards) -> Advantages:
        """Advantages (N, T), without gradient.

        Args:
            rollout: The sampled completions.
            rewards: Rewards of the policy, the adversarial reward included, with baseline, predictions and values.
        """


class MovingAverage(AdvantageEstimator):
    """Reward minus a moving average of past rewards (Williams 1992).

    The average is the coefficient ``baseline``, kept by ``lora_gan.callbacks.MovingAverageBaseline``.
    """

    needs_baseline = True

    def __call__(self, rollout: Rollout, rewards: TokenRewards) -> Advantages:
        return _spread(rewards.returns - rewards.baseline, rollout)


class LeaveOneOut(AdvantageEstimator):
    """Reward minus the mean reward of the other completions to the same prompt (RLOO, arXiv 2402.14740)."""

    needs_group = True

    def __call__(self, rollout: Rollout, rewards: TokenRewards) -> Advantages:
        groups = rewards.returns.view(-1, rollout.num_generations)
        others = (groups.sum(1, keepdim=True) - groups) / (rollout.num_generations - 1)
        return _spread((groups - others).flatten(), rollout)


SCALES = ("group", "batch", "none")


class GroupNormalised(AdvantageEstimator):
    """Reward minus the mean of the prompt's completions, divided by a standard deviation (GRPO, arXiv 2402.03300).

    Args:
        epsilon: Added to the standard deviation, so that a group of equal rewards gives 0.
        scale_rewards: Whose standard deviation: "group", the prompt's own completions; "batch", all completions of the
            step in this process (arXiv 2508.08221), so prompts that are nearly solved or hopeless do not count more;
            "none": it is not divided (Dr. GRPO, arXiv 2503.20783). The names are TRL's.
    """

    needs_group = True

    def __init__(self, epsilon: float = 1e-4, scale_rewards: str = "group") -> None:
        if scale_rewards not in SCALES:
            raise LoraGANError(f"scale_rewards must be group, batch or none, got {scale_rewards!r}")
        self.epsilon = epsilon
        self.scale_rewards = scale_rewards

    def __call__(self, rollout: Rollout, rewards: TokenRewards) -> Advantages:
        if self.scale_rewards == "group":
            return _spread(group_normalise(rewards.returns, rollout.num_generations, self.epsilon), rollout)
        groups = rewards.returns.view(-1, rollout.num_generations)
        centred = (groups - groups.mean(1, keepdim=True)).flatten()
        scale = rewards.returns.std() + self.epsilon if self.scale_rewards == "batch" else 1.0
        return _spread(centred / scale, rollout)


class PredictedReward(AdvantageEstimator):
    """Reward minus the discriminator's prediction for the completion: the discriminator as critic.

    Meant for a discriminator trained with :class:`~lora_gan.discriminator.RewardRegression`.
    """

    needs_discriminator = True

    def __call__(self, rollout: Rollout, rewards: TokenRewards) -> Advantages:
        # a step that samples for its KL term only (policy 0) may leave the discriminator out
        predicted = torch.zeros_like(rewards.returns) if rewards.predicted is None else rewards.predicted
        return _spread(rewards.returns - predicted, rollout)


class RewardToGo(AdvantageEstimator):
    """A token's own reward and those of later tokens, Σ_l γ^l·r_{t+l}, without a baseline.

    For rewards that stand at every token, as in on-policy distillation.

    Args:
        gamma: γ, from 0 (each token has its own reward alone) to 1.
    """

    def __init__(self, gamma: float = 0.0) -> None:
        if not 0 <= gamma <= 1:
            raise LoraGANError(f"gamma must be in [0, 1], got {gamma}")
        self.gamma = gamma

    def __call__(self, rollout: Rollout, rewards: TokenRewards) -> Advantages:
        advantages = torch.where(rollout.mask, discounted(rewards.per_token.detach(), self.gamma), 0)
        return Advantages(advantages, {"policy/advantage_abs": masked_mean(advantages.abs(), rollout.mask)})


class ValueGAE(AdvantageEstimator):
    """Generalised advantage estimation over tokens with a value head (arXiv 1506.02438).

    Args:
        gamma: γ, discount factor per token.
        gae_lambda: λ, from 0 (one-step temporal difference) to 1 (reward-to-go minus value).
        normalise: Whether to give advantages mean 0 and standard deviation 1 over the tokens of the batch.
    """

    needs_values = True

    def __init__(self, gamma: float = 1.0, gae_lambda: float = 0.95, normalise: bool = True) -> None:
        if not (0 <= gamma <= 1 and 0 <= gae_lambda <= 1):
            raise LoraGANError(f"gamma and gae_lambda must be in [0, 1], got {gamma} and {gae_lambda}")
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.normalise = normalise

    def __call__(self, rollout: Rollout, rewards: TokenRewards) -> Advantages:
        assert rewards.values is not None
        values = rewards.values.detach()
        advantages = gae(rewards.per_token.detach(), values, rollout.mask, self.gamma, self.gae_lambda)
        returns = torch.where(rollout.mask, advantages + values, 0)
        shown = {
            "policy/advantage_abs": masked_mean(advantages.abs(), rollout.mask),
            "value/mean": masked_mean(values, rollout.mask),
            "value/explained_variance": _explained(returns, values, rollout.mask),
        }
        used = whiten(advantages, rollout.mask) if self.normalise else advantages
        return Advantages(used, shown, returns, values)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ·V_{t+1} − V_t, all (N, T); 0 where masked (arXiv 1506.02438, eq. 16).

    The value after the last token is 0.
    """
    values = torch.where(mask, values, 0)
    later = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    deltas = torch.where(mask, rewards + gamma * later - values, 0)
    return torch.where(mask, discounted(deltas, gamma * gae_lambda), 0)


def discounted(x: Tensor, factor: float) -> Tensor:
    """Σ_l factor^l·x_{t+l}, (N, T): sums of twice as many terms each time, so log₂ T operations and not T."""
    terms = 1
    while terms < x.shape[1]:
        x = x + factor**terms * pad(x[:, terms:], (0, terms))
        terms *= 2
    return x


def _explained(returns: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance explained by the values: 1 is all, 0 none, below 0 worse than their mean."""
    wanted, error = returns[mask], (returns - values)[mask]
    return 1 - error.var(correction=0) / wanted.var(correction=0).clamp(min=1e-8)


def _spread(advantages: Tensor, rollout: Rollout) -> Advantages:
    """Give every token the advantage of its completion: (N,) → (N, T)."""
    tokens = (advantages.detach()[:, None] * rollout.mask).float()
    return Advantages(tokens, {"policy/advantage_abs": masked_mean(tokens.abs(), rollout.mask)})
