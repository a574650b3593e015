"""The choice of a token: transformers' distributions, drawn faster."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lora_gan.sampling import Sampling, choice
from lora_gan.sampling.choice import choose

VOCABULARY = 20


def logits_of(rows: int = 1) -> Tensor:
    torch.manual_seed(9)
    return (torch.randn(1, VOCABULARY) * 2).repeat(rows, 1)


def warped(logits: Tensor, how: Sampling) -> Tensor:
    """The distribution of transformers' own warpers, (V,)."""
    nothing = torch.zeros(1, 0, dtype=torch.long)
    if how.temperature != 1:
        logits = TemperatureLogitsWarper(how.temperature)(nothing, logits)
    if how.top_k:
        logits = TopKLogitsWarper(how.top_k)(nothing, logits)
    if how.top_p < 1:
        logits = TopPLogitsWarper(how.top_p)(nothing, logits)
    return logits.softmax(-1)[0]


@pytest.mark.parametrize(
    "how",
    [Sampling(), Sampling(temperature=0.5), Sampling(temperature=2.0), Sampling(top_k=5), Sampling(top_k=99)],
    ids=str,
)
def test_a_grid_of_numbers_gives_the_distribution_itself(how: Sampling) -> None:
    """Every 1/n-th quantile once: a token is drawn p·n times but for the two ends of its interval."""
    n = 20_000
    grid = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    found = torch.bincount(choose(logits_of(n) / how.temperature, how, grid).token, minlength=VOCABULARY) / n
    wanted = warped(logits_of(), how)
    assert ((found > 0) == (wanted > 1 / n)).all()
    assert (found - wanted).abs().max() <= 1 / n + 1e-6


@pytest.mark.parametrize("tries", [1, 8])
@pytest.mark.parametrize(
    "how",
    [
        Sampling(top_p=0.9),
        Sampling(top_p=0.5),
        Sampling(top_p=0.01),
        Sampling(top_p=0.8, temperature=0.6),
        Sampling(top_p=0.7, top_k=4),
    ],
    ids=str,
)
def test_top_p_draws_from_the_nucleus(how: Sampling, tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "TRIES", tries)
    n = 100_000
    torch.manual_seed(10)
    uniform = torch.rand(n, tries + 1, dtype=torch.float64)
    found = torch.bincount(choose(logits_of(n) / how.temperature, how, uniform).token, minlength=VOCABULARY) / n
    wanted = warped(logits_of(), how)
    assert ((found > 0) == (wanted > 0)).all(), "the support is exactly the nucleus"
    assert (found - wanted).abs().max() < 4 * (0.25 / n) ** 0.5  # four standard errors


def test_a_row_whose_tries_fail_is_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """p = ½, ¼, ⅛, ⅛ and top_p 0.7: the nucleus is {0, 1} with ⅔ and ⅓. The only try says token 3."""
    monkeypatch.setattr(choice, "TRIES", 1)
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().repeat(4, 1)
    uniform = torch.tensor([[0.95, 0.0], [0.95, 0.66], [0.95, 0.67], [0.95, 0.999]], dtype=torch.float64)
    assert choose(logits, Sampling(top_p=0.7), uniform).token.tolist() == [0, 0, 1, 1]


def test_choosing_greedily() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert choose(logits, Sampling(do_sample=False), torch.zeros(2, 1)).token.tolist() == [1, 0]
