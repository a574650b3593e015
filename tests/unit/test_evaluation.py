"""Evaluation of a module: the likelihood of held-out targets, the start of a run, and the discriminator's share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lora_gan.backbone import GENERATOR, LoraSettings
from lora_gan.callbacks import TextMetrics
from lora_gan.callbacks.text_metrics import measure, target_loss
from lora_gan.checkpointing.adapters import save_adapter
from lora_gan.data import DigitChains, InstructionDataModule
from lora_gan.errors import LoraGANError
from lora_gan.module import LoraGANModule
from lora_gan.optimization import OptimizationSettings
from lora_gan.rewards import FunctionReward, NormalizeThenSum
from lora_gan.sampling import sample
from lora_gan.sentence_encoder import MINILM
from lora_gan.types import PromptBatch, Rollout
from tests.conftest import randomise
from tests.helpers.steps import Build, fit, share_of_a, trainer


def by_rows(module: LoraGANModule, batch: PromptBatch) -> list[float]:
    """Log-probability of each target by the model's own forward on plain rows, one at a time."""
    totals = []
    for prompt, target in zip(batch.prompt_ids, batch.target_ids, strict=True):
        logits: Tensor = module.backbone.causal_lm(input_ids=torch.cat([prompt, target])[None]).logits[0]
        found = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, target[:, None])
        totals.append(float(found.sum()))
    return totals


@pytest.fixture
def trained(build: Build) -> LoraGANModule:
    """A module whose adapters matter."""
    module = build()
    randomise(module.backbone)
    return module


@torch.no_grad()
def test_held_out_loss_is_that_of_plain_rows(trained: LoraGANModule, batch: PromptBatch) -> None:
    """N7: nothing said how likely the held-out targets are."""
    with trained.backbone.generator():
        wanted = by_rows(trained, batch)
    found = trained.validation_step(batch, 0)["trained"]
    assert found.target_logprob.tolist() == pytest.approx(wanted, abs=1e-4)
    assert found.target_tokens.tolist() == [2, 3, 2], "bytes and EOS"
    whole = target_loss([found])
    assert whole["loss"] == pytest.approx(-sum(wanted) / 7, abs=1e-5)
    parts = [trained.validation_step(batch.of(rows), 0)["trained"] for rows in ([0], [1, 2])]
    assert target_loss(parts) == pytest.approx(whole), "over batches, too"
    trained.optimization.settings = OptimizationSettings(micro_batch_size=1)
    apart = trained.validation_step(batch, 0)["trained"]
    torch.testing.assert_close(apart.target_logprob, found.target_logprob, atol=1e-5, rtol=1e-6)
    roles = trained.test_step(batch, 0)
    with trained.backbone.reference():
        assert roles["base"].target_logprob.tolist() == pytest.approx(by_rows(trained, batch), abs=1e-4)


@torch.no_grad()
def test_rows_without_target_do_not_count(trained: LoraGANModule, make_batch: Callable[..., PromptBatch]) -> None:
    both = trained.validation_step(make_batch(("Say a", "a"), ("2+2=", "")), 0)["trained"]
    assert target_loss([both]) == target_loss([trained.validation_step(make_batch(("Say a", "a")), 0)["trained"]])
    assert target_loss([trained.validation_step(make_batch(("2+2=", "")), 0)["trained"]]) == {}


@torch.no_grad()
def test_the_test_has_a_column_for_the_adapter_it_started_from(
    build: Build, batch: PromptBatch, tmp_path: Path
) -> None:
    """N7: "base" is the bare model, so one could not see what was added to an adapter."""
    first = build()
    randomise(first.backbone)
    save_adapter(first.backbone, GENERATOR, tmp_path / "generator")
    module = build(generator_adapter=str(tmp_path / "generator"))
    with torch.enable_grad():
        fit(module, [batch], 3)
    before = [p.clone() for p in module.backbone.parameters_of(GENERATOR)]
    found = module.test_step(batch, 0)
    assert list(found) == ["base", "start", "trained", "sampled"]
    with first.backbone.generator():
        wanted = first.complete(batch, first.greedy)
    assert found["start"].texts == wanted.texts
    assert found["start"].target_logprob.tolist() == pytest.approx(wanted.target_logprob.tolist(), abs=1e-5)
    assert found["trained"].target_logprob.tolist() != pytest.approx(wanted.target_logprob.tolist(), abs=1e-2)
    after = module.backbone.parameters_of(GENERATOR)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "the trained weights are back"


# the discriminator's share


def reports(module: LoraGANModule, batch: PromptBatch) -> list[dict[str, float]]:
    return fit(module, [batch], 3)[0].reports


