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


# the two levels


@pytest.mark.parametrize("vocabulary", [20, 256, 1000, 5000])
def test_tokens_and_log_probabilities_are_those_of_one_cumulative_sum(vocabulary: int) -> None:
    torch.manual_seed(11)
    logits, uniform = torch.randn(2000, vocabulary) * 3, torch.rand(2000, 1, dtype=torch.float64)
    found = choose(logits, Sampling(), uniform)
    exact = logits.double().softmax(-1)
    wanted = torch.searchsorted(exact.cumsum(-1), uniform, right=True).squeeze(1)
    assert (found.token == wanted).float().mean() > 0.999, "but for rounding at a boundary"
    torch.testing.assert_close(found.logprob, exact.gather(1, found.token[:, None])[:, 0].log().float())
    assert found.logprob.dtype == torch.float32


def test_chi_square_against_softmax() -> None:
    """100,000 draws over 1,000 tokens: χ² of 999 degrees has mean 999 and standard deviation 44.7."""
    torch.manual_seed(12)
    n, logits = 100_000, torch.randn(1, 1000)
    block = [
        choose(logits.expand(10_000, -1), Sampling(), torch.rand(10_000, 1, dtype=torch.float64)) for _ in range(10)
    ]
    found = torch.bincount(torch.cat([b.token for b in block]), minlength=1000)
    wanted = n * logits[0].double().softmax(-1)
    assert ((found - wanted).square() / wanted).sum() < 999 + 4 * 44.7


def test_a_token_of_probability_0_is_never_drawn() -> None:
    """Not even by the numbers at both ends."""
    logits = torch.full((4, 600), -torch.inf)
    logits[:, [3, 300, 301, 520]] = 0.0
    uniform = torch.tensor([[0.0], [0.25], [0.5], [1 - 2**-53]], dtype=torch.float64)
    assert choose(logits, Sampling(), uniform).token.tolist() == [3, 300, 301, 520]
    rising = torch.arange(600.0).expand(4, -1)
    assert choose(rising, Sampling(top_k=1), uniform).token.tolist() == [599] * 4


def test_the_cumulative_sum_of_cuda_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(13)
    logits, uniform = torch.randn(500, 3000) * 3, torch.rand(500, 1, dtype=torch.float64)
    wanted = choose(logits, Sampling(), uniform).token
    monkeypatch.setattr(choice, "_cumulative", lambda x: x @ torch.ones(2 * x.shape[-1:], dtype=x.dtype).triu())
    assert torch.equal(choose(logits, Sampling(), uniform).token, wanted)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_bisection_finds_the_nucleus_of_sorting(top_p: float) -> None:
    torch.manual_seed(14)
    weights = torch.rand(200, 512).pow(8)
    weights[:, 100:103] = weights[:, 100:101]  # ties
    weights[:, 200:300] = 0
    limit = top_p * weights.double().sum(-1, keepdim=True)
    by_sorting, by_bisection = (
        choice._smallest_by_sorting(weights, limit),
        choice._smallest_by_bisection(weights, limit),
    )
    same = ((weights >= by_sorting) == (weights >= by_bisection)).all(1)
    assert same.float().mean() > 0.98, "but for rounding of the mass"
    assert (by_bisection > 0).all()


@pytest.mark.parametrize("tries", [1, 8])
def test_top_p_without_waiting_gives_the_same_tokens(tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "TRIES", tries)
    torch.manual_seed(15)
    weights = torch.rand(3000, 512).pow(8)
    blocks, uniform = choice._blocks(weights), torch.rand(3000, tries + 1, dtype=torch.float64)
    first, limit = choice._draw(weights, blocks, uniform[:, 0]), 0.5 * blocks.sum(-1, keepdim=True)
    retried = choice._retry(weights, blocks, first.clone(), limit, uniform)
    assert (retried == choice._masked(weights, blocks, first, limit, uniform)).float().mean() > 0.999
