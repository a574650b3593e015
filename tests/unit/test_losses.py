"""Losses and their gradients, worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_gan.errors import LoraGANError
from lora_gan.losses import (
    ClippedPPO,
    PolicyLoss,
    Reinforce,
    approx_kl,
    gumbel_noise,
    kl_loss,
    straight_through,
    value_loss,
)
from lora_gan.tensors import kl_k3
from lora_gan.types import Advantages, LossTerm, Rollout


def rollout(logprobs: Tensor, mask: Tensor | None = None) -> Rollout:
    mask = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    n = len(logprobs)
    return Rollout(mask.long(), mask, logprobs.detach(), torch.zeros(n, dtype=torch.bool), ("",) * n, 1)


def test_reinforce_is_the_mean_over_all_sampled_tokens() -> None:
    """−(2·(−1) + 2·(−2) + (−3)·(−0.5)) / 3 = 1.5; what is masked does not count."""
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -9.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    term = Reinforce()(logprobs, rollout(logprobs, mask), Advantages(torch.tensor([[2.0, 2.0], [-3.0, 7.0]]), {}))
    assert term.loss.item() == 1.5
    term.loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-2 / 3, -2 / 3], [1.0, 0.0]]))


def test_reinforce_gradient_on_logits() -> None:
    """Two tokens of probability ½, token 0 paid 1 and token 1 paid −1: −½·((e₀ − π) − (e₁ − π)) = (−½, ½)."""
    logits = torch.zeros(2, requires_grad=True)
    logprobs = logits.log_softmax(0)[:, None]
    Reinforce()(logprobs, rollout(logprobs), Advantages(torch.tensor([[1.0], [-1.0]]), {})).loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([-0.5, 0.5]))


def test_kl_loss_is_the_reverse_kl_in_value_and_gradient() -> None:
    """π = (½, ¼, ¼), reference = (¼, ¼, ½). The sample (0, 0, 1, 2) has exactly π's frequencies.

    KL = ½ ln 2 + ¼ ln ½ = ¼ ln 2; dKL/dlogit_j = π_j·(ln(π_j / ref_j) − KL) = (⅜, −¹⁄₁₆, −⁵⁄₁₆)·ln 2.
    """
    reference = torch.tensor([0.25, 0.25, 0.5]).log()
    tokens = torch.tensor([0, 0, 1, 2])
    wanted = torch.tensor([3 / 8, -1 / 16, -5 / 16]) * math.log(2)

    logits = torch.tensor([0.5, 0.25, 0.25]).log().requires_grad_()
    logprobs = logits.log_softmax(0)[tokens][:, None]
    loss = kl_loss(logprobs, rollout(logprobs), reference[tokens][:, None])
    assert math.isclose(loss.item(), math.log(2) / 4, rel_tol=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, wanted)

    logprobs = logits.log_softmax(0)[tokens]
    (k3_alone,) = torch.autograd.grad(kl_k3(logprobs, reference[tokens]).mean(), logits)
    torch.testing.assert_close(k3_alone, torch.tensor([0.25, 0.0, -0.25]))  # π − reference: the forward KL's


def test_kl_loss_ignores_padding_and_is_zero_at_the_reference() -> None:
    logprobs = torch.tensor([[-1.0, 0.0], [-2.0, -1.0]])
    mask = torch.tensor([[True, False], [True, True]])
    assert kl_loss(logprobs, rollout(logprobs, mask), logprobs + ~mask * 5).item() == 0.0


def test_no_completions_no_loss() -> None:
    empty = Rollout.empty(torch.device("cpu"))
    assert Reinforce()(empty.logprobs, empty, Advantages(empty.logprobs, {})).loss.item() == 0.0
    assert kl_loss(empty.logprobs, empty, empty.logprobs).item() == 0.0


# ratios


def ppo(ratios: list[float], advantages: list[float], objective: PolicyLoss) -> tuple[LossTerm, Tensor]:
    """Loss of one token for each ratio, and its gradient on the log-probabilities."""
    old = torch.full((len(ratios), 1), -2.0)
    logprobs = (old + torch.tensor(ratios)[:, None].log()).requires_grad_()
    term = objective(logprobs, rollout(old), Advantages(torch.tensor(advantages)[:, None], {}))
    (gradient,) = torch.autograd.grad(term.loss, logprobs)
    return term, gradient[:, 0]


def test_ppo_by_hand() -> None:
    """ε = 0.2. A good token counts up to a ratio of 1.2, a bad one down to 0.8; on the other side both count fully.

    A = 2: ratios 1.1, 1.5, 0.5 gain 2.2, 1.2·2 = 2.4 and 1. A = −1: ratios 0.9, 0.5, 1.5 gain −0.9, −0.8 and −1.5.
    Each unclipped token pulls with −r·A/6, a clipped one not at all.
    """
    term, gradient = ppo([1.1, 1.5, 0.5, 0.9, 0.5, 1.5], [2.0, 2.0, 2.0, -1.0, -1.0, -1.0], ClippedPPO(epsilon=0.2))
    assert term.loss.item() == pytest.approx(-(2.2 + 2.4 + 1.0 - 0.9 - 0.8 - 1.5) / 6)
    torch.testing.assert_close(gradient, torch.tensor([-2.2, 0.0, -1.0, 0.9, 0.0, 1.5]) / 6)
    assert term.metrics["policy/ratio"].item() == pytest.approx(6.0 / 6)
    assert term.metrics["policy/clip_fraction"].item() == pytest.approx(2 / 6)


def test_clip_higher_lets_good_tokens_rise_further() -> None:
    """ε = 0.2 below, 0.6 above: a ratio of 1.5 still counts, 1.7 counts as 1.6; a bad token's floor is still 0.8."""
    term, gradient = ppo([1.5, 1.7, 0.5], [1.0, 1.0, -1.0], ClippedPPO(epsilon=0.2, epsilon_high=0.6))
    assert term.loss.item() == pytest.approx(-(1.5 + 1.6 - 0.8) / 3)
    torch.testing.assert_close(gradient, torch.tensor([-1.5, 0.0, 0.0]) / 3)


