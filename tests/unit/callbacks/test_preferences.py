"""Accuracy on held-out preferences: by hand, on a real discriminator, and in a run that learns nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lora_gan.callbacks import PreferenceAccuracy
from lora_gan.callbacks.preferences import Pair, pairs_of, preference_metrics
from lora_gan.discriminator import AdapterDiscriminator, BradleyTerry, CompletionAndTarget
from lora_gan.discriminator.restored import score
from lora_gan.errors import LoraGANError
from lora_gan.types import PromptBatch
from tests.conftest import randomise
from tests.helpers.steps import Build, Recorder, fit, trainer


def test_by_hand() -> None:
    """Longer is better in 2 of 3 pairs, and of the pair in which it is not, the score is right."""
    pairs = [Pair(1.0, 4), Pair(-2.0, 1), Pair(4.0, -3)]
    assert preference_metrics(pairs) == pytest.approx(
        {"accuracy": 2 / 3, "margin": 1.0, "length_accuracy": 2 / 3, "against_length": 1.0}
    )
    turned = [Pair(pair.margin, -pair.longer) for pair in pairs]
    assert preference_metrics(turned) == pytest.approx(preference_metrics(pairs)), "the rule is the better one of two"
    assert preference_metrics([Pair(0.0, 0)]) == {"accuracy": 0.5, "margin": 0.0, "length_accuracy": 0.5}
    assert preference_metrics([]) == {}


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_pairs_are_the_targets_and_the_worse_answers_of_the_data(
    micro_batch_size: int | None, build: Build, batch: PromptBatch
) -> None:
    """The prompts have one, two and no worse answers."""
    module = build(micro_batch_size=micro_batch_size)
    randomise(module.backbone)
    found = pairs_of(module, batch)  # type: ignore[arg-type]
    assert [len(pairs) for pairs in found] == [1, 2, 0]
    for b in (0, 1):
        shown = [batch.target_ids[b], *batch.negative_ids[b]]
        target, *worse = score(module.discriminator.model, module.backbone, [batch.prompt_ids[b]], [shown]).tolist()
        assert [pair.margin for pair in found[b]] == pytest.approx([target - each for each in worse], abs=1e-5)
        assert [pair.longer for pair in found[b]] == [len(shown[0]) - len(ids) for ids in shown[1:]]


def test_a_discriminator_learns_preferences_alone(build: Build, batch: PromptBatch, tmp_path: Path) -> None:
    """Nothing is sampled, the generator stays as it was, and the held-out pairs, here those of training, are ranked."""
    module = build(supervised=0.0, policy=0.0, samples=False, objective=BradleyTerry(max_length_ratio=9.0), rewards=[])
    generator = [parameter.clone() for parameter in module.backbone.parameters_of("generator")]
    recorder = Recorder()
    runner = trainer(12, recorder, PreferenceAccuracy(), check_val_every_n_epoch=None, val_check_interval=6)
    loader = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    runner.fit(module, loader, loader)
    assert all(len(output.rollout) == 0 for output in recorder.outputs)
    assert not any(name.startswith(("completions/", "policy/", "loss/generator")) for name in recorder.reports[-1])
    assert all(map(torch.equal, generator, module.backbone.parameters_of("generator")))
    assert float(runner.callback_metrics["preference/accuracy"]) == 1
    assert recorder.reports[-1]["loss/discriminator"] < recorder.reports[0]["loss/discriminator"]
    found = runner.test(module, loader, verbose=False)[0]
    assert found["test/preference/accuracy"] == 1 and found["test/preference/margin"] > 0


def test_a_discriminator_that_reads_the_target_is_refused(build: Build, batch: PromptBatch) -> None:
    module = build(model=AdapterDiscriminator(CompletionAndTarget()))
    with pytest.raises(LoraGANError, match="CompletionAndTarget reads the target beside each: choose another"):
        fit(module, [batch], 1, PreferenceAccuracy())


def test_data_without_worse_answers_is_refused_before_the_first_step(
    build: Build, make_batch: Callable[..., PromptBatch]
) -> None:
    batch = make_batch(("Say a", "a"))
    recorder = Recorder()
    runner = trainer(1, recorder, PreferenceAccuracy())
    loader = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(LoraGANError, match="give rows with a rejected answer"):
        runner.fit(build(), loader, loader)
    assert not recorder.reports
