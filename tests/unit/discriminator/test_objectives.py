"""What the discriminator learns, worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lora_gan.discriminator.objectives import (
    Auxiliary,
    BradleyTerry,
    ClosenessBCE,
    ClosenessOrdinal,
    ClosenessRegression,
    Combined,
    DiscriminatorObjective,
    GanBCE,
    ListwiseSoftmax,
    PairwisePayoff,
    RewardRanking,
    RewardRegression,
    discriminator_metrics,
)
from lora_gan.errors import LoraGANError
from lora_gan.types import DiscriminatorBatch, DiscriminatorOutput, LossTerm

LN3 = math.log(3)  # σ(ln 3) = ¾


def output(
    score: list[float],
    prompt: list[int] | None = None,
    reward: list[float] | None = None,
    is_target: list[bool] | None = None,
) -> DiscriminatorOutput:
    """Completions to one prompt each unless it is said which; none is the target unless it is said."""
    n = len(score)
    return DiscriminatorOutput(
        score=torch.tensor(score, requires_grad=True),
        auxiliary=torch.zeros(n),
        prompt=torch.tensor(prompt if prompt is not None else list(range(n)), dtype=torch.long),
        length=torch.ones(n, dtype=torch.long),
        is_target=torch.tensor(is_target if is_target is not None else [False] * n, dtype=torch.bool),
        reward=None if reward is None else torch.tensor(reward),
    )


def shown(term: LossTerm) -> dict[str, float]:
    return {name: value.item() for name, value in term.metrics.items()}


def outputs(
    sampled: list[float], target: list[float], hard: list[float], rewards: list[float], targets: list[float]
) -> dict[str, DiscriminatorOutput]:
    return {
        "sampled": output(sampled, reward=rewards),
        "target": output(target, reward=targets),
        "hard": output(hard),
    }


def test_each_kind_weighs_the_same() -> None:
    """Sampled (1² + 0²)/2 = ½, target ½² = ¼, negatives (½² + ½²)/2 = ¼; the mean of the three is ⅓."""
    completions = outputs([1.0, 2.0], [1.0], [0.5, -0.5], [0.0, 2.0], [0.5])
    result = RewardRegression()(completions)
    assert result.loss.item() == pytest.approx(1 / 3)
    assert {name: value.item() for name, value in result.metrics.items()} == {
        "discriminator/error_sampled": 0.5,
        "discriminator/error_target": 0.25,
        "discriminator/error_negatives": 0.25,
    }
    result.loss.backward()
    # d/dx of (x − y)² / n / 3
    sampled, hard = completions["sampled"].score.grad, completions["hard"].score.grad
    assert sampled is not None and hard is not None
    torch.testing.assert_close(sampled, torch.tensor([2 * 1.0 / 2 / 3, 0.0]))
    torch.testing.assert_close(hard, torch.tensor([2 * 0.5 / 2 / 3, -2 * 0.5 / 2 / 3]))


def test_negatives_have_the_reward_that_was_asked_for() -> None:
    result = RewardRegression(negative_reward=-1.0)(outputs([0.0], [1.0], [-1.0, 0.0], [0.0], [1.0]))
    assert result.metrics["discriminator/error_negatives"].item() == 0.5
    assert result.loss.item() == pytest.approx(0.5 / 3)


def test_kinds_that_are_absent_do_not_count() -> None:
    result = RewardRegression()(outputs([], [1.0], [], [], [3.0]))
    assert result.loss.item() == 4.0
    assert set(result.metrics) == {"discriminator/error_target"}


def test_metrics_have_no_gradient() -> None:
    result = RewardRegression()(outputs([1.0], [1.0], [0.5], [0.0], [0.5]))
    assert result.loss.requires_grad
    assert not any(value.requires_grad for value in result.metrics.values())


def test_an_objective_without_anything_to_compare_costs_nothing() -> None:
    """The only sample is the target and there are no negatives: no pair, and a loss of 0 that can be learned from."""
    completions = {"target": output([1.0], is_target=[True]), "sampled": output([3.0], is_target=[True])}
    for objective in (BradleyTerry(), ListwiseSoftmax(), Combined([BradleyTerry(), ListwiseSoftmax()])):
        result = objective(completions)
        assert result.loss.item() == 0.0 and result.metrics == {}
        result.loss.backward()  # type: ignore[no-untyped-call]


# closeness


def closeness_of(objective: DiscriminatorObjective) -> LossTerm:
    """Samples: one that is the target, one that is paid 0.95, one that is paid 0.6; a target; two negatives."""
    return objective(
        {
            "sampled": output([LN3, LN3, -LN3], reward=[0.1, 0.95, 0.6], is_target=[True, False, False]),
            "target": output([LN3]),
            "hard": output([-LN3, 0.0]),
        }
    )


def test_closeness_yes_no_by_hand() -> None:
    """σ(ln 3) = ¾. Samples are close, close and not close, each believed with ¾: −ln ¾. The target likewise.

    The negatives are disbelieved with ¾ and ½: (−ln ¾ − ln ½)/2.
    """
    found = closeness_of(ClosenessBCE(close_from=0.9))
    hard = -(math.log(3 / 4) + math.log(1 / 2)) / 2
    assert shown(found) == pytest.approx(
        {
            "discriminator/error_sampled": -math.log(3 / 4),
            "discriminator/error_target": -math.log(3 / 4),
            "discriminator/error_hard": hard,
        }
    )
    assert found.loss.item() == pytest.approx((-2 * math.log(3 / 4) + hard) / 3)


def test_what_counts_as_close_is_a_setting() -> None:
    """From 0.5 on the third sample is close, too, and it is believed with ¼ only."""
    found = closeness_of(ClosenessBCE(close_from=0.5)).metrics["discriminator/error_sampled"]
    assert found.item() == pytest.approx(-(2 * math.log(3 / 4) + math.log(1 / 4)) / 3)


def test_closeness_score_by_hand() -> None:
    """Samples (¾ − 1)², (¾ − 0.95)², (¼ − 0.6)²; target (¾ − 1)²; negatives ¼² and ½²."""
    found = shown(closeness_of(ClosenessRegression()))
    assert found == pytest.approx(
        {
            "discriminator/error_sampled": (0.25**2 + 0.2**2 + 0.35**2) / 3,
            "discriminator/error_target": 0.25**2,
            "discriminator/error_hard": (0.25**2 + 0.5**2) / 2,
        }
    )


def test_closeness_grades_by_hand() -> None:
    """Four grades: borders θ = logit(¼, ½, ¾) = −ln 3, 0, ln 3. P(grade ≥ j) = σ(score − θ_j).

    A score of 0 gives 1, ¾, ½, ¼ and so each grade ¼. A score of ln 3 gives σ(2 ln 3) = 9/10, ¾, ½: grades ⅒, 0.15, ¼
    and ½. Rewards 0, 0.3, 0.5 and 1 are the grades 0, 1, 2 and 3.
    """
    rewards = [0.0, 0.3, 0.5, 1.0]
    objective = ClosenessOrdinal(grades=4)
    for score, likelihood in ((0.0, [0.25] * 4), (LN3, [0.1, 0.15, 0.25, 0.5])):
        for reward, wanted in zip(rewards, likelihood, strict=True):
            found = objective({"target": output([]), "sampled": output([score], reward=[reward])})
            assert found.loss.item() == pytest.approx(-math.log(wanted), rel=1e-5)


def test_two_grades_are_yes_and_no() -> None:
    """The only border is logit(½) = 0: cross-entropy of σ(score), targets and what is paid ½ or more being close."""
    completions = {"target": output([LN3]), "sampled": output([LN3, 0.4], reward=[0.2, 0.7])}
    wanted = shown(ClosenessBCE(close_from=0.5)(completions))
    assert shown(ClosenessOrdinal(grades=2)(completions)) == pytest.approx(wanted)
    with pytest.raises(LoraGANError, match="at least 2, got 1"):
        ClosenessOrdinal(1)


@pytest.mark.parametrize("score", [-60.0, 60.0])
def test_grades_teach_even_a_discriminator_that_is_far_off(score: float) -> None:
    """Far above every border the likelihood of a lower grade falls by e for each unit: a gradient of ±1, never 0."""
    reward = 0.5
    completions = {"target": output([]), "sampled": output([score], reward=[reward])}
    ClosenessOrdinal(grades=4)(completions).loss.backward()  # type: ignore[no-untyped-call]
    gradient = completions["sampled"].score.grad
    assert gradient is not None
    assert gradient.item() == pytest.approx(math.copysign(1, score), rel=1e-4)


def test_an_opponent_whose_reward_is_unknown_is_not_called_close_or_far() -> None:
    completions = {"target": output([0.0]), "sampled": output([0.0], reward=[0.5]), "opponent": output([5.0])}
    for objective in (ClosenessBCE(), ClosenessRegression(), ClosenessOrdinal(), RewardRegression()):
        completions["target"] = output([0.0], reward=[1.0])
        assert set(objective(completions).metrics) == {"discriminator/error_target", "discriminator/error_sampled"}


# real and generated


def test_real_generated_by_hand() -> None:
    """Smoothing ⅕: the target, believed with ¾, costs −⅘·ln ¾ − ⅕·ln ¼. The rest is generated, also the opponent.

    They are disbelieved with ¾, ½ and ¼.
    """
    completions = {
        "target": output([LN3]),
        "sampled": output([-LN3]),
        "opponent": output([0.0]),
        "hard": output([LN3]),
    }
    found = GanBCE(label_smoothing=0.2)(completions)
    real = -0.8 * math.log(3 / 4) - 0.2 * math.log(1 / 4)
    generated = -(math.log(3 / 4) + math.log(1 / 2) + math.log(1 / 4)) / 3
    assert shown(found) == pytest.approx({"discriminator/error_real": real, "discriminator/error_generated": generated})
    assert found.loss.item() == pytest.approx((real + generated) / 2)
    assert GanBCE(0.0)(completions).metrics["discriminator/error_real"].item() == pytest.approx(-math.log(3 / 4))
    with pytest.raises(LoraGANError, match="label_smoothing"):
        GanBCE(0.5)


# ranking


def ranked() -> dict[str, DiscriminatorOutput]:
    """Prompt 0: target 2, samples 1 and 3 (which is the target), a negative 0. Prompt 1: target 0, sample 0."""
    return {
        "target": output([2.0, 0.0], prompt=[0, 1], is_target=[True, True]),
        "sampled": output([1.0, 3.0, 0.0], prompt=[0, 0, 1], is_target=[False, True, False]),
        "hard": output([0.0], prompt=[0]),
    }


def cost(margin: float) -> float:
    """−ln σ(margin)"""
    return math.log(1 + math.exp(-margin))


def test_bradley_terry_by_hand() -> None:
    """Target over samples: margins 1 and 0, the sample that is the target being no rival. Target over negative: 2.

    Samples over the negative: 1 and 3.
    """
    found = BradleyTerry()(ranked())
    wanted = {
        "discriminator/error_target_sampled": (cost(1) + cost(0)) / 2,
        "discriminator/error_target_negative": cost(2),
        "discriminator/error_sampled_negative": (cost(1) + cost(3)) / 2,
    }
    assert shown(found) == pytest.approx(wanted)
    assert found.loss.item() == pytest.approx(sum(wanted.values()) / 3)


def test_samples_need_not_be_over_negatives() -> None:
    found = BradleyTerry(samples_over_negatives=False)(ranked())
    assert found.loss.item() == pytest.approx(((cost(1) + cost(0)) / 2 + cost(2)) / 2)


def test_only_pairs_of_similar_length_count_if_asked() -> None:
    """The target has 10 tokens, the samples 12, 13 and 5: within 1.25 times is the first alone."""
    completions = {
        "target": replace(output([2.0], is_target=[True]), length=torch.tensor([10])),
        "sampled": replace(output([1.0, 5.0, 7.0], prompt=[0, 0, 0]), length=torch.tensor([12, 13, 5])),
    }
    assert BradleyTerry(max_length_ratio=1.25)(completions).loss.item() == pytest.approx(cost(1))
    assert BradleyTerry(max_length_ratio=1.3)(completions).loss.item() == pytest.approx((cost(1) + cost(-3)) / 2)
    every = BradleyTerry()(completions).loss.item()
    assert every == pytest.approx((cost(1) + cost(-3) + cost(-5)) / 3)
    with pytest.raises(LoraGANError, match="max_length_ratio must be at least 1"):
        BradleyTerry(max_length_ratio=0.8)


def test_reward_ranking_by_hand() -> None:
    """Prompt 0: the target (1) over both samples (0 and ½), and ½ over 0. Prompt 1: equal rewards rank nothing.

    Prompt 2: nothing is known of its sample. The hard negative has no reward.
    """
    nan = math.nan
    found = RewardRanking()(
        {
            "target": output([2.0], prompt=[0], reward=[1.0], is_target=[True]),
            "sampled": output([1.0, 3.0, 5.0, 7.0, 9.0], prompt=[0, 0, 1, 1, 2], reward=[0.0, 0.5, 1.0, 1.0, nan]),
            "hard": output([0.0], prompt=[0]),
        }
    )
    assert found.loss.item() == pytest.approx((cost(2 - 1) + cost(2 - 3) + cost(3 - 1)) / 3)
    assert list(found.metrics) == ["discriminator/error_ranking"]


def test_reward_ranking_without_a_pair_is_zero() -> None:
    alike = {"target": output([], reward=[]), "sampled": output([1.0, 3.0], prompt=[0, 0], reward=[1.0, 1.0])}
    for outputs_ in (alike, {"target": output([]), "sampled": output([1.0])}):
        found = RewardRanking()(outputs_)
        assert found.loss.item() == 0 and found.loss.requires_grad


def test_bradley_terry_ranks_the_opponent_as_it_ranks_a_sample() -> None:
    completions = ranked() | {"opponent": output([5.0], prompt=[1])}
    found = BradleyTerry()(completions).metrics["discriminator/error_target_sampled"]
    assert found.item() == pytest.approx((cost(1) + cost(0) + cost(-5)) / 3)


def test_bradley_terry_does_not_move_a_sample_against_itself() -> None:
    """Of prompt 1's completions the sample is pushed down by σ(0)/2 pairs/3 kinds, and the target up as much."""
    completions = ranked()
    BradleyTerry()(completions).loss.backward()  # type: ignore[no-untyped-call]
    target, sampled = completions["target"].score.grad, completions["sampled"].score.grad
    assert target is not None and sampled is not None
    assert sampled[2].item() == pytest.approx(0.5 / 2 / 3)
    assert target[1].item() == pytest.approx(-0.5 / 2 / 3)
    assert sampled[1].item() < 0, "the sample that is the target is pushed up, over the negative"


