"""Credit of answers, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora_gan.advantages import AdvantageEstimator, GroupNormalised, LeaveOneOut, MovingAverage
from lora_gan.types import Credit, Earnings, Rollout


def credit(estimator: AdvantageEstimator, rewards: list[float], k: int, baseline: float = 0.0) -> Credit:
    n = len(rewards)
    mask = torch.arange(3) < torch.arange(n)[:, None] % 3 + 1  # answers of 1, 2, 3, 1, … tokens
    rollout = Rollout(mask.long(), mask, -mask.float(), torch.zeros(n, dtype=torch.bool), ("",) * n, k)
    paid = torch.tensor(rewards, requires_grad=True)
    last = torch.zeros(n, 3).scatter(1, mask.sum(1, keepdim=True) - 1, paid[:, None])
    return estimator(rollout, Earnings(last, torch.zeros(n), torch.tensor(baseline)))


def per_answer(found: Credit) -> Tensor:
    return found.advantages[:, 0]


def test_moving_average_takes_the_baseline_off() -> None:
    found = credit(MovingAverage(), [1.0, 3.0, 2.5], 1, baseline=2.0)
    assert found.advantages.tolist() == [[-1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.5, 0.5, 0.5]]
    # six tokens: (1 + 2·1 + 3·½) / 6
    assert found.metrics["policy/advantage_abs"].item() == pytest.approx(4.5 / 6)


def test_leave_one_out_by_hand() -> None:
    """Prompt 1: 1 − (2+6)/2, 2 − (1+6)/2, 6 − (1+2)/2; prompt 2 has equal rewards."""
    found = per_answer(credit(LeaveOneOut(), [1.0, 2.0, 6.0, 5.0, 5.0, 5.0], 3, baseline=99.0))
    assert found.tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]


def test_group_normalised_by_hand() -> None:
    """Rewards 1 and 3: mean 2, standard deviation (of a sample) √2."""
    found = per_answer(credit(GroupNormalised(epsilon=0.5), [1.0, 3.0, 7.0, 7.0], 2))
    a = 1 / (math.sqrt(2) + 0.5)
    torch.testing.assert_close(found, torch.tensor([-a, a, 0.0, 0.0]))


@pytest.mark.parametrize("estimator", [LeaveOneOut(), GroupNormalised()])
def test_centred_advantages_sum_to_zero_in_each_group(estimator: AdvantageEstimator) -> None:
    torch.manual_seed(0)
    found = per_answer(credit(estimator, torch.randn(12).tolist(), 4)).view(3, 4)
    torch.testing.assert_close(found.sum(1), torch.zeros(3), atol=1e-5, rtol=0)
    assert found.abs().min() > 0


@pytest.mark.parametrize("estimator", [MovingAverage(), LeaveOneOut(), GroupNormalised()])
def test_credit_has_no_gradient(estimator: AdvantageEstimator) -> None:
    found = credit(estimator, [1.0, 2.0, 4.0, 0.0], 2)
    assert not found.advantages.requires_grad
    assert not any(value.requires_grad for value in found.metrics.values())


def test_what_they_need() -> None:
    assert (MovingAverage.needs_baseline, MovingAverage.needs_group) == (True, False)
    assert (LeaveOneOut.needs_baseline, LeaveOneOut.needs_group) == (False, True)
    assert (GroupNormalised.needs_baseline, GroupNormalised.needs_group) == (False, True)
