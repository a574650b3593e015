"""Prompts whose completions are rewarded alike make room for others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lora_gan.advantages import LeaveOneOut, MovingAverage
from lora_gan.data import InstructionDataModule
from lora_gan.dynamic_sampling import Scored, replace_uninformative
from lora_gan.errors import LoraGANError
from lora_gan.losses import ClippedPPO
from lora_gan.rewards import FunctionReward
from lora_gan.sampling import Sampling
from lora_gan.types import Example, PromptBatch, Rollout, Scores
from tests.helpers.steps import Build, Recorder, differing, fit, trainer


def scored(*groups: tuple[str, float, float]) -> Scored:
    """Prompts, each with the rewards of two completions; an upper-case one has a target, whose reward is its length.

    The completions of a prompt are as long as its name.
    """
    n = len(groups)
    examples = tuple(Example(name, "t" if name.isupper() else "") for name, *_ in groups)
    ids = tuple(torch.tensor([ord(name[0])]) for name, *_ in groups)
    batch = PromptBatch(examples, ids, ids, ((),) * n)
    lengths = torch.tensor([len(name) for name, *_ in groups for _ in range(2)])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    logprobs = -lengths[:, None] * mask.float()
    texts = tuple(f"{name}{i}" for name, *_ in groups for i in range(2))
    rollout = Rollout(mask.long(), mask, logprobs, lengths > 2, texts, 2)
    rewards = torch.tensor([reward for _, *pair in groups for reward in pair])
    targets = torch.tensor([float(len(name)) for name, *_ in groups if name.isupper()])
    applies, there = {"r": torch.ones(2 * n).bool()}, {"r": torch.ones(len(targets)).bool()}
    scores = Scores(2 * rewards, {"r": rewards}, applies, targets, {"r": targets}, there, logprobs, 3 * logprobs)
    return Scored(batch, rollout, scores, tuple(scores.parts))


def names(found: Scored) -> list[str]:
    return [example.prompt for example in found.batch.examples]


def test_rewards_without_weight_and_rounding_do_not_count() -> None:
    found = scored(("a", 0, 1), ("b", 1, 1 + 1e-7), ("c", 0.5, 0.5))
    assert found.informative == [0]
    (name, part), *_ = found.scores.parts.items()
    measured = replace(found.scores, parts={name: torch.zeros_like(part), "measured": part})
    assert replace(found, scores=measured, counted=(name,)).informative == []
    assert replace(found, scores=measured, counted=("measured",)).informative == [0]


def test_others_take_the_place_of_those_that_teach_nothing() -> None:
    """Of four prompts two are informative; the first draw finds one of two, the second the last."""
    draws = [scored(("e", 1, 1), ("FFF", 0, 1)), scored(("g", 1, 0))]
    asked: list[int] = []

    def draw(count: int) -> Scored:
        asked.append(count)
        return draws.pop(0)

    given = scored(("A", 0, 0), ("BB", 0, 1), ("c", 2, 2), ("D", 3, 1))
    found, metrics = replace_uninformative(given, draw, rounds=5)
    assert asked == [2, 1]
    assert names(found) == ["BB", "D", "FFF", "g"]
    assert found.rollout.texts == ("BB0", "BB1", "D0", "D1", "FFF0", "FFF1", "g0", "g1")
    assert found.rollout.mask.sum(-1).tolist() == [2, 2, 1, 1, 3, 3, 1, 1]
    assert found.rollout.truncated.tolist() == [False] * 4 + [True] * 2 + [False] * 2
    assert found.scores.parts["r"].tolist() == [0, 1, 3, 1, 0, 1, 1, 0]
    assert found.scores.total.tolist() == [0, 2, 6, 2, 0, 2, 2, 0]
    assert found.scores.target_total.tolist() == [2, 1, 3], "of those with a target, in their order"
    assert found.scores.base_logprobs.tolist() == (3 * found.rollout.logprobs).tolist()
    assert {name.split("/")[1]: int(value) for name, value in metrics.items()} == {
        "skipped": 3,
        "rounds": 2,
        "prompts": 4,
    }


def test_a_step_has_fewer_prompts_or_its_own_where_no_others_are_found() -> None:
    def nothing(count: int) -> Scored:
        return scored(*[("e", 1, 1)] * count)

    given = scored(("A", 0, 0), ("BB", 0, 1), ("c", 2, 2))
    found, metrics = replace_uninformative(given, nothing, rounds=2)
    assert names(found) == ["BB"] and found.rollout.ids.shape == (2, 2)
    assert int(metrics["dynamic_sampling/skipped"]) == 2 + 2 + 2
    given = scored(("A", 0, 0), ("c", 2, 2))
    found, metrics = replace_uninformative(given, nothing, rounds=1)
    assert names(found) == ["A", "c"] and int(metrics["dynamic_sampling/prompts"]) == 0
    whole = scored(("A", 0, 1))
    assert names(replace_uninformative(whole, nothing, rounds=3)[0]) == ["A"]


# in a run


def odd_if_yes(response: str, target: str) -> float:
    """Prompts with another target than yes teach nothing."""
    return float(target == "yes" and len(response) % 2)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"{n}?", "completion": "yes" if n % 3 else "no"} for n in range(12)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return str(path)


def settings() -> dict[str, Any]:
    return {
        "rewards": [FunctionReward(odd_if_yes)],
        "advantage": LeaveOneOut(),
        "policy_loss": ClippedPPO(num_iterations=1, num_minibatches=2),
        "dynamic_sampling": 4,
        "num_generations": 4,
        "sampling": Sampling(max_new_tokens=5),
        "micro_batch_size": 3,
    }


def data(rows: str, base: str) -> InstructionDataModule:
    return InstructionDataModule(path=rows, tokenizer=base, batch_size=4, validation=0.0, test=0.0)


def test_a_run_learns_from_informative_prompts_and_resumes_exactly(
    rows: str, build: Build, bases: dict[str, str], tmp_path: Path
) -> None:
    recorder, path = Recorder(), tmp_path / "one.ckpt"
    torch.manual_seed(5)
    whole = trainer(3, recorder)
    whole.fit(build(**settings()), data(rows, bases["gpt2"]))
    replaced = 0
    for output, report in zip(recorder.outputs, recorder.reports, strict=True):
        assert output.batch is not None and output.scores is not None
        assert len(output.rollout) == 4 * len(output.batch)
        if report["dynamic_sampling/prompts"]:
            assert set(output.batch.targets) == {"yes"}
            assert report["reward/frac_reward_zero_std"] == 0
        replaced += int(report["dynamic_sampling/skipped"])
    assert replaced > 0 and any(report["dynamic_sampling/prompts"] for report in recorder.reports)
    torch.manual_seed(5)
    saving = ModelCheckpoint(tmp_path, "one", every_n_train_steps=1)
    trainer(1, saving, enable_checkpointing=True).fit(build(**settings()), data(rows, bases["gpt2"]))
    again = Recorder()
    trainer(3, again).fit(build(**settings()), data(rows, bases["gpt2"]), ckpt_path=path, weights_only=True)
    assert again.reports == recorder.reports[1:]
    assert not list(differing(again.weights[-1], recorder.weights[-1]))


def test_nothing_is_replaced_where_the_discriminator_pays(rows: str, build: Build, bases: dict[str, str]) -> None:
    recorder = Recorder()
    trainer(1, recorder).fit(build(**settings(), adversarial=0.5), data(rows, bases["gpt2"]))
    assert not any(name.startswith("dynamic_sampling") for name in recorder.reports[0])


def test_mistakes(build: Build, batch: PromptBatch) -> None:
    with pytest.raises(LoraGANError, match="MovingAverage learns from them, too: set it to 0"):
        build(**settings() | {"advantage": MovingAverage()})
    with pytest.raises(LoraGANError, match="needs num_generations of at least 2; got 4 and 1"):
        build(dynamic_sampling=4, num_generations=1)
    with pytest.raises(LoraGANError, match="draws other prompts from an InstructionDataModule, and this run has none"):
        fit(build(**settings()), [batch], 1)