def test_pair_softmax_with_one_rival_is_the_pair() -> None:
    """−ln(e²/(e² + e¹)) = −ln σ(2 − 1)."""
    found = ListwiseSoftmax()({"target": output([2.0]), "sampled": output([1.0])})
    assert found.loss.item() == pytest.approx(cost(1))


def test_pair_softmax_with_several_rivals_by_hand() -> None:
    """Prompt 0: target ln 4 against ln 1, ln 2 and a negative ln 1: 4/8. Prompt 1: one rival of the same score: ½.

    Prompt 2's only rival is the target word for word: it is not asked. Mean of ln 2 and ln 2.
    """
    completions = {
        "target": output([math.log(4), 5.0, 1.0], prompt=[0, 1, 2]),
        "sampled": output([0.0, math.log(2), 5.0, 9.0], prompt=[0, 0, 1, 2], is_target=[False, False, False, True]),
        "hard": output([0.0], prompt=[0]),
    }
    found = ListwiseSoftmax()(completions)
    assert shown(found) == pytest.approx({"discriminator/error_softmax": math.log(2)})
    found.loss.backward()  # type: ignore[no-untyped-call]
    target, sampled = completions["target"].score.grad, completions["sampled"].score.grad
    assert target is not None and sampled is not None
    torch.testing.assert_close(target, torch.tensor([-0.25, -0.25, 0.0]))  # −(1 − ½)/2
    torch.testing.assert_close(sampled, torch.tensor([1 / 16, 2 / 16, 0.25, 0.0]))  # p/2


