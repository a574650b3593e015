"""Function rewards: a user's function of completion and target, or of a whole set of them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_gan.errors import RewardError
from lora_gan.rewards.base import Reward
from lora_gan.text_metrics import distinct_n
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

    wanted = "a number for each completion, got {got}; set batched: true if it takes and returns lists"

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
        targets = _targets(batch, context, len(completions))
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
            raise RewardError(f"reward {self.name!r} must return {self.wanted.format(got=_short(returned))}") from error

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


def distinct_bigrams(responses: Sequence[str], targets: Sequence[str]) -> float:
    """Share of distinct word bigrams among all bigrams of a set, in [0, 1] (distinct-2, Li et al. 2016)."""
    return distinct_n(responses, 2)


class SetReward(FunctionReward):
    """A metric of a set: one number for all completions of an evaluation or a step, which each of them gets.

    Evolution compares members by it (:class:`~lora_gan.evolution.EvolutionStrategy`). A policy gradient does not learn
    which completion earned it: within a prompt's group the advantage is 0, and against another baseline it is noise.

    Args:
        function: Import path of a function ``f(responses, targets) -> float`` of two lists; it may have any range.
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``; by default the function's name.
        needs_target: Whether the set is that of the prompts with a target.
    """

    wanted = "one number for the whole set, got {got}; FunctionReward takes a function of each completion"

    def __init__(
        self,
        function: Callable[..., Any] = distinct_bigrams,
        weight: float = 1.0,
        name: str | None = None,
        needs_target: bool = False,
    ) -> None:
        super().__init__(function, weight, name, needs_target=needs_target)

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        targets = _targets(batch, context, len(completions))
        return torch.full((len(completions),), self._number(self._called(list(completions), targets)))


def _targets(batch: PromptBatch, context: RewardContext, count: int) -> list[str]:
    """The target of each completion's prompt."""
    return [batch.targets[n // context.num_generations] for n in range(count)]


def _short(value: Any) -> str:
    """The value as Python writes it, cut off."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:79] + '…'}"
