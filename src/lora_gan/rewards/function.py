"""Any function of answer and target."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_gan.rewards.base import Reward
from lora_gan.types import PromptBatch, RewardContext


class FunctionReward(Reward):
    """Your own ``f(response, target) -> float``, named by its import path.

    Args:
        function: Import path of the function, such as my_rewards.closeness.
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``; the function's own by default.
    """

    def __init__(self, function: Callable[[str, str], float], weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name or str(getattr(function, "__name__", "function")))
        self.function = function

    def __call__(self, answers: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        pairs = ((answer, batch.targets[n // context.k]) for n, answer in enumerate(answers))
        return torch.tensor([float(self.function(answer, target)) for answer, target in pairs])