# the auxiliary head, mixtures


def test_auxiliary_predicts_a_part_of_the_reward() -> None:
    """Samples (0.5 − 1)² and (0.5 − 0)², target (0.25 − 0.5)²; negatives have no reward, the score does not matter."""
    sampled = replace(
        output([9.0, 9.0], reward=[7.0, 7.0]),
        auxiliary=torch.tensor([0.5, 0.5]),
        parts={"perplexity": torch.tensor([1.0, 0.0])},
    )
    target = replace(
        output([9.0], reward=[7.0]), auxiliary=torch.tensor([0.25]), parts={"perplexity": torch.tensor([0.5])}
    )
    completions = {"sampled": sampled, "target": target, "hard": output([1.0])}
    found = Auxiliary()(completions)
    assert shown(found) == pytest.approx(
        {"discriminator/auxiliary_error_sampled": 0.25, "discriminator/auxiliary_error_target": 0.0625}
    )
    assert found.loss.item() == pytest.approx((0.25 + 0.0625) / 2)
    with pytest.raises(LoraGANError, match=r"no reward is named 'bleu'.*one of: perplexity"):
        Auxiliary("bleu")(completions)


def test_combined_is_the_weighted_sum() -> None:
    """2·−ln σ(1) + 3·(−ln σ(2) − ln σ(−1))/2"""
    completions = {"target": output([2.0]), "sampled": output([1.0])}
    found = Combined([ListwiseSoftmax(), GanBCE(0.0)], [2.0, 3.0])(completions)
    assert found.loss.item() == pytest.approx(2 * cost(1) + 3 * (cost(2) + cost(-1)) / 2)
    assert set(found.metrics) == {
        "discriminator/error_softmax",
        "discriminator/error_real",
        "discriminator/error_generated",
    }
    alone = Combined([ListwiseSoftmax(), ListwiseSoftmax()])(completions)
    assert alone.loss.item() == pytest.approx(2 * cost(1))
    for objectives, weights in (([], None), ([ListwiseSoftmax()], [1.0, 2.0])):
        with pytest.raises(LoraGANError, match="a weight for each, got"):
            Combined(objectives, weights)


