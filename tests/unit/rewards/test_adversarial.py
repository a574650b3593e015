"""What the discriminator's score earns, worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch

from lora_gan.data import InstructionDataModule
from lora_gan.discriminator import PairwiseDiscriminator, PairwisePayoff
from lora_gan.errors import LoraGANError
from lora_gan.final_answer import Pattern
from lora_gan.rewards.adversarial import (
    AdversarialReward,
    AgainstTarget,
    GailReward,
    Logit,
    LogProbability,
    Payoff,
    Probability,
    WeightedVote,
    WinRate,
    WithoutLength,
)
from lora_gan.types import DiscriminatorScores, PromptBatch
from tests.helpers.steps import Build, fit

LN3 = math.log(3)  # σ(ln 3) = ¾


def disc_scores(sampled: list[float], target: list[float], opponent: list[float], k: int) -> DiscriminatorScores:
    return DiscriminatorScores(torch.tensor(sampled), torch.tensor(target), torch.tensor(opponent), k, {})


@pytest.mark.parametrize(
    ("adversarial_reward", "wanted"),
    [
        (Logit(), [LN3, 0.0, -LN3]),
        (Probability(), [3 / 4, 1 / 2, 1 / 4]),
        (LogProbability(), [math.log(3 / 4), math.log(1 / 2), math.log(1 / 4)]),
        (GailReward(), [-math.log(1 / 4), -math.log(1 / 2), -math.log(3 / 4)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_scores_become_rewards(adversarial_reward: AdversarialReward, wanted: list[float]) -> None:
    """Scores ln 3, 0 and −ln 3 are the probabilities ¾, ½ and ¼."""
    found = adversarial_reward(disc_scores([LN3, 0.0, -LN3], [], [], 1))
    torch.testing.assert_close(found, torch.tensor(wanted))
    assert not adversarial_reward.needs_opponent


@pytest.mark.parametrize(
    "adversarial_reward", [Logit(), Probability(), LogProbability(), GailReward(), AgainstTarget()]
)
def test_a_better_score_earns_more_however_sure_the_discriminator_is(adversarial_reward: AdversarialReward) -> None:
    found = adversarial_reward(disc_scores([-90.0, -1.0, 1.0, 90.0], [0.0] * 4, [], 1))
    assert found.isfinite().all()
    assert (found.diff() > 0).all()


def test_against_the_target_of_the_same_prompt() -> None:
    """Two prompts with targets 1 and 0 and two completions each: σ(0), σ(ln 3), σ(−ln 3), σ(0)."""
    found = AgainstTarget()(disc_scores([1.0, 1 + LN3, -LN3, 0.0], [1.0, 0.0], [], 2))
    torch.testing.assert_close(found, torch.tensor([1 / 2, 3 / 4, 1 / 4, 1 / 2]))


def test_a_payoff_is_being_named_and_a_part_of_a_tie() -> None:
    """Score −2·ln 3 with a tie of ⅔ wins 1/12 and ties 1/6; score 0 with a tie of 2 wins ¼ and ties ½."""
    scored = replace(disc_scores([-2 * LN3, 0.0], [0.0], [], 2), tie_logit=torch.tensor([2 / 3, 2.0]).log())
    torch.testing.assert_close(Payoff(tie=0.5)(scored), torch.tensor([1 / 6, 1 / 2]))
    assert Payoff().tie == PairwisePayoff().tie, "both sides are paid the same"
    torch.testing.assert_close(Payoff(tie=0.0)(scored), torch.tensor([1 / 12, 1 / 4]))
    torch.testing.assert_close(Payoff(tie=1.0)(scored), torch.tensor([1 / 4, 3 / 4]))
    with pytest.raises(LoraGANError, match=r"tie of Payoff must be in \[0, 1\], got 2"):
        Payoff(tie=2.0)


def test_a_payoff_needs_a_comparison_with_a_target(build: Build) -> None:
    with pytest.raises(LoraGANError, match="Payoff needs a target for each prompt, got 1 targets for 2 prompts"):
        Payoff()(replace(disc_scores([0.0, 0.0], [0.0], [], 1), tie_logit=torch.zeros(2)))
    with pytest.raises(LoraGANError, match="needs the logits of ties, which PairwiseDiscriminator gives"):
        Payoff()(disc_scores([0.0], [0.0], [], 1))
    with pytest.raises(LoraGANError, match="AdapterDiscriminator does not: choose another discriminator"):
        build(adversarial_reward=Payoff())


def test_prompts_without_targets_are_refused_before_the_first_step(build: Build, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "AB", "completion": "cd"}\n{"prompt": "CD", "answer": "7"}\n')
    data = InstructionDataModule(path=str(rows), batch_size=2, validation=0.0, test=0.0)
    module = build(adversarial_reward=AgainstTarget())
    with pytest.raises(LoraGANError, match="AgainstTarget needs a target for each prompt, and 1 training examples"):
        L.Trainer(accelerator="cpu", max_steps=1, logger=False, default_root_dir=tmp_path).fit(module, data)


def test_the_generator_earns_its_payoff(build: Build, batch: PromptBatch) -> None:
    module = build(
        model=PairwiseDiscriminator(),
        objective=PairwisePayoff(),
        adversarial_reward=Payoff(),
        adversarial=1.0,
    )
    recorder, _ = fit(module, [batch], 3)
    for output, report in zip(recorder.outputs, recorder.reports, strict=True):
        assert output.discriminator is not None and not output.discriminator.target.any()
        payoff = Payoff()(output.discriminator)
        assert report["reward/adversarial"] == pytest.approx(payoff.mean().item(), abs=1e-6)
        assert payoff.min() > 0 and payoff.max() < 1


def test_a_win_is_the_share_of_the_opponents_completions_that_are_beaten() -> None:
    """Prompt 0: 5 beats 1 and 2; 1 ties with 1 and loses to 2. Prompt 1: 0 loses to 9 and beats −1; 9 ties and wins."""
    found = WinRate()(disc_scores([5.0, 1.0, 0.0, 9.0], [], [1.0, 2.0, 9.0, -1.0], 2))
    assert found.tolist() == [1.0, 0.25, 0.5, 0.75]
    assert WinRate.needs_opponent


def test_the_wins_of_equal_roles_sum_to_half() -> None:
    """What one role wins of a pair the other loses, so against itself the mean is ½ exactly."""
    torch.manual_seed(0)
    scores = torch.randn(12).tolist()
    assert WinRate()(disc_scores(scores, [], scores, 4)).mean().item() == 0.5


def test_a_vote_counts_by_credibility() -> None:
    """σ = ¾, ¼, ½, ½ of answers 7, 8, 8. and none: one that is believed counts as two that are not. Then ½ each."""
    scored = disc_scores([LN3, -LN3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [], [], 4)
    answered = replace(scored, answers=("7", "8", " 8.", None, "5", "5", "5", "6"))
    found = WeightedVote()(answered)
    torch.testing.assert_close(found, torch.tensor([3, 3, 3, 0, 6, 6, 6, 2]) / 8)
    assert WeightedVote(majority=True)(answered).tolist() == [1, 1, 1, 0, 1, 1, 1, 0]
    alone = replace(scored, answers=("7", None, None, None, *(None,) * 4))
    assert WeightedVote(majority=True)(alone).tolist() == [1] + [0] * 7, "no answer wins nothing"


def test_the_module_gives_the_final_answers(build: Build, batch: PromptBatch) -> None:
    module = build(final_answer=Pattern("(.)$"), adversarial_reward=WeightedVote(), adversarial=1.0)
    recorder, _ = fit(module, [batch], 1)
    found, rollout = recorder.outputs[0].discriminator, recorder.outputs[0].rollout
    assert found is not None
    assert found.answers == tuple(module.final_answer(text) for text in rollout.texts)  # type: ignore[misc]


def test_what_length_explains_is_left_out_by_hand() -> None:
    """Two prompts. Lengths differ from the prompt's mean by −1, 1, −2 and 2, scores by −1, 1, 0 and 0.

    The slope is (1 + 1 + 0 + 0) / (1 + 1 + 4 + 4) = 0.2 a token; the mean length is 5.
    """
    scores = replace(disc_scores([1.0, 3.0, 7.0, 7.0], [], [], 2), length=torch.tensor([3, 5, 4, 8]))
    torch.testing.assert_close(WithoutLength()(scores), torch.tensor([1.4, 3.0, 7.2, 6.4]))
    longer = replace(scores, sampled=scores.sampled + 5 * (scores.length if scores.length is not None else 0))
    shifted = WithoutLength()(longer) - WithoutLength()(scores)
    torch.testing.assert_close(shifted, torch.full((4,), 25.0), msg="a multiple of the length changes nothing")
    alike = replace(scores, length=torch.tensor([5, 5, 2, 2]))
    assert torch.equal(WithoutLength()(alike), scores.sampled)
    assert WithoutLength(WinRate()).needs_opponent and WithoutLength(AgainstTarget()).needs_target


def test_a_run_without_what_length_explains(build: Build, batch: PromptBatch) -> None:
    """The rewards of a step have no slope in the length."""
    module = build(adversarial=1.0, adversarial_reward=WithoutLength(), num_generations=4, rewards=[])
    recorder, _ = fit(module, [batch], 2)
    scores = recorder.outputs[1].discriminator
    assert scores is not None and scores.length is not None
    assert scores.length.tolist() == [len(ids) for ids in recorder.outputs[1].rollout.ended(3, 256)[0]] + [
        len(ids) for row in recorder.outputs[1].rollout.ended(3, 256)[1:] for ids in row
    ]
    reward, length = (x.float().view(3, 4) for x in (WithoutLength()(scores), scores.length))
    slope = ((reward - reward.mean(1, keepdim=True)) * (length - length.mean(1, keepdim=True))).sum()
    assert abs(float(slope)) < 1e-4 and float(scores.sampled.std()) > 0
