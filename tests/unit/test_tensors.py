"""Pure functions, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lora_gan.tensors import (
    davidson,
    group_normalise,
    in_float32,
    kl_k3,
    lengths_mask,
    masked_mean,
    masked_row_mean,
    pad,
    ranking_auc,
    scaled_gradient,
    whiten,
)

NAN = float("nan")
MASK = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
X = torch.tensor([[1.0, 2.0, NAN], [6.0, 100.0, NAN], [NAN, NAN, NAN]])


def test_masked_mean_counts_what_the_mask_shows() -> None:
    assert masked_mean(X, MASK).item() == 3.0  # (1 + 2 + 6) / 3
    assert masked_mean(X, torch.zeros_like(MASK)).item() == 0.0


def test_masked_row_mean_divides_each_row_by_its_own_count() -> None:
    assert masked_row_mean(X, MASK).tolist() == [1.5, 6.0, 0.0]


def test_masked_values_get_no_gradient() -> None:
    x = X.clone().requires_grad_()
    masked_mean(x, MASK).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, MASK / 3)


def test_davidson_by_hand() -> None:
    """Margin 2·ln 3 and tie e^t = ⅔: 3, ⅓ and ⅔ of 4. Margin 0 and e^t = 2: 1, 1 and 2 of 4. Turned, the sides swap."""
    margin, tie = torch.tensor([2 * math.log(3), 0.0]), torch.tensor([2 / 3, 2.0]).log()
    found = davidson(margin, tie)
    torch.testing.assert_close(found, torch.tensor([[3 / 4, 1 / 4], [1 / 12, 1 / 4], [1 / 6, 1 / 2]]))
    torch.testing.assert_close(davidson(-margin, tie), found[[1, 0, 2]])


def test_k3_by_hand() -> None:
    """π = ½ and reference = ¼ at the token: r = −ln 2, k3 = ½ + ln 2 − 1."""
    found = kl_k3(torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.25]).log())
    torch.testing.assert_close(found, torch.tensor([math.log(2) - 0.5, 0.0]))


def test_k3_is_unbiased_and_never_negative() -> None:
    policy = torch.tensor([0.5, 0.3, 0.15, 0.05])
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4])
    k3 = kl_k3(policy.log(), reference.log())
    exact = 0.5 * math.log(5) + 0.3 * math.log(1.5) + 0.15 * math.log(0.5) + 0.05 * math.log(0.125)
    assert math.isclose((policy * k3).sum().item(), exact, rel_tol=1e-6)
    assert (k3 >= 0).all()


def test_pad_and_its_mask() -> None:
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    assert pad(rows).tolist() == [[1, 2, 3], [4, 0, 0]]
    assert pad(rows, -1).tolist() == [[1, 2, 3], [4, -1, -1]]
    assert lengths_mask(torch.tensor([3, 1, 0]), 3).tolist() == [[True] * 3, [True, False, False], [False] * 3]


def test_whiten_by_hand() -> None:
    """1, 2, 6: mean 3, variance (4 + 1 + 9)/3; what is masked is 0, be it NaN before."""
    found = whiten(X, MASK)
    deviation = math.sqrt(14 / 3)
    wanted = torch.tensor([[-2 / deviation, -1 / deviation, 0.0], [3 / deviation, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(found, wanted)


def test_equal_numbers_are_whitened_to_zero() -> None:
    assert whiten(torch.full((2, 3), 5.0), MASK[:2]).tolist() == [[0.0] * 3] * 2
    assert whiten(X, torch.zeros_like(MASK)).tolist() == [[0.0] * 3] * 3


def test_ranking_auc_by_hand() -> None:
    """Of a group of three and its pairs of unequal value: 3 > 1 is won, 3 = 3 a half, and 1 < 3 lost."""
    scores, values = torch.tensor([3.0, 3.0, 1.0, 0.0, 9.0, 9.0]), torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    first = torch.tensor([True] * 3 + [False] * 3)
    assert ranking_auc(scores, values, first, 3).item() == pytest.approx(0.75)
    assert ranking_auc(scores, values, torch.ones(6, dtype=torch.bool), 3).item() == pytest.approx((0.5 + 1) / 4)
    assert ranking_auc(scores, torch.ones(6), first, 3).item() == 1, "no pair"
    assert ranking_auc(scores[:0], scores[:0], first[:0], 3).item() == 1


def test_group_normalise_by_hand() -> None:
    """Groups (1, 3) and (2, 2): means 2 and 2, standard deviations √2 and 0, so ∓1 / (√2 + ½) and 0."""
    found = group_normalise(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2, 0.5)
    step = 1 / (2**0.5 + 0.5)
    torch.testing.assert_close(found, torch.tensor([-step, step, 0.0, 0.0]))


def test_a_gradient_in_float16_neither_vanishes_nor_overflows() -> None:
    """1e-9 is 0 in float16; times 2¹⁶ it is 6.6e-5. 1e3 times 2¹⁶ or 2¹² is infinite there, but not times 2⁴."""
    x = torch.ones(1, requires_grad=True)
    for slope in (1e-9, 1e3, 1e4):
        assert scaled_gradient((x * slope).sum(), x).item() == pytest.approx(slope)
        half = x.detach().half().requires_grad_()
        assert scaled_gradient((half.float() * slope).sum(), half).item() == pytest.approx(slope, rel=1e-2)
        with torch.autocast("cpu", torch.float16):
            (product,) = torch.ones(1, 1) @ (x[:, None] * slope)
        assert scaled_gradient(product.sum(), x).item() == pytest.approx(slope, rel=1e-2)
    infinite = x.detach().half().requires_grad_()
    assert scaled_gradient((infinite.float() * 1e9).sum(), infinite).isinf()


def test_a_head_is_not_rounded_under_autocast() -> None:
    """1 and 1.001 are one number in bfloat16, whose step there is 1 / 128."""
    head = torch.nn.Linear(1, 1, bias=False)
    head.weight.data.fill_(1.0)
    states = torch.tensor([[1.0], [1.001]])
    with torch.autocast("cpu", torch.bfloat16):
        assert len(head(states).unique()) == 1
        found = in_float32(head, states)
        assert torch.is_autocast_enabled("cpu")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, states)
