"""Answer rewards: the final answer of a completion against the accepted ones; the work before it is not judged."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError
from lora_gan.final_answer import FinalAnswer, find_answer
from lora_gan.rewards.base import Reward, answers_of
from lora_gan.text_metrics import matches
from lora_gan.types import Example, PromptBatch, RewardContext

TIMEOUT = 5  # seconds for one expression


class FinalAnswerReward(Reward):
    """1 for a right final answer, else 0; applies to prompts with accepted final answers."""

    def applies_in(self, batch: PromptBatch, context: RewardContext) -> list[bool]:
        return [bool(answers_of(example, context.final_answer)) for example in batch.examples]

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        right = [
            self.is_right(completion, batch.examples[n // context.num_generations], context.final_answer)
            for n, completion in enumerate(completions)
        ]
        return torch.tensor(right, dtype=torch.float32)

    @abstractmethod
    def is_right(self, completion: str, example: Example, final_answer: FinalAnswer | None) -> bool:
        """Whether the final answer of the completion is an accepted one; False where it has none."""


class AnswerReward(FinalAnswerReward):
    """1 if the final answer equals an accepted one, ignoring case, outer white space and a final full stop, else 0.

    The module's ``final_answer`` finds it; without that setting the whole completion is the answer. Accepted are the
    ``answers`` of the example or, where it has none, the final answers of its references. Prompts without accepted
    answers are left out; a prompt without target can have them.

    Args:
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``.
    """

    def __init__(self, weight: float = 1.0, name: str = "answer") -> None:
        super().__init__(weight, name)

    def is_right(self, completion: str, example: Example, final_answer: FinalAnswer | None) -> bool:
        return is_right(completion, example, final_answer)


def is_right(completion: str, example: Example, final_answer: FinalAnswer | None) -> bool:
    """:class:`AnswerReward` of one completion."""
    answer = find_answer(completion, final_answer)
    return answer is not None and matches(answer, answers_of(example, final_answer))


class MathReward(FinalAnswerReward):
    """1 if the final answer is mathematically equal to an accepted one, such as 0.5 and 1/2, else 0.

    The library math-verify reads numbers, sets, intervals, equations and LaTeX, and compares them by sympy. Without
    the module's ``final_answer`` it looks for the answer in the completion itself. Otherwise as :class:`AnswerReward`;
    what it accepts, this reward accepts, too.

    Args:
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``.

    Raises:
        LoraGANError: math-verify is not installed.
    """

    def __init__(self, weight: float = 1.0, name: str = "math") -> None:
        super().__init__(weight, name)
        _math_verify()

    def is_right(self, completion: str, example: Example, final_answer: FinalAnswer | None) -> bool:
        answer, accepted = find_answer(completion, final_answer), answers_of(example, final_answer)
        if answer is None or matches(answer, accepted):
            return answer is not None
        bare = final_answer is not None
        found = _parsed(answer, bare)
        return any(_equal(_parsed(text, bare or bool(example.answers)), found) for text in accepted)


@lru_cache(maxsize=4096)
def _parsed(text: str, bare: bool) -> list[Any]:
    """What math-verify reads in a text; a bare expression is boxed, as it finds LaTeX in its delimiters only."""
    found: list[Any] = _math_verify().parse(f"\\boxed{{{text}}}" if bare else text, parsing_timeout=_timeout())
    return found


def _equal(accepted: list[Any], found: list[Any]) -> bool:
    return bool(_math_verify().verify(accepted, found, timeout_seconds=_timeout()))


def _timeout() -> int | None:
    """The limit, which math-verify can only set in the main thread."""
    return TIMEOUT if threading.current_thread() is threading.main_thread() else None


def _math_verify() -> Any:
    try:
        import math_verify  # here, because it imports sympy, which takes a second
    except ImportError as error:
        raise LoraGANError("MathReward needs the library math-verify: pip install math-verify") from error
    return math_verify
