"""Function reward: what a user's function does wrong names the reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_gan.errors import RewardError
from lora_gan.rewards import FunctionReward, SetReward
from lora_gan.types import PromptBatch, RewardContext

Make = Callable[..., PromptBatch]


def score(make_batch: Make, function: Callable[..., Any], **settings: Any) -> torch.Tensor:
    context = RewardContext.__new__(RewardContext)
    object.__setattr__(context, "num_generations", 2)
    return FunctionReward(function, name="mine", **settings)(["a", "bb"], make_batch(("prompt", "target")), context)


def test_numbers_of_any_kind_are_taken(make_batch: Make) -> None:
    assert score(make_batch, lambda c, t: len(c)).tolist() == [1.0, 2.0]
    assert score(make_batch, lambda c, t: torch.tensor(0.5)).tolist() == [0.5, 0.5]
    assert score(make_batch, lambda c, t: [len(x) for x in c], batched=True).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("function", "batched", "message"),
    [
        (
            lambda c, t: None,
            False,
            "reward 'mine' must return a number for each completion, got NoneType None; set bat",
        ),
        (lambda c, t: [1, 2], False, r"reward 'mine' must return a number .*, got list \[1, 2\]; set batched: true"),
        (lambda c, t: None, True, "reward 'mine' is batched: it must return 2 numbers, got NoneType None"),
        (lambda c, t: [1.0], True, r"reward 'mine' is batched: it must return 2 numbers.* got shape \(1,\)"),
        (
            lambda c, t: c.index("z"),
            False,
            r"reward 'mine' raised ValueError: substring not found \(.*test_function\.py, ",
        ),
        (lambda c: 1.0, False, "reward 'mine' raised TypeError: .* it was called with str 'a' and str 'target'"),
    ],
)
def test_a_function_that_fails_names_its_reward(
    function: Callable[..., Any], batched: bool, message: str, make_batch: Make
) -> None:
    with pytest.raises(RewardError, match=message):
        score(make_batch, function, batched=batched)


def test_a_metric_of_the_set_is_given_to_all_of_it(make_batch: Make) -> None:
    """“a b”, “a b c”: bigrams ab, ab, bc, of which 2 of 3 are distinct."""
    context = RewardContext.__new__(RewardContext)
    object.__setattr__(context, "num_generations", 2)
    said, batch = ["a b", "a b c"], make_batch(("prompt", "target"))
    assert SetReward()(said, batch, context).tolist() == pytest.approx([2 / 3, 2 / 3])
    assert SetReward().name == "distinct_bigrams" and not SetReward().needs_target
    longest = SetReward(lambda responses, targets: max(map(len, responses)) + len(targets[1]), name="longest")
    assert longest(said, batch, context).tolist() == [5.0 + len("target")] * 2
    with pytest.raises(RewardError, match="must return one number for the whole set, got list"):
        SetReward(lambda responses, targets: responses)(said, batch, context)
