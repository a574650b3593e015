"""The output head: numbers by hand, then the gradient of plain torch, then what is kept of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lora_gan import head as heads
from lora_gan.head import Logits, Statistic, entropy, log_probability, statistics, token_logprobs

INF = float("inf")
WANTED = [Statistic(log_probability), Statistic(log_probability, 0.7), Statistic(entropy, 0.7)]


def given(logits: Tensor) -> Logits:
    return Logits(logits, logits.shape[-1])


def entropies(logits: Tensor) -> Tensor:
    nothing = torch.zeros(len(logits), dtype=torch.long)
    return statistics(given(logits), nothing, [Statistic(entropy)])[0]


def by_torch(logits: Tensor, labels: Tensor) -> Tensor:
    """What WANTED stands for, (3, n)."""
    one, two = logits.float().log_softmax(-1), (logits.float() / 0.7).log_softmax(-1)
    picked = [x.gather(-1, labels[:, None]).squeeze(-1) for x in (one, two)]
    return torch.stack([*picked, -(two.exp() * two).sum(-1)])


def test_log_probabilities_by_hand() -> None:
    logits = torch.tensor([[math.log(1), math.log(3)], [math.log(4), math.log(1)]])
    found = token_logprobs(logits, torch.tensor([1, 1]))
    torch.testing.assert_close(found, torch.tensor([math.log(3 / 4), math.log(1 / 5)]))
    assert token_logprobs(logits.bfloat16(), torch.tensor([1, 1])).dtype == torch.float32


def test_entropy_by_hand() -> None:
    """Uniform over four: ln 4. (½, ¼, ¼): ½·ln 2 + ½·ln 4 = 1.5·ln 2. A sure thing, and one with a token ruled out."""
    logits = torch.tensor([[7.0, 7, 7, 7], [math.log(2), 0, 0, -INF], [900.0, 0, 0, 0], [1.0, 1, -INF, -INF]])
    wanted = torch.tensor([math.log(4), 1.5 * math.log(2), 0.0, math.log(2)])
    torch.testing.assert_close(entropies(logits), wanted)
    assert entropies(logits.bfloat16()).dtype == torch.float32
    assert entropies(torch.zeros(0, 5)).shape == (0,)


def test_entropy_gradient_by_hand() -> None:
    """dH/dz = −p·(log p + H). For p = (¾, ¼): ln p₀ − ln p₁ = ln 3, so dH/dz₀ = −¾·¼·ln 3."""
    logits = torch.tensor([[math.log(3), 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(entropies(logits).sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0]]) * 3 / 16 * math.log(3))


def test_entropy_gives_no_gradient_to_a_token_that_is_ruled_out() -> None:
    logits = torch.tensor([[1.0, 0.0, -INF]], requires_grad=True)
    (gradient,) = torch.autograd.grad(entropies(logits).sum(), logits)
    assert gradient.isfinite().all() and gradient[0, 2] == 0 and gradient[0, 0] != 0


def test_the_temperature_divides_in_float32() -> None:
    """W4: 20.0 and 19.875 in bfloat16, divided by 0.7 there, would be 28.625 and 28.375."""
    logits = torch.tensor([[20.0, 19.875]], dtype=torch.bfloat16)
    at = [Statistic(log_probability, 0.7), Statistic(entropy, 0.7)]
    logp, h = statistics(given(logits), torch.tensor([0]), at)
    p = 1 / (1 + math.exp(-0.125 / 0.7))
    assert logp.item() == pytest.approx(math.log(p), abs=1e-5)
    assert h.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-5)
    head = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    head.weight.copy_(logits.T)
    made = Logits(torch.ones(1, 1, dtype=torch.bfloat16), 2, head)
    assert statistics(made, torch.tensor([0]), at).tolist() == [[logp.item()], [h.item()]]


@contextmanager
def few(rows: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of this many tokens."""
    with monkeypatch.context() as patch:
        for name, value in (("NUMBERS", rows * vocabulary), ("GIVEN", rows * vocabulary), ("ROWS", 1)):
            patch.setattr(heads, name, value)
        yield


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("made", [False, True])
def test_values_and_gradients_are_those_of_plain_torch(made: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 tokens, three at a time, of 20 words from 24 rows of the head, with different weights in the loss."""
    torch.manual_seed(0)
    head = nn.Linear(8, 24, bias=bias).requires_grad_(False)
    states, labels = torch.randn(7, 8, requires_grad=True), torch.randint(20, (7,))
    weights = torch.randn(3, 7)
    wanted = by_torch(head(states)[:, :20], labels)
    with few(3, 20, monkeypatch):
        found = statistics(Logits(states, 20, head) if made else Logits(head(states), 20), labels, WANTED)
        (gradient,) = torch.autograd.grad((found * weights).sum(), states)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    (expected,) = torch.autograd.grad((wanted * weights).sum(), states)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_products_are_those_of_a_layer(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, labels = nn.Linear(16, 300).requires_grad_(False), torch.randint(300, (9,))
    states = torch.randn(9, 16, requires_grad=True)
    with torch.autocast("cpu", dtype):
        wanted = by_torch(layer(states), labels)
        found = statistics(Logits(states, 300, layer), labels, WANTED)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    found, expected = (torch.autograd.grad(x.sum(), states)[0] for x in (found, wanted))
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_gradient_of_many_small_probabilities_survives_float16() -> None:
    """Each of 2¹⁷ words has a gradient of 2⁻²⁶, a quarter of the smallest number there."""
    weight = torch.full((1 << 17, 1), 2.0, dtype=torch.float16)
    slope = torch.full((1, 1 << 17), 2.0**-26)
    assert heads.product(slope, weight).item() == pytest.approx(2.0**-8)
    assert heads.product(torch.zeros(1, 4), torch.ones(4, 2, dtype=torch.float16)).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("gradient", [False, True])
def test_nothing_of_the_size_of_the_logits_is_kept(gradient: bool) -> None:
    """The gradient at 4 states of 2 numbers for each of 3 statistics, or nothing."""
    head, kept = nn.Linear(2, 1000).requires_grad_(False), list[tuple[int, ...]]()
    states = torch.randn(4, 2, requires_grad=True)
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)), lambda x: x)
    with keep, torch.set_grad_enabled(gradient):
        found = statistics(Logits(states, 1000, head), torch.zeros(4, dtype=torch.long), WANTED)
    assert kept == ([(3, 4, 2)] if gradient else [])
    assert found.requires_grad == gradient
    assert max(len(chunk.logits) for chunk in Logits(torch.randn(500, 2), 1_000_000, head).chunks()) == 128
