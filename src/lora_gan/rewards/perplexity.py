"""Perplexity reward: fluency under the base."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lora_gan.rewards.base import Reward
from lora_gan.tensors import masked_row_mean
from lora_gan.types import PromptBatch, RewardContext


class PerplexityReward(Reward):
    """1 / (1 + perplexity) of the completion given its prompt, under the base (adapters off), in (0, 0.5].

    It needs no extra pass: the base's log-probabilities are computed for the KL estimate anyway.

    Args:
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``.
    """

    def __init__(self, weight: float = 0.3, name: str = "perplexity") -> None:
        super().__init__(weight, name)

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        perplexity = (-masked_row_mean(context.logprobs, context.mask)).clamp(max=80).exp()
        return 1 / (1 + perplexity)