def test_ppos_first_gradient_is_reinforces() -> None:
    """On-policy the ratio is 1, nothing is clipped, and dr/dlogits = dlog π/dlogits."""
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 7, requires_grad=True)
    logprobs = logits.log_softmax(-1).gather(-1, torch.randint(7, (4, 3, 1))).squeeze(-1)
    mask = torch.tensor([[True] * 3, [True] * 2 + [False], [True] * 3, [True, False, False]])
    given = Advantages(torch.randn(4, 3), {})
    term = ClippedPPO()(logprobs, rollout(logprobs, mask), given)
    assert term.metrics["policy/ratio"].item() == 1.0 and term.metrics["policy/clip_fraction"].item() == 0.0
    (first,) = torch.autograd.grad(term.loss, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(Reinforce()(logprobs, rollout(logprobs, mask), given).loss, logits)
    torch.testing.assert_close(first, wanted)
    assert wanted.abs().max() > 1e-3


def test_a_dual_clip_limits_the_pull_of_a_bad_token() -> None:
    """c = 3: a bad token of ratio 5 counts as 3 and has no gradient; one of 2, and a good one of 5, count as ever."""
    term, gradient = ppo([5.0, 2.0, 5.0], [-1.0, -1.0, 1.0], ClippedPPO(epsilon=0.2, dual_clip=3.0))
    assert term.loss.item() == pytest.approx((3.0 + 2.0 - 1.2) / 3)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 2.0, 0.0]) / 3)
    assert term.metrics["policy/clip_fraction"].item() == pytest.approx(2 / 3)
    assert term.metrics["policy/ratio"].item() == pytest.approx(4.0)


