"""Losses and their gradients, worked by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_gan.losses import Reinforce, kl_loss
from lora_gan.tensors import kl_k3
from lora_gan.types import Credit, Rollout


def rollout(logprobs: Tensor, mask: Tensor | None = None) -> Rollout:
    mask = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    n = len(logprobs)
    return Rollout(mask.long(), mask, logprobs.detach(), torch.zeros(n, dtype=torch.bool), ("",) * n, 1)


def test_reinforce_is_the_mean_over_all_sampled_tokens() -> None:
    """−(2·(−1) + 2·(−2) + (−3)·(−0.5)) / 3 = 1.5; what is masked does not count."""
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -9.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    term = Reinforce()(logprobs, rollout(logprobs, mask), Credit(torch.tensor([[2.0, 2.0], [-3.0, 7.0]]), {}))
    assert term.loss.item() == 1.5
    term.loss.backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-2 / 3, -2 / 3], [1.0, 0.0]]))


def test_reinforce_gradient_on_logits() -> None:
    """Two tokens of probability ½, token 0 paid 1 and token 1 paid −1: −½·((e₀ − π) − (e₁ − π)) = (−½, ½)."""
    logits = torch.zeros(2, requires_grad=True)
    logprobs = logits.log_softmax(0)[:, None]
    Reinforce()(logprobs, rollout(logprobs), Credit(torch.tensor([[1.0], [-1.0]]), {})).loss.backward()
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


def test_no_answers_no_loss() -> None:
    empty = Rollout.empty(torch.device("cpu"))
    assert Reinforce()(empty.logprobs, empty, Credit(empty.logprobs, {})).loss.item() == 0.0
    assert kl_loss(empty.logprobs, empty, empty.logprobs).item() == 0.0