def test_the_discriminators_share_of_the_reward_is_logged(build: Build, batch: PromptBatch) -> None:
    """N8: reward/total was the weighted rewards and something that nothing showed."""
    rewards = [FunctionReward(share_of_a, weight=0.7)]
    for report in reports(build(rewards=rewards, adversarial=0.2), batch):
        assert report["reward/adversarial"] == pytest.approx(
            report["reward/total"] - 0.7 * report["reward/share_of_a"], abs=1e-6
        )
        assert report["reward/adversarial"] == pytest.approx(0.2 * report["discriminator/score_sampled"], abs=1e-5)
    assert all("reward/adversarial" not in report for report in reports(build(rewards=rewards), batch))
    normalised = build(rewards=rewards, adversarial=0.2, aggregation=NormalizeThenSum())
    assert reports(normalised, batch)[0]["reward/adversarial"] == pytest.approx(0, abs=1e-5), "mean 0 in each group"
    alone = reports(build(rewards=[FunctionReward(share_of_a, weight=0.0)], adversarial=1.0), batch)[0]
    assert alone["reward/adversarial"] == pytest.approx(alone["reward/total"]) != 0


def test_no_reward_takes_the_name_of_the_discriminators(build: Build) -> None:
    with pytest.raises(LoraGANError, match="'adversarial' stands for the discriminator's part"):
        build(rewards=[FunctionReward(share_of_a, name="adversarial")])


# what a checkpoint tells


def test_a_checkpoint_counts_the_updates_of_each_role(build: Build, batch: PromptBatch, tmp_path: Path) -> None:
    """N10: a discriminator that never learned gives random scores."""
    module = build(discriminator_updates=0)
    _, trainer = fit(module, [batch], 3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["lora_gan"]
    assert saved["updates"] == {"generator": 3, "discriminator": 0} and module.trained_steps == 3
    resumed = build(discriminator_updates=0)
    fit(resumed, [batch], 5, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.optimization.updates == {"generator": 5, "discriminator": 0} and resumed.trained_steps == 5
    learns = build(discriminator_updates=2)
    fit(learns, [replace(batch)], 2)
    assert learns.optimization.updates == {"generator": 2, "discriminator": 4}


def test_a_generator_that_has_learned_nothing_is_tested_with_a_warning(
    build: Build, batch: PromptBatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its results were called trained; in a fit, where the validation shows the start, nothing is said."""
    module, data = build(), DataLoader([batch], batch_size=None)
    runner = trainer(1)
    runner.test(module, data, verbose=False)
    runner.predict(module, data)
    runner.validate(module, data, verbose=False)
    assert [
        line.split(" of a generator that has learned nothing")[0] for line in caplog.messages if "nothing" in line
    ] == [
        "test",
        "prediction",
        "validation",
    ]
    caplog.clear()
    runner.fit(module, data, data)
    runner.test(module, data, verbose=False)
    assert "learned nothing" not in caplog.text


@torch.no_grad()
def test_kl_to_the_base_is_that_of_the_samples(trained: LoraGANModule, batch: PromptBatch) -> None:
    """log p − log p_base of each sampled completion, from plain rows; greedy ones say nothing about it."""
    found = trained.test_step(batch, 0)
    assert found["trained"].kl.isnan().all() and found["base"].kl.isnan().all()
    torch.manual_seed(5)
    with trained.backbone.generator():
        output = trained.complete(batch, trained.sampling)
        torch.manual_seed(5)
        rollout = sample(trained.backbone, batch.prompt_ids, 1, trained.sampling)
        mine = completion_logprobs(trained, batch, rollout)
    with trained.backbone.reference():
        theirs = completion_logprobs(trained, batch, rollout)
    wanted = [a - b for a, b in zip(mine, theirs, strict=True)]
    assert output.kl.tolist() == pytest.approx(wanted, abs=1e-4) and any(abs(x) > 1e-3 for x in wanted)
    assert measure([output], MINILM)["kl_to_base"] == pytest.approx(sum(wanted) / 3, abs=1e-4)
    assert "kl_to_base" not in measure([found["trained"]], MINILM)
    with trained.backbone.generator():
        beams = trained.complete(batch, replace(trained.sampling, num_beams=2))
    assert beams.kl.isnan().all(), "the best beam is no sample of the policy"


def completion_logprobs(module: LoraGANModule, batch: PromptBatch, rollout: Rollout) -> list[float]:
    """Log-probability of each sampled completion in the active mode at temperature 1, from plain rows."""
    return by_rows(module, replace(batch, target_ids=rollout.completion_ids))


def test_what_training_forgets_is_in_the_table(build: Build, tmp_path: Path) -> None:
    """A base that completes statements of its world, and a generator that says something else."""
    module = build(base="digits", generator_lora=LoraSettings(4, 8), discriminator_lora=LoraSettings(4, 8))
    data = InstructionDataModule(DigitChains(), tokenizer="digits", batch_size=4)
    runner = trainer(1, TextMetrics(), default_root_dir=str(tmp_path), limit_test_batches=1)
    runner.test(module, datamodule=data, verbose=False)
    known = runner.callback_metrics["test/base/knowledge_probe"]
    assert 0.5 < known == runner.callback_metrics["test/trained/knowledge_probe"], "it has learned nothing yet"
    with torch.no_grad():
        for parameter in module.backbone.parameters_of(GENERATOR):
            parameter.normal_(0, 0.5)
    runner.test(module, datamodule=data, verbose=False)
    assert runner.callback_metrics["test/base/knowledge_probe"] == known
    assert runner.callback_metrics["test/trained/knowledge_probe"] < 0.2
