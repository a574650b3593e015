"""Rewards of a completion's form; they need no target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError
from lora_gan.rewards.base import Reward
from lora_gan.text_metrics import repetition
from lora_gan.types import PromptBatch, RewardContext


class RepetitionPenalty(Reward):
    """Less the share of the completion that repeats itself, in [−1, 0]; 0 where nothing does.

    The larger of two shares counts: of the n-grams that stood there before, and of the words and signs in the longest
    loop, a unit that follows itself at once ("very very very very", "!!!!!!").

    Args:
        weight: Factor in the total reward.
        n: Length of the n-grams in words and signs.
        loop: Times that a unit has to stand in a row to be a loop.
        name: Name in the logs, ``reward/<name>``.
    """

    def __init__(self, weight: float = 1.0, n: int = 3, loop: int = 4, name: str = "repetition") -> None:
        super().__init__(weight, name)
        if n < 2 or loop < 3:
            raise LoraGANError(f"n must be at least 2 and loop at least 3, got {n} and {loop}")
        self.n = n
        self.loop = loop

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        return -torch.tensor(
            [repetition(completion, self.n, self.loop) for completion in completions], dtype=torch.float32
        )


class LengthReward(Reward):
    """1 for a completion of a wanted length; length / shortest below, longest / length above; so in (0, 1].

    Args:
        shortest: Tokens that a completion should have at least, its end included.
        longest: Tokens that it should have at most.
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``.
    """

    def __init__(self, shortest: int = 1, longest: int = 64, weight: float = 1.0, name: str = "length") -> None:
        super().__init__(weight, name)
        if not 1 <= shortest <= longest:
            raise LoraGANError(f"shortest and longest must be 1 ≤ shortest ≤ longest, got {shortest} and {longest}")
        self.shortest = shortest
        self.longest = longest

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        length = context.mask.sum(-1).clamp(min=1).float()
        return torch.minimum(length / self.shortest, self.longest / length).clamp(max=1)
