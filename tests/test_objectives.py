"""What the discriminator learns, worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_gan.objectives import RewardRegression
from lora_gan.types import Scores


def scores(total: list[float], targets: list[float]) -> Scores:
    n = len(total)
    return Scores(torch.tensor(total), {}, torch.tensor(targets), torch.zeros(n, 1))


def judged(sampled: list[float], target: list[float], junk: list[float]) -> dict[str, Tensor]:
    return {
        "sampled": torch.tensor(sampled, requires_grad=True),
        "target": torch.tensor(target, requires_grad=True),
        "junk": torch.tensor(junk, requires_grad=True),
    }


def test_each_kind_weighs_the_same() -> None:
    """Sampled (1² + 0²)/2 = ½, target ½² = ¼, junk (½² + ½²)/2 = ¼; the mean of the three is ⅓."""
    answers = judged([1.0, 2.0], [1.0], [0.5, -0.5])
    result = RewardRegression()(answers, scores([0.0, 2.0], [0.5]))
    assert result.loss.item() == pytest.approx(1 / 3)
    assert {name: value.item() for name, value in result.metrics.items()} == {
        "judge/error_sampled": 0.5,
        "judge/error_target": 0.25,
        "judge/error_junk": 0.25,
    }
    result.loss.backward()
    # d/dx of (x − y)² / n / 3
    assert answers["sampled"].grad is not None and answers["junk"].grad is not None
    torch.testing.assert_close(answers["sampled"].grad, torch.tensor([2 * 1.0 / 2 / 3, 0.0]))
    torch.testing.assert_close(answers["junk"].grad, torch.tensor([2 * 0.5 / 2 / 3, -2 * 0.5 / 2 / 3]))


def test_junk_has_the_reward_that_was_asked_for() -> None:
    result = RewardRegression(junk_reward=-1.0)(judged([0.0], [1.0], [-1.0, 0.0]), scores([0.0], [1.0]))
    assert result.metrics["judge/error_junk"].item() == 0.5
    assert result.loss.item() == pytest.approx(0.5 / 3)


def test_kinds_that_are_absent_do_not_count() -> None:
    result = RewardRegression()(judged([], [1.0], []), scores([], [3.0]))
    assert result.loss.item() == 4.0
    assert set(result.metrics) == {"judge/error_target"}


def test_metrics_have_no_gradient() -> None:
    result = RewardRegression()(judged([1.0], [1.0], [0.5]), scores([0.0], [0.5]))
    assert result.loss.requires_grad
    assert not any(value.requires_grad for value in result.metrics.values())