# two beside each other


def comparisons() -> dict[str, DiscriminatorOutput]:
    """Prompt 0 has a target and three completions, of which one is the target; prompt 1 has none."""
    sampled = output([-2 * LN3, 5.0, 9.0], prompt=[0, 0, 1], is_target=[False, True, False])
    return {
        "target": output([0.0], prompt=[0], is_target=[True]),
        "sampled": replace(sampled, auxiliary=torch.tensor([2 / 3, 7.0, 7.0]).log()),
        "hard": replace(output([0.0], prompt=[0]), auxiliary=torch.tensor([2.0]).log()),
    }


def test_the_payoff_by_hand() -> None:
    """The target is named with ¾ and ¼, ties have 1/6 and ½; with 0.6 for a tie (0.85 + 0.55)/2."""
    result = PairwisePayoff(tie=0.6, entropy=0.0)(comparisons())
    assert result.loss.item() == pytest.approx(-0.7)
    entropies = [-sum(p * math.log(p) for p in row) for row in ((3 / 4, 1 / 12, 1 / 6), (1 / 4, 1 / 4, 1 / 2))]
    open_ = PairwisePayoff(tie=0.6, entropy=0.2)(comparisons())
    assert open_.loss.item() == pytest.approx(-0.7 - 0.2 * sum(entropies) / 2)
    assert shown(result) == pytest.approx({"discriminator/payoff": 0.7, "discriminator/ties": 1 / 3})
    found = discriminator_metrics(comparisons())
    assert found["discriminator/accuracy_sampled"] == 1.0 and found["discriminator/accuracy_hard"] == 0.5
    assert found["discriminator/accuracy"] == 0.75


