"""Function reward: a user's function of completion and target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_gan.errors import RewardError
from lora_gan.rewards.base import Reward
from lora_gan.types import PromptBatch, RewardContext


class FunctionReward(Reward):
    """A user's function ``f(response, target) -> float``, given by its import path; it may have any range.

    Args:
        function: Import path of the function, such as my_rewards.closeness.
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``; by default the function's name.
        batched: Call it once with the lists of responses and targets; it returns a number for each response.
        needs_target: Whether it applies only to prompts with a target; set false if it ignores the target.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        weight: float = 1.0,
        name: str | None = None,
        batched: bool = False,
        needs_target: bool = True,
    ) -> None:
        super().__init__(weight, name or str(getattr(function, "__name__", "function")))
        self.function = function
        self.batched = batched
        self.needs_target = needs_target

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        targets = [batch.targets[n // context.num_generations] for n in range(len(completions))]
        if not self.batched:
            scores = [
                float(self.function(completion, target))
                for completion, target in zip(completions, targets, strict=True)
            ]
            return torch.tensor(scores)
        found = torch.as_tensor(self.function(list(completions), targets), dtype=torch.float32)
        if found.shape != (len(completions),):
            raise RewardError(
                f"reward {self.name!r} is batched: it must return {len(completions)} numbers, one per response; "
                f"got shape {tuple(found.shape)}"
            )
        return found
