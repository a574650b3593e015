"""Callbacks that turn coefficients: each by hand, then planted failures in a real trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.optim import AdamW

from lora_gan.callbacks import (
    AdaptiveAdversarialWeight,
    AdaptiveEntropy,
    AdaptiveKL,
    ConfidenceGate,
    Curriculum,
    DiscriminatorControl,
    EasyFirst,
    KLSchedule,
    Phase,
    Snapshot,
)
from lora_gan.discriminator.objectives import GanBCE
from lora_gan.errors import LoraGANError
from lora_gan.module import LoraGANModule
from lora_gan.sampling import Sampling
from lora_gan.step_callback import OUTPUT
from lora_gan.types import PromptBatch, Rollout, StepOutput
from tests.helpers.steps import fit

Build = Callable[..., LoraGANModule]
POLICY_ONLY: dict[str, Any] = {
    "num_generations": 4,
    "sampling": Sampling(max_new_tokens=6),
    "supervised": 0.0,
    "discriminator_updates": 0,
}


@pytest.fixture
def make(build: Build) -> Build:
    """A module that learns from rewards alone."""
    return lambda **settings: build(**{**POLICY_ONLY, **settings})


@pytest.fixture
def batch(make_batch: Callable[..., PromptBatch]) -> PromptBatch:
    return make_batch(("Say b", "bbbbb"), ("Q: hello?", "no ab"), ("2+2=", "4444"))


def reports(module: LoraGANModule, batch: PromptBatch, steps: int, *callbacks: L.Callback) -> list[dict[str, float]]:
    return fit(module, [batch], steps, *callbacks)[0].reports


def at(step: int) -> Any:
    """A trainer that has done so many steps."""
    return SimpleNamespace(global_step=step)


def after_step(callback: L.Callback, module: LoraGANModule, rollout: Rollout | None = None, **metrics: float) -> None:
    """A step that reported these metrics; "/" is written "__"."""
    named = {name.replace("__", "/"): torch.tensor(value) for name, value in metrics.items()}
    output = StepOutput(named, rollout or Rollout.empty(torch.device("cpu")), None, None, {})
    callback.on_train_batch_end(at(0), module, {OUTPUT: output}, None, 0)


def coefficients(callback: L.Callback, module: LoraGANModule, name: str, steps: Sequence[int]) -> list[float]:
    """The coefficient at the start of the given steps."""
    values = []
    for step in steps:
        callback.on_train_batch_start(at(step), module, None, 0)
        values.append(float(getattr(module.coefficients, name)))
    return values


# by hand


def test_the_discriminator_learns_in_every_third_step(make: Build) -> None:
    assert coefficients(DiscriminatorControl(every_n_steps=3), make(), "discriminator_gate", range(5)) == [
        1,
        0,
        0,
        1,
        0,
    ]


def test_the_discriminator_freezes_above_its_band_and_learns_again_below(make: Build) -> None:
    module = make()
    control = DiscriminatorControl(freeze_above=0.9, train_below=0.7, decay=0.0)
    gates = []
    for accuracy in (0.8, 0.91, 0.8, 0.71, 0.69, 0.8):
        after_step(control, module, discriminator__accuracy=accuracy)
        gates += coefficients(control, module, "discriminator_gate", [1])
    assert gates == [1, 0, 0, 0, 1, 1]


def test_accuracy_is_averaged_and_survives_a_resume(make: Build) -> None:
    """0.5, then 0.75·0.5 + 0.25·1 = 0.625."""
    module = make()
    control = DiscriminatorControl(freeze_above=0.6, decay=0.75)
    after_step(control, module, discriminator__accuracy=0.5)
    after_step(control, module, discriminator__accuracy=1.0)
    assert control.accuracy == pytest.approx(0.625) and control.frozen
    resumed = DiscriminatorControl(freeze_above=0.6, decay=0.75)
    resumed.load_state_dict(control.state_dict())
    assert resumed.accuracy == control.accuracy and resumed.frozen


def test_a_discriminator_that_is_always_right_is_not_believed_until_it_errs(make: Build) -> None:
    module = make()
    gate = ConfidenceGate(close_above=0.98, open_below=0.9, decay=0.0)
    seen = []
    for accuracy in (0.97, 1.0, 0.95, 0.89):
        after_step(gate, module, discriminator__accuracy=accuracy)
        seen.append(float(module.coefficients.adversarial_gate))
    assert seen == [1, 0, 0, 1]


def test_lambda_grows_with_the_discriminators_accuracy(make: Build) -> None:
    module = make()
    adaptive = AdaptiveAdversarialWeight(low=0.5, high=0.9, decay=0.0)
    adaptive.on_fit_start(at(0), module)
    seen = [float(module.coefficients.adversarial_scale)]
    for accuracy in (0.4, 0.7, 0.95):
        after_step(adaptive, module, discriminator__accuracy=accuracy)
        seen.append(float(module.coefficients.adversarial_scale))
    assert seen == pytest.approx([0.0, 0.0, 0.5, 1.0])


def test_the_kl_schedule_is_a_straight_line(make: Build) -> None:
    schedule = KLSchedule(first=0.2, last=0.0, start=10, end=20, coefficient="kl_penalty")
    module = make(kl_penalty=0.05)
    seen = coefficients(schedule, module, "kl_penalty", [0, 9, 10, 15, 20, 99])
    assert seen == pytest.approx([0.05, 0.05, 0.2, 0.1, 0.0, 0.0]), "before, what was given: a warm-up pays for no KL"


def test_the_adaptive_controller_by_hand(make: Build, batch: PromptBatch) -> None:
    """12 completions, horizon 60: KL 9 of 6 is cut to +0.2, so 1 + 0.2·12/60 = 1.04; KL 5.4 is −0.1, so 0.98."""
    module = make(kl=0.5)
    rollout = module.sample_rollout(batch)
    controller = AdaptiveKL(target=6.0, horizon=60)
    after_step(controller, module, rollout, policy__kl=3.0, completions__mean_length=3.0)
    assert float(module.coefficients.kl) == pytest.approx(0.52)
    after_step(controller, module, rollout, policy__kl=1.8, completions__mean_length=3.0)
    assert float(module.coefficients.kl) == pytest.approx(0.52 * 0.98)
    after_step(controller, module, reward__total=1.0)
    assert float(module.coefficients.kl) == pytest.approx(0.52 * 0.98), "a step without samples says nothing"


def test_the_entropy_coefficient_follows_the_shortfall(make: Build) -> None:
    module = make()
    adaptive = AdaptiveEntropy(target=2.0, rate=0.1, largest=0.15)
    seen = []
    for entropy in (1.0, 1.0, 5.0):
        after_step(adaptive, module, policy__entropy=entropy)
        seen.append(float(module.coefficients.entropy))
    assert seen == pytest.approx([0.1, 0.15, 0.0])


def test_easy_prompts_come_first(make: Build) -> None:
    assert coefficients(EasyFirst(0.5, 10, 20), make(), "easiest_share", [0, 10, 15, 20]) == pytest.approx(
        [0.5, 0.5, 0.75, 1]
    )


def test_snapshots_are_taken_when_they_are_due(make: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    module, taken = make(), []
    monkeypatch.setattr(module.backbone, "take_snapshot", lambda: taken.append(step))
    callback = Snapshot(every_n_steps=3, start=2)
    for step in range(9):
        callback.on_train_batch_start(at(step), module, None, 0)
    assert taken == [2, 5, 8]


def test_a_phase_takes_a_snapshot_and_starts_the_discriminator_from_the_generator(
    make: Build, batch: PromptBatch
) -> None:
    module = make(discriminator_updates=1)
    fit(module, [batch], 3)
    Curriculum([Phase(0, take_snapshot=True, discriminator_from_generator=True)]).on_train_batch_start(
        at(0), module, batch, 0
    )
    weights = dict(module.backbone.named_parameters())
    names = [name for name in weights if ".generator." in name]
    assert names
    for name in names:
        for copy in ("snapshot", "discriminator"):
            assert torch.equal(weights[name], weights[name.replace(".generator.", f".{copy}.")])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: DiscriminatorControl(every_n_steps=0),
        lambda: DiscriminatorControl(freeze_above=0.7, train_below=0.8),
        lambda: DiscriminatorControl(decay=1.0),
        lambda: ConfidenceGate(0.9, 0.95),
        lambda: AdaptiveAdversarialWeight(0.9, 0.5),
        lambda: KLSchedule(0.1, 0.2, 5, 5),
        lambda: KLSchedule(0.1, 0.2, 0, 5, coefficient="entropy"),
        lambda: AdaptiveKL(target=0.0),
        lambda: AdaptiveEntropy(target=-1.0),
        lambda: Snapshot(every_n_steps=0),
        lambda: EasyFirst(first=0.0),
    ],
)
def test_settings_are_checked(wrong: Callable[[], L.Callback]) -> None:
    with pytest.raises(LoraGANError):
        wrong()


# planted failures


@pytest.mark.slow
def test_a_kl_blow_up_is_held_by_the_adaptive_controller(make: Build, batch: PromptBatch) -> None:
    """A reward for one letter at a large learning rate drives the policy off; the controller keeps it near."""

    def run(coefficient: float, *callbacks: L.Callback) -> float:
        module = make(generator_optimizer=lambda p: AdamW(p, lr=1e-2), kl=coefficient)
        logged = reports(module, batch, 90, *callbacks)
        return sum(r["policy/kl"] * r["completions/mean_length"] for r in logged[-20:]) / 20

    free, held = run(0.01), run(1.0, AdaptiveKL(target=3.0, horizon=60))
    assert free > 20.0, "nats a completion"
    assert held < 6.0


def test_a_discriminator_that_is_always_right_is_gated(make: Build, batch: PromptBatch) -> None:
    """Samples of a random model are nothing like the targets: the discriminator wins, and the adversarial_reward is
    shut off.
    """
    module = make(
        discriminator_updates=1,
        adversarial=10.0,
        objective=GanBCE(),
        discriminator_optimizer=lambda p: AdamW(p, lr=1e-2),
    )
    logged = reports(module, batch, 40, ConfidenceGate(close_above=0.95, decay=0.5))
    assert logged[0]["coefficient/adversarial_gate"] == 1 and logged[-1]["discriminator/accuracy"] == 1
    assert logged[-1]["coefficient/adversarial_gate"] == 0
    assert logged[-1]["reward/total"] == pytest.approx(logged[-1]["reward/share_of_a"])
    assert logged[0]["reward/total"] != pytest.approx(logged[0]["reward/share_of_a"])


@pytest.mark.slow
def test_the_entropy_bonus_keeps_the_policy_from_collapsing(make: Build, batch: PromptBatch) -> None:
    def run(*callbacks: L.Callback) -> float:
        module = make(generator_optimizer=lambda p: AdamW(p, lr=3e-2))
        return sum(r["policy/entropy"] for r in reports(module, batch, 60, *callbacks)[-10:]) / 10

    assert run() < 0.5
    assert run(AdaptiveEntropy(target=1.5, rate=0.05)) > 1.0
