"""What the discriminator learns, worked by hand."""

from __future__ import annotations

import pytest
import torch

from lora_gan.objectives import RewardRegression
from lora_gan.types import Judged


def opinion(score: list[float], prompt: list[int] | None = None, reward: list[float] | None = None) -> Judged:
    """Answers to one prompt each unless it is said which; none is the target."""
    n = len(score)
    return Judged(
        score=torch.tensor(score, requires_grad=True),
        auxiliary=torch.zeros(n),
        prompt=torch.tensor(prompt if prompt is not None else list(range(n)), dtype=torch.long),
        length=torch.ones(n, dtype=torch.long),
        is_target=torch.zeros(n, dtype=torch.bool),
        reward=None if reward is None else torch.tensor(reward),
    )


def judged(
    sampled: list[float], target: list[float], hard: list[float], rewards: list[float], targets: list[float]
) -> dict[str, Judged]:
    return {
        "sampled": opinion(sampled, reward=rewards),
        "target": opinion(target, reward=targets),
        "hard": opinion(hard),
    }


def test_each_kind_weighs_the_same() -> None:
    """Sampled (1² + 0²)/2 = ½, target ½² = ¼, junk (½² + ½²)/2 = ¼; the mean of the three is ⅓."""
    answers = judged([1.0, 2.0], [1.0], [0.5, -0.5], [0.0, 2.0], [0.5])
    result = RewardRegression()(answers)
    assert result.loss.item() == pytest.approx(1 / 3)
    assert {name: value.item() for name, value in result.metrics.items()} == {
        "judge/error_sampled": 0.5,
        "judge/error_target": 0.25,
        "judge/error_junk": 0.25,
    }
    result.loss.backward()
    # d/dx of (x − y)² / n / 3
    sampled, hard = answers["sampled"].score.grad, answers["hard"].score.grad
    assert sampled is not None and hard is not None
    torch.testing.assert_close(sampled, torch.tensor([2 * 1.0 / 2 / 3, 0.0]))
    torch.testing.assert_close(hard, torch.tensor([2 * 0.5 / 2 / 3, -2 * 0.5 / 2 / 3]))


def test_junk_has_the_reward_that_was_asked_for() -> None:
    result = RewardRegression(junk_reward=-1.0)(judged([0.0], [1.0], [-1.0, 0.0], [0.0], [1.0]))
    assert result.metrics["judge/error_junk"].item() == 0.5
    assert result.loss.item() == pytest.approx(0.5 / 3)


def test_kinds_that_are_absent_do_not_count() -> None:
    result = RewardRegression()(judged([], [1.0], [], [], [3.0]))
    assert result.loss.item() == 4.0
    assert set(result.metrics) == {"judge/error_target"}


def test_metrics_have_no_gradient() -> None:
    result = RewardRegression()(judged([1.0], [1.0], [0.5], [0.0], [0.5]))
    assert result.loss.requires_grad
    assert not any(value.requires_grad for value in result.metrics.values())