def test_nothing_is_learned_without_a_pair() -> None:
    """From a copy of the target and from a prompt without a target."""
    given = comparisons()
    PairwisePayoff()(given).loss.backward()
    slopes = given["sampled"].score.grad
    assert slopes is not None and slopes[0] > 0 and not slopes[1:].any()
    alone = PairwisePayoff()(given | {"target": output([]), "hard": output([])})
    assert alone.loss.item() == 0.0 and alone.loss.requires_grad and not alone.metrics


def test_a_doubtful_pair_is_called_a_tie_where_that_pays() -> None:
    """At margin 0 naming pays ½: the logit of a tie rises above that, falls below, and stays at it."""
    for tie, sign in ((0.3, -1), (0.5, 0), (0.8, 1)):
        logit = torch.zeros(1, requires_grad=True)
        pair = {"target": output([0.0]), "sampled": replace(output([0.0]), auxiliary=logit)}
        PairwisePayoff(tie, entropy=0.0)(pair).loss.backward()
        assert logit.grad is not None and logit.grad.neg().round(decimals=6).sign().item() == sign


def test_the_payoff_is_checked() -> None:
    with pytest.raises(LoraGANError, match=r"tie of PairwisePayoff must be in \[0, 1\], got -1"):
        PairwisePayoff(-1.0)
    for entropy in (-1.0, math.inf, math.nan):
        with pytest.raises(LoraGANError, match="entropy of PairwisePayoff must be at least 0 and finite, got"):
            PairwisePayoff(entropy=entropy)
    assert Combined([BradleyTerry(), PairwisePayoff()]).needs_comparison and not Combined([GanBCE()]).needs_comparison


# how good was it