def test_sequence_ratios_by_hand() -> None:
    """GSPO: ratios 2 and ½ of a completion make 1, so A = 2 counts as 2; 1.44 alone is cut to 1.2."""
    old = torch.zeros(2, 2)
    logprobs = torch.tensor([[2.0, 0.5], [1.44, 99.0]]).log().requires_grad_()
    mask = torch.tensor([[True, True], [True, False]])
    given = Advantages(torch.tensor([[2.0, 2.0], [1.0, 1.0]]), {})
    loss = ClippedPPO(epsilon=0.2, loss_type="grpo", importance_sampling_level="sequence")
    term = loss(logprobs, rollout(old, mask), given)
    assert term.loss.item() == pytest.approx(-(2.0 + 1.2) / 2)
    (gradient,) = torch.autograd.grad(term.loss, logprobs)
    # of the first: A·s/|y| for each token, over two completions; the second is clipped
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, -0.5], [0.0, 0.0]]))


@pytest.mark.parametrize(
    ("loss_type", "loss", "gradient"),
    [
        ("bnpo", 4.0, [[-2 / 3, -2 / 3], [1.0, 0.0]]),
        ("grpo", 4.5, [[-0.5, -0.5], [1.5, 0.0]]),  # (3 + 6) / 2: each token of the first counts ½·½
        ("dr_grpo", 1.5, [[-0.25, -0.25], [0.375, 0.0]]),  # (6 + 6) / (2·4)
    ],
)
def test_what_the_loss_is_a_mean_of(loss_type: str, loss: float, gradient: list[list[float]]) -> None:
    """Completions of two tokens with A = 2 and −log π of 1 and 2, and of one with A = −3 and −log π of −2."""
    logprobs = torch.tensor([[-1.0, -2.0], [2.0, -9.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    given = Advantages(torch.tensor([[2.0, 2.0], [-3.0, 7.0]]), {})
    objective = Reinforce(loss_type=loss_type)
    objective.max_new_tokens = 4
    term = objective(logprobs, rollout(logprobs, mask), given)
    assert term.loss.item() == pytest.approx(loss)
    (found,) = torch.autograd.grad(term.loss, logprobs)
    torch.testing.assert_close(found, torch.tensor(gradient))
    assert objective.count(mask) == (3 if loss_type == "bnpo" else 2)
    assert objective.count(mask & torch.tensor([[False], [True]])) == 1, "a completion that is masked does not count"
    empty = Rollout.empty(torch.device("cpu"))
    assert objective(empty.logprobs, empty, Advantages(empty.logprobs, {})).loss.item() == 0.0


def test_a_ratio_cap_cuts_the_weights_and_gives_them_no_gradient() -> None:
    """Ratios ½, 1 and 4 with a cap of 2 weigh ½, 1 and 2: the gradient of each is −weight·A/3."""
    term, gradient = ppo([0.5, 1.0, 4.0], [1.0, -3.0, 5.0], Reinforce(ratio_cap=2.0))
    torch.testing.assert_close(gradient, torch.tensor([-0.5, 3.0, -10.0]) / 3)
    now = [-2 + math.log(0.5), -2.0, -2 + math.log(4)]
    assert term.loss.item() == pytest.approx(-(0.5 * now[0] - 3 * now[1] + 10 * now[2]) / 3)
    assert term.metrics["policy/ratio_capped"].item() == pytest.approx(1 / 3)
    _, plain = ppo([0.5, 1.0, 4.0], [1.0, -3.0, 5.0], Reinforce())
    torch.testing.assert_close(plain, torch.tensor([-1.0, 3.0, -5.0]) / 3)


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        (Reinforce, {"ratio_cap": 0.0}, "ratio_cap"),
        (ClippedPPO, {"epsilon": 1.0}, "epsilon must be in"),
        (ClippedPPO, {"epsilon_high": 0.0}, "epsilon_high > 0"),
        (ClippedPPO, {"num_iterations": 0}, "num_iterations"),
        (ClippedPPO, {"num_minibatches": 0}, "num_minibatches"),
        (ClippedPPO, {"target_kl": 0.0}, "target_kl"),
        (ClippedPPO, {"dual_clip": 1.2}, "dual_clip must be above 1.2, where the clip range ends"),
        (ClippedPPO, {"importance_sampling_level": "word"}, "must be token or sequence, got 'word'"),
        (ClippedPPO, {"loss_type": "mean"}, "loss_type must be bnpo, grpo or dr_grpo, got 'mean'"),
    ],
)
def test_settings_are_checked(loss: type[PolicyLoss], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraGANError, match=message):
        loss(**settings)


def test_moved_kl_by_hand() -> None:
    """The sampled token had ½ and has ¼ now: k3 = ¼/½ − ln(¼/½) − 1 = ln 2 − ½; the other has not moved."""
    old = torch.tensor([[0.5, 0.5, 0.1]]).log()
    now = torch.tensor([[0.25, 0.5, 0.9]]).log().requires_grad_()
    found = approx_kl(now, rollout(old, torch.tensor([[True, True, False]])))
    assert found.item() == pytest.approx((math.log(2) - 0.5) / 2)
    assert not found.requires_grad


# the value head


def test_value_loss_by_hand() -> None:
    """Returns 1 and old values 0, clip 0.2.

    A new value 0.1 is within: 0.9². 0.5 counts as 0.2, for that is worse: 0.8², and no gradient. −0.5 is worse than
    −0.2: 1.5². Half the mean of the three; the masked one does not count.
    """
    values = torch.tensor([[0.1, 0.5, -0.5, 9.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    given = Advantages(torch.zeros(1, 4), {}, returns=torch.ones(1, 4), values=torch.zeros(1, 4))
    loss = value_loss(values, rollout(torch.zeros(1, 4), mask), given, epsilon=0.2)
    assert loss.item() == pytest.approx((0.81 + 0.64 + 2.25) / 6)
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(gradient, torch.tensor([[-0.9, 0.0, -1.5, 0.0]]) / 3)


# relaxed samples


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 3 / 4), (0.5, 9 / 10)])
def test_straight_through_has_the_gradient_of_the_softmax(temperature: float, share: float) -> None:
    """Two tokens with ½ each, token 0 sampled, both uniform numbers e⁻¹, so that both exponentials are 1.

    The winner's perturbed logit is −ln 1 = 0 and the other's −ln(1/½ + 1) = −ln 3: the softmax is (¾, ¼) at
    temperature 1 and (9/10, 1/10) at ½. d soft₀/d logit₀ = soft₀·soft₁/temperature.
    """
    uniform, at_samples = torch.full((1, 2), math.exp(-1)), torch.tensor([[1.0, 0.0]])
    gradient = straight_through(torch.zeros(1, 2), torch.tensor([0]), temperature, uniform, at_samples)
    slope = share * (1 - share) / temperature
    torch.testing.assert_close(gradient, torch.tensor([[slope, -slope]]))


PROBABILITIES = torch.tensor([0.5, 0.3, 0.15, 0.05])


def drawn(n: int) -> tuple[Tensor, Tensor]:
    """Sampled tokens (n,) and the noise given them (n, 4)."""
    torch.manual_seed(1)
    ids = torch.multinomial(PROBABILITIES, n, replacement=True)
    return ids, gumbel_noise(PROBABILITIES.log().repeat(n, 1), ids, torch.rand(n, 4).clamp(1e-9, 1 - 1e-7))


def test_the_noise_lets_the_sampled_token_win_always() -> None:
    ids, noise = drawn(20_000)
    assert torch.equal((PROBABILITIES.log() + noise).argmax(1), ids)


def test_averaged_over_sampled_tokens_the_noise_is_gumbels() -> None:
    """Unconditional Gumbel noise: mean 0.5772, variance π²/6, below 0 with probability 1/e, tokens independent."""
    _, noise = drawn(200_000)
    torch.testing.assert_close(noise.mean(0), torch.full((4,), 0.5772), atol=0.015, rtol=0)  # 5 standard errors
    torch.testing.assert_close(noise.T.cov(), torch.eye(4) * math.pi**2 / 6, atol=0.04, rtol=0)
    torch.testing.assert_close((noise < 0).float().mean(0), torch.full((4,), math.exp(-1)), atol=0.006, rtol=0)
