"""Function reward: a user's function of completion and target."""

from __future__ import annotations

import traceback
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
                self._number(self._called(completion, target))
                for completion, target in zip(completions, targets, strict=True)
            ]
            return torch.tensor(scores)
        return self._numbers(self._called(list(completions), targets), len(completions))

    def _called(self, completions: Any, targets: Any) -> Any:
        """What the function returns; what it raises names the reward and the line."""
        try:
            return self.function(completions, targets)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise RewardError(
                f"reward {self.name!r} raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno}); "
                f"it was called with {_short(completions)} and {_short(targets)}"
            ) from error

    def _number(self, returned: Any) -> float:
        try:
            return float(returned)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(
                f"reward {self.name!r} must return a number for each completion, got {_short(returned)}; "
                "set batched: true if it takes and returns lists"
            ) from error

    def _numbers(self, returned: Any, count: int) -> Tensor:
        try:
            found = torch.as_tensor(returned, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(
                f"reward {self.name!r} is batched: it must return {count} numbers, got {_short(returned)}"
            ) from error
        if found.shape != (count,):
            raise RewardError(
                f"reward {self.name!r} is batched: it must return {count} numbers, one per response; "
                f"got shape {tuple(found.shape)}"
            )
        return found


def _short(value: Any) -> str:
    """The value as Python writes it, cut off."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:79] + '…'}"