def test_accuracy_by_kind_by_hand() -> None:
    """Prompt 0: target 2 beats 1, not 4. Prompt 1: target 0 ties with 0; the sample that is the target does not count.

    Samples: (1 + 0 + ½)/3; negatives: 1 of 2; together 2.5 of 5.
    """
    found = discriminator_metrics(
        {
            "target": output([2.0, 0.0], prompt=[0, 1], is_target=[True, True]),
            "sampled": output([1.0, 4.0, 0.0, 7.0], prompt=[0, 0, 1, 1], is_target=[False, False, False, True]),
            "hard": output([3.0, -1.0], prompt=[0, 1]),
            "cut": output([]),
        }
    )
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {
            "discriminator/score_target": 1.0,
            "discriminator/score_sampled": 3.0,
            "discriminator/score_hard": 1.0,
            "discriminator/accuracy_sampled": 0.5,
            "discriminator/accuracy_hard": 0.5,
            "discriminator/accuracy": 0.5,
            "discriminator/length_accuracy": 0.5,
        }
    )


def test_length_accuracy_is_that_of_the_better_rule() -> None:
    """Targets of 3 tokens against 5, 4, 3 and 1: the shorter is the target in 2 pairs, the tie counts half: 2.5/4."""
    lengths = torch.tensor([5, 4, 3, 1])
    completions = {
        "target": replace(output([1.0], is_target=[True]), length=torch.tensor([3])),
        "sampled": replace(output([0.0] * 4, prompt=[0] * 4), length=lengths),
    }
    assert discriminator_metrics(completions)["discriminator/length_accuracy"].item() == 0.625
    turned = completions | {"sampled": replace(completions["sampled"], length=6 - lengths)}
    assert discriminator_metrics(turned)["discriminator/length_accuracy"].item() == 0.625, "the longer is the target"


def test_correlation_by_hand() -> None:
    """Scores 0, 1, 2 and rewards 1, 1, 4: deviations (−1, 0, 1) and (−1, −1, 2), 3/(√2·√6)."""
    target = {"target": output([0.0])}
    found = discriminator_metrics(target | {"sampled": output([0.0, 1.0, 2.0], prompt=[0] * 3, reward=[1.0, 1.0, 4.0])})
    assert found["discriminator/correlation"].item() == pytest.approx(3 / math.sqrt(12))
    flat = discriminator_metrics(target | {"sampled": output([1.0, 1.0], prompt=[0, 0], reward=[0.0, 1.0])})
    assert flat["discriminator/correlation"].item() == 0.0
    assert "discriminator/correlation" not in discriminator_metrics(target | {"sampled": output([1.0], reward=[1.0])})


def test_which_completions_are_the_target_word_for_word() -> None:
    """An empty one, which is EOS alone, never is, and neither is another prompt's target."""
    eos, one, other = (torch.tensor(ids) for ids in ([0], [5, 6, 0], [5, 7, 0]))
    rows = [[one, other, one[:2]], [], [eos, one]]
    batch = DiscriminatorBatch((eos, eos, eos), (one, other, eos), {"sampled": rows, "none": [[], [], []]})
    assert batch.are_targets("sampled") == [True, False, False, False, False]
    assert batch.are_targets("none") == []


@pytest.mark.parametrize(
    "objective",
    [
        RewardRegression(),
        ClosenessBCE(),
        ClosenessRegression(),
        ClosenessOrdinal(),
        GanBCE(),
        Combined([RewardRegression(), ClosenessBCE()]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nothing_is_learned_about_a_reward_that_does_not_apply(objective: DiscriminatorObjective) -> None:
    """A NaN stands for it. Targets and negatives are what they are without any reward."""
    known = outputs([1.0, 2.0], [1.0], [0.5], [0.0, 1.0], [1.0])
    more = outputs([1.0, 2.0, 3.0], [1.0], [0.5], [0.0, 1.0, math.nan], [1.0])
    if isinstance(objective, GanBCE):
        known = more  # which needs no reward
    assert objective(more).loss.item() == pytest.approx(objective(known).loss.item())
    assert objective(more).loss.isfinite() and all(math.isfinite(value) for value in shown(objective(more)).values())
    found = discriminator_metrics(more)
    assert found["discriminator/correlation"].item() == pytest.approx(1)
    none = outputs([1.0, 2.0], [1.0], [0.5], [math.nan] * 2, [math.nan])
    assert objective(none).loss.isfinite() and "discriminator/correlation" not in discriminator_metrics(none)
