"""Answer rewards, by hand, and a run that learns from them alone."""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from importlib.util import find_spec
from threading import Thread
from typing import Any

import pytest
import torch

from lora_gan.errors import LoraGANError
from lora_gan.final_answer import AfterMarker, Boxed, FinalAnswer, Parts
from lora_gan.rewards import AnswerReward, MathReward, Reward, SelfConsistency, answers_of, weighted_sum
from lora_gan.types import Example, PromptBatch, RewardContext
from tests.helpers.steps import Build, fit, moved

needs_math_verify = pytest.mark.skipif(find_spec("math_verify") is None, reason="math-verify is not installed")
WORKED = Example("Q", "3 + 4 = 7 #### 7", ("3 + 4 = 7 #### 7", "#### seven"))
GIVEN = Example("Q", "", answers=("7", "Seven"))


def batch_of(*examples: Example) -> PromptBatch:
    ids = tuple(torch.tensor([65, 66]) for _ in examples)
    end = tuple(torch.tensor([256]) for _ in examples)
    return PromptBatch(examples, ids, end, tuple(() for _ in examples))


def context(count: int, k: int, final_answer: FinalAnswer | None) -> RewardContext:
    return RewardContext(k, torch.zeros(count, 1), torch.ones(count, 1, dtype=torch.bool), final_answer)


def scores(
    reward: Reward, completions: Sequence[str], example: Example, final_answer: FinalAnswer | None
) -> list[float]:
    count = len(completions)
    return reward(completions, batch_of(example), context(count, count, final_answer)).tolist()


def test_accepted_answers() -> None:
    assert answers_of(WORKED, AfterMarker()) == ("7", "seven")
    assert answers_of(WORKED, None) == ("3 + 4 = 7 #### 7", "#### seven")
    assert answers_of(WORKED, Boxed()) == ()
    assert answers_of(GIVEN, AfterMarker()) == answers_of(GIVEN, None) == ("7", "Seven")
    assert answers_of(Example("Q", "#### 7", answers=("8", " ")), AfterMarker()) == ("8",)


def test_answer_reward_by_hand() -> None:
    said = ["#### 7", "2 + 5 #### SEVEN. ", "#### 8", "7", "", "#### 7 #### 8"]
    for example in (WORKED, GIVEN):
        assert scores(AnswerReward(), said, example, AfterMarker()) == [1, 1, 0, 0, 0, 0]
    assert scores(AnswerReward(), ["7.", "#### 7", ""], GIVEN, None) == [1, 0, 0]
    assert scores(AnswerReward(), [WORKED.target], WORKED, AfterMarker()) == [1]


def test_only_prompts_with_accepted_answers_count() -> None:
    batch = batch_of(GIVEN, Example("Q", ""), Example("Q", "no marker"), WORKED)
    said = ["#### 7", "#### 8"] * 4
    found = weighted_sum([AnswerReward(2.0)], said, batch, context(8, 2, AfterMarker()))
    assert found.applies["answer"].tolist() == [True] * 2 + [False] * 4 + [True] * 2
    assert found.total.tolist() == [2, 0, 0, 0, 0, 0, 2, 0]


@needs_math_verify
def test_math_reward_by_hand() -> None:
    half = Example("Q", "", answers=(r"\frac{1}{2}",))
    said = [r"so \boxed{0.5}", r"\boxed{\frac24}", r"\boxed{2}", "0.5", r"\boxed{}", r"\boxed{half}"]
    assert scores(MathReward(), said, half, Boxed()) == [1, 1, 0, 0, 0, 0]
    terms = Example("Q", "#### x + 1")  # bare LaTeX
    assert scores(MathReward(), ["#### 1+x", "#### x", "#### 1"], terms, AfterMarker()) == [1, 0, 0]
    assert scores(MathReward(), ["#### yes.", "#### no"], Example("Q", "#### Yes"), AfterMarker()) == [1, 0]
    whole = Example("Q", r"As $2 + 2 = 4$, it is $\frac{4}{8}$.")
    assert scores(MathReward(), ["The answer is 0.5.", "The answer is 4."], whole, None) == [1, 0]
    assert scores(MathReward(), ["The answer is 0.5."], half, None) == [1]


@needs_math_verify
def test_math_reward_outside_the_main_thread() -> None:
    """math-verify's limit of time is a signal, which other threads cannot set."""
    found: list[float] = []
    thread = Thread(
        target=lambda: found.extend(scores(MathReward(), ["#### 2/8"], Example("Q", "#### 1/4"), AfterMarker()))
    )
    thread.start()
    thread.join()
    assert found == [1]


def test_math_reward_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "math_verify":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LoraGANError, match="pip install math-verify"):
        MathReward()


def test_completions_vote_by_their_final_answers() -> None:
    said = ["3 + 4 #### 7", "4 + 3 #### 7.", "#### 8", "7"]
    assert scores(SelfConsistency(), said, GIVEN, AfterMarker()) == pytest.approx([1 / 3, 1 / 3, 0, 0])
    assert scores(SelfConsistency(), said, GIVEN, None) == [0, 0, 0, 0]


def test_a_run_learns_from_final_answers_of_prompts_without_targets(build: Build) -> None:
    """Accepted is any of a few letters, so that some samples of a random model are right."""
    letters = tuple(chr(code) for code in range(97, 123))
    batch = batch_of(Example("AB", "", answers=letters), Example("AB", ""))
    module = build(rewards=[AnswerReward()], final_answer=_FirstLetter(), num_generations=8, supervised=0.0)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    recorder, _ = fit(module, [batch], 2)
    assert all(math.isfinite(value) for report in recorder.reports for value in report.values())
    first = recorder.outputs[0]
    assert first.scores is not None
    right = [text[:1] in letters and bool(text[:1]) for text in first.rollout.texts[:8]]
    assert first.scores.parts["answer"].tolist() == [float(one) for one in right] + [0.0] * 8
    assert 0 < sum(right) < 8
    assert any(".generator." in name for name in moved(before, dict(module.named_parameters())))


class _FirstLetter(FinalAnswer):
    def split(self, text: str) -> Parts:
        return Parts("", "", text[:1])


def test_agreement_of_the_unanswered_alone() -> None:
    given, free = Example("Q", "", answers=("7",)), Example("Q", "")
    ids = (torch.zeros(1, dtype=torch.long),) * 2
    batch = PromptBatch((given, free), ids, ids, ((), ()))
    context = RewardContext(2, torch.zeros(4, 1), torch.ones(4, 1).bool(), AfterMarker())
    rewards = [AnswerReward(0.5), SelfConsistency(0.5, unanswered=True)]
    found = weighted_sum(rewards, ["#### 7", "#### 8", "#### 3", "#### 3"], batch, context)
    assert found.total.tolist() == [1, 0, 1, 1]
    assert found.applies["consistency"].tolist() == [False, False, True, True]
