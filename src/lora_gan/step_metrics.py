"""What a training step logs about its samples, its rewards and the discriminator; each loss logs its own metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_gan.rewards import AdversarialReward, Reward
from lora_gan.tensors import kl_k3, masked_mean
from lora_gan.types import ENTROPY, KL, MEAN_LENGTH, REWARD, DiscriminatorScores, Rollout, Scores, TokenRewards


def step_metrics(rollout: Rollout, scores: Scores, rewards: TokenRewards) -> dict[str, Tensor]:
    """Rewards, KL and entropy (nats per token), length (tokens) of the samples; the reward of the targets.

    ``reward/<name>`` is the reward before its weight, but ``reward/adversarial`` is what the discriminator adds to
    ``reward/total``. ``reward/frac_reward_zero_std`` (TRL's name) is the share of prompts whose completions
    all have the same reward.
    """
    metrics = {}
    if len(scores.target_total):
        metrics["reward/target"] = scores.target_total.mean()
    if len(rollout):
        metrics |= {f"reward/{name}": masked_mean(x, scores.applies[name]) for name, x in scores.parts.items()}
        metrics[REWARD] = rewards.returns.mean()
        if rollout.num_generations > 1:
            groups = rewards.returns.view(-1, rollout.num_generations)
            metrics["reward/frac_reward_zero_std"] = (groups == groups[:, :1]).all(1).float().mean()
        if rewards.adversarial is not None:
            metrics["reward/adversarial"] = rewards.adversarial.mean()
        metrics[KL] = masked_mean(kl_k3(rollout.logprobs, scores.reference_logprobs), rollout.mask)
        metrics[ENTROPY] = -masked_mean(rollout.logprobs, rollout.mask)
        metrics[MEAN_LENGTH] = rollout.mask.sum(-1).float().mean()
        metrics["completions/truncated_fraction"] = rollout.truncated.float().mean()
    return metrics


def own_metrics(rewards: Sequence[Reward]) -> dict[str, Tensor]:
    """What the rewards report about themselves, such as the requests of a judge."""
    return {name: torch.tensor(value) for reward in rewards for name, value in reward.metrics().items()}


def adversarial_metrics(scores: DiscriminatorScores | None, reward: AdversarialReward) -> dict[str, Tensor]:
    """The discriminator's own metrics and, in self-play, the share of wins; nothing in a step without it."""
    if scores is None:
        return {}
    won = {"reward/win_rate": reward(scores).mean()} if reward.needs_opponent else {}
    return {**scores.metrics, **won}
