"""Length and repetition rewards; they need no target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError
from lora_gan.rewards.base import Reward
from lora_gan.text_metrics import repetition
from lora_gan.types import PromptBatch, RewardContext


class RepetitionPenalty(Reward):
    """Minus the share of the completion that is repetition, in [−1, 0].

    The larger of two shares counts: n-grams that occurred before, and words and symbols in the longest loop, a unit
    that is repeated without a gap ("very very very very", "!!!!!!").

    Args:
        weight: Factor in the total reward.
        n: Length of the n-grams in words and symbols.
        loop: Smallest number of repetitions in a row that is a loop.
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
    """1 for a length from ``shortest`` to ``longest``, length / shortest below, longest / length above; in (0, 1].

    Args:
        shortest: Smallest wanted length in tokens, EOS included.
        longest: Largest wanted length in tokens, EOS included.
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``.
    """

    def __init__(self, shortest: int = 1, longest: int = 64, weight: float = 1.0, name: str = "length") -> None:
        super().__init__(weight, name)
        if not 1 <= shortest <= longest:
            raise LoraGANError(f"need 1 <= shortest <= longest, got {shortest} and {longest}")
        self.shortest = shortest
        self.longest = longest

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        length = context.mask.sum(-1).clamp(min=1).float()
        return torch.minimum(length / self.shortest, self.longest / length).clamp(max=1)


class OverlongPenalty(Reward):
    """0 up to ``longest`` − ``ramp`` tokens, from there a line to −1 at ``longest`` (DAPO, arXiv 2503.14476, eq. 13).

    A completion that is cut off at the limit is then not the first one that is punished: those shortly before it are,
    too, and the policy learns where to end.

    Args:
        longest: Length in tokens, EOS included, from which the penalty is −1; such as ``sampling.max_new_tokens``.
        ramp: Tokens before it on which the penalty grows.
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``.
    """

    def __init__(self, longest: int, ramp: int, weight: float = 1.0, name: str = "overlong") -> None:
        super().__init__(weight, name)
        if not 1 <= ramp <= longest:
            raise LoraGANError(f"need 1 <= ramp <= longest, got {ramp} and {longest}")
        self.longest = longest
        self.ramp = ramp

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        length = context.mask.sum(-1).float()
        return ((self.longest - self.ramp - length) / self.ramp).clamp(-1, 0)
