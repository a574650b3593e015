"""Advantages of completions, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora_gan.advantages import (
    AdvantageEstimator,
    GroupNormalised,
    LeaveOneOut,
    MovingAverage,
    PredictedReward,
    RewardToGo,
    ValueGAE,
    discounted,
    gae,
)
from lora_gan.errors import LoraGANError
from lora_gan.types import Advantages, Rollout, TokenRewards


def credit(
    estimator: AdvantageEstimator,
    rewards: list[float],
    k: int,
    baseline: float = 0.0,
    predicted: list[float] | None = None,
) -> Advantages:
    n = len(rewards)
    mask = torch.arange(3) < torch.arange(n)[:, None] % 3 + 1  # completions of 1, 2, 3, 1, … tokens
    rollout = Rollout(mask.long(), mask, -mask.float(), torch.zeros(n, dtype=torch.bool), ("",) * n, k)
    paid = torch.tensor(rewards, requires_grad=True)
    last = torch.zeros(n, 3).scatter(1, mask.sum(1, keepdim=True) - 1, paid[:, None])
    return estimator(rollout, TokenRewards(last, torch.tensor(predicted or [0.0] * n), torch.tensor(baseline)))


def returns(found: Advantages) -> Tensor:
    return found.per_token[:, 0]


def test_moving_average_takes_the_baseline_off() -> None:
    found = credit(MovingAverage(), [1.0, 3.0, 2.5], 1, baseline=2.0)
    assert found.per_token.tolist() == [[-1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.5, 0.5, 0.5]]
    # six tokens: (1 + 2·1 + 3·½) / 6
    assert found.metrics["policy/advantage_abs"].item() == pytest.approx(4.5 / 6)


def test_leave_one_out_by_hand() -> None:
    """Prompt 1: 1 − (2+6)/2, 2 − (1+6)/2, 6 − (1+2)/2; prompt 2 has equal rewards."""
    found = returns(credit(LeaveOneOut(), [1.0, 2.0, 6.0, 5.0, 5.0, 5.0], 3, baseline=99.0))
    assert found.tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]


def test_group_normalised_by_hand() -> None:
    """Rewards 1 and 3: mean 2, standard deviation (of a sample) √2."""
    found = returns(credit(GroupNormalised(epsilon=0.5), [1.0, 3.0, 7.0, 7.0], 2))
    a = 1 / (math.sqrt(2) + 0.5)
    torch.testing.assert_close(found, torch.tensor([-a, a, 0.0, 0.0]))


def test_scales_of_group_advantages_by_hand() -> None:
    """Rewards 1, 3 and 7, 7: the batch's standard deviation is that of all four, √9; unscaled it is reward − mean."""
    rewards = [1.0, 3.0, 7.0, 7.0]
    unscaled = returns(credit(GroupNormalised(scale_rewards="none"), rewards, 2))
    torch.testing.assert_close(unscaled, torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    batch = returns(credit(GroupNormalised(epsilon=0.0, scale_rewards="batch"), rewards, 2))
    torch.testing.assert_close(batch, torch.tensor([-1.0, 1.0, 0.0, 0.0]) / 3)
    with pytest.raises(LoraGANError, match="scale_rewards must be group, batch or none, got 'all'"):
        GroupNormalised(scale_rewards="all")


@pytest.mark.parametrize(
    "estimator", [LeaveOneOut(), *(GroupNormalised(scale_rewards=scale) for scale in ("group", "batch", "none"))]
)
def test_centred_advantages_sum_to_zero_in_each_group(estimator: AdvantageEstimator) -> None:
    torch.manual_seed(0)
    found = returns(credit(estimator, torch.randn(12).tolist(), 4)).view(3, 4)
    torch.testing.assert_close(found.sum(1), torch.zeros(3), atol=1e-5, rtol=0)
    assert found.abs().min() > 0


@pytest.mark.parametrize("estimator", [MovingAverage(), LeaveOneOut(), GroupNormalised()])
def test_credit_has_no_gradient(estimator: AdvantageEstimator) -> None:
    found = credit(estimator, [1.0, 2.0, 4.0, 0.0], 2)
    assert not found.per_token.requires_grad
    assert not any(value.requires_grad for value in found.metrics.values())


def test_reward_to_go_by_hand() -> None:
    """A completion of two tokens with rewards 1 and 4: each its own, or 1 + 4/2 and 4."""
    mask = torch.tensor([[True, True, False]])
    rollout = Rollout(mask.long(), mask, -mask.float(), torch.zeros(1, dtype=torch.bool), ("",), 1)
    rewards = TokenRewards(torch.tensor([[1.0, 4.0, 0.0]]), None, torch.tensor(9.0))
    assert RewardToGo()(rollout, rewards).per_token.tolist() == [[1.0, 4.0, 0.0]]
    assert RewardToGo(gamma=0.5)(rollout, rewards).per_token.tolist() == [[3.0, 4.0, 0.0]]
    with pytest.raises(LoraGANError, match="gamma must be in"):
        RewardToGo(gamma=1.5)


def test_what_they_need() -> None:
    assert (MovingAverage.needs_baseline, MovingAverage.needs_group) == (True, False)
    assert (LeaveOneOut.needs_baseline, LeaveOneOut.needs_group) == (False, True)
    assert (GroupNormalised.needs_baseline, GroupNormalised.needs_group) == (False, True)


def test_predicted_reward_takes_the_discriminators_prediction_off() -> None:
    found = credit(PredictedReward(), [1.0, 3.0, 2.5], 1, predicted=[0.5, 3.0, 3.0])
    assert found.per_token.tolist() == [[0.5, 0.0, 0.0], [0.0, 0.0, 0.0], [-0.5, -0.5, -0.5]]
    assert PredictedReward.needs_discriminator and not PredictedReward.needs_group


def test_penalties_on_the_way_count_as_part_of_the_completion() -> None:
    """The completion is paid 1 at its end and −¼ at each of its three tokens."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    rollout = Rollout(mask.long(), mask, -mask.float(), torch.zeros(1, dtype=torch.bool), ("",), 1)
    rewards = TokenRewards(torch.tensor([[-0.25, -0.25, 0.75]]), torch.zeros(1), torch.tensor(0.0))
    assert MovingAverage()(rollout, rewards).per_token.tolist() == [[0.25, 0.25, 0.25]]


# over tokens

PAID = torch.tensor([[0.0, 1.0, 2.0], [3.0, 99.0, 99.0]])
VALUES = torch.tensor([[0.5, 1.0, 1.5], [1.0, 77.0, 77.0]])
ALIVE = torch.tensor([[True, True, True], [True, False, False]])


def test_gae_of_three_tokens_by_hand() -> None:
    """γ = ½, λ = ½, so γλ = ¼. After the last token the value is 0, and what is masked does not count.

    δ₂ = 2 − 1.5 = 0.5, δ₁ = 1 + ½·1.5 − 1 = 0.75, δ₀ = 0 + ½·1 − 0.5 = 0;
    A₂ = 0.5, A₁ = 0.75 + ¼·0.5 = 0.875, A₀ = 0 + ¼·0.875 = 0.21875. The other completion: 3 − 1.
    """
    found = gae(PAID, VALUES, ALIVE, gamma=0.5, gae_lambda=0.5)
    assert found.tolist() == [[0.21875, 0.875, 0.5], [2.0, 0.0, 0.0]]


def test_gae_with_trace_0_is_the_temporal_difference() -> None:
    found = gae(PAID, VALUES, ALIVE, gamma=0.5, gae_lambda=0.0)
    assert found.tolist() == [[0.0, 0.75, 0.5], [2.0, 0.0, 0.0]]


def test_gae_with_trace_1_is_the_reward_to_go_less_the_value() -> None:
    """Undiscounted the rewards to go are 3, 3 and 2."""
    found = gae(PAID, VALUES, ALIVE, gamma=1.0, gae_lambda=1.0)
    assert found.tolist() == [[2.5, 2.0, 0.5], [2.0, 0.0, 0.0]]


def test_gae_of_long_completions_is_the_recursion() -> None:
    """A_t = δ_t + γλ·A_{t+1}, step by step in float64."""
    torch.manual_seed(0)
    for tokens in (1, 2, 7, 64, 333):
        deltas = torch.randn(5, tokens)
        for factor in (0.0, 0.3, 0.95, 1.0):
            running, wanted = torch.zeros(5, dtype=torch.double), torch.zeros(5, tokens, dtype=torch.double)
            for t in reversed(range(tokens)):
                running = wanted[:, t] = deltas[:, t].double() + factor * running
            torch.testing.assert_close(discounted(deltas, factor).double(), wanted, atol=1e-5, rtol=1e-6)


def over_tokens(estimator: ValueGAE, values: Tensor) -> Advantages:
    rollout = Rollout(ALIVE.long(), ALIVE, -ALIVE.float(), torch.zeros(2, dtype=torch.bool), ("", ""), 1)
    rewards = torch.where(ALIVE, PAID, 0)
    return estimator(rollout, TokenRewards(rewards, torch.zeros(2), torch.tensor(0.0), values.requires_grad_()))


def test_value_gae_gives_returns_and_old_values_to_the_value_head() -> None:
    """Returns are advantages plus values: the rewards to go 3, 3, 2 and 3."""
    found = over_tokens(ValueGAE(gae_lambda=1.0, normalise=False), VALUES.clone())
    assert found.per_token.tolist() == [[2.5, 2.0, 0.5], [2.0, 0.0, 0.0]]
    assert found.returns is not None and found.values is not None
    assert found.returns.tolist() == [[3.0, 3.0, 2.0], [3.0, 0.0, 0.0]]
    assert torch.equal(found.values[ALIVE], VALUES[ALIVE])
    assert found.metrics["policy/advantage_abs"].item() == pytest.approx(7 / 4)
    assert found.metrics["value/mean"].item() == 1.0
    tensors = (found.per_token, found.returns, found.values, *found.metrics.values())
    assert not any(tensor.requires_grad for tensor in tensors)


def test_value_gae_normalises_over_the_tokens_of_the_batch() -> None:
    """2.5, 2, ½ and 2: mean 1.75, variance (0.5625 + 0.0625 + 1.5625 + 0.0625)/4 = 0.5625 = ¾²."""
    found = over_tokens(ValueGAE(gae_lambda=1.0), VALUES.clone())
    torch.testing.assert_close(found.per_token, torch.tensor([[1.0, 1 / 3, -5 / 3], [1 / 3, 0, 0]]))
    assert found.returns is not None and found.returns[0, 0].item() == 3.0, "the value head learns plain returns"


def test_explained_variance_by_hand() -> None:
    """Returns 3, 3, 2, 3 have variance 3/16. Values right up to a constant explain all of it, a constant nothing.

    Values −3, −3, −2, −3 double the deviations: 1 − 4 = −3.
    """
    exact = torch.tensor([[3.0, 3.0, 2.0], [3.0, 0.0, 0.0]])
    for values, wanted in ((exact - 5, 1.0), (torch.ones(2, 3), 0.0), (-exact, -3.0)):
        found = over_tokens(ValueGAE(gae_lambda=1.0), values)
        assert found.metrics["value/explained_variance"].item() == pytest.approx(wanted, abs=1e-5)


def test_discount_and_trace_are_checked() -> None:
    for settings in ({"gamma": 1.1}, {"gae_lambda": -0.1}):
        with pytest.raises(LoraGANError, match=r"must be in \[0, 1\]"):
            ValueGAE(**settings)  # type: ignore[arg-type]
