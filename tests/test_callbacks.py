"""Callbacks that turn knobs: each by hand, then planted failures in a real trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.optim import AdamW
from torch.utils.data import DataLoader

from lora_gan.advantages import LeaveOneOut
from lora_gan.backbone import LoraSettings
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
from lora_gan.errors import LoraGANError
from lora_gan.module import LoraGANModule
from lora_gan.objectives import RealGenerated
from lora_gan.rewards import FunctionReward
from lora_gan.sampling import Sampling
from lora_gan.types import PromptBatch

Build = Callable[..., LoraGANModule]


def share_of_a(response: str, target: str) -> float:
    return response.count("a") / max(len(response), 1)


@pytest.fixture
def build(bases: dict[str, str]) -> Build:
    def build(**settings: Any) -> LoraGANModule:
        torch.manual_seed(4)
        defaults: dict[str, Any] = {
            "base": bases["gpt2"],
            "answers_per_prompt": 4,
            "sampling": Sampling(max_new_tokens=6),
            "rewards": [FunctionReward(share_of_a)],
            "advantage": LeaveOneOut(),
            "supervised_weight": 0.0,
            "discriminator_updates": 0,
            "generator_lora": LoraSettings(4, 8),
            "discriminator_lora": LoraSettings(4, 8),
        }
        return LoraGANModule(**{**defaults, **settings})

    return build


@pytest.fixture
def batch(make_batch: Callable[..., PromptBatch]) -> PromptBatch:
    return make_batch(("Say b", "bbbbb"), ("Q: hello?", "no ab"), ("2+2=", "4444"))


class Recorder(L.Callback):
    def __init__(self) -> None:
        self.reports: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.reports.append({name: float(value) for name, value in outputs.items()})


def fit(module: LoraGANModule, batch: PromptBatch, rounds: int, *callbacks: L.Callback) -> list[dict[str, float]]:
    recorder = Recorder()
    torch.manual_seed(5)
    runner = L.Trainer(
        max_steps=rounds,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        callbacks=[*callbacks, recorder],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    runner.fit(module, DataLoader([batch], batch_size=None))
    return recorder.reports


def at(step: int) -> Any:
    """A trainer that has played so many rounds."""
    return SimpleNamespace(global_step=step)


def tell(callback: L.Callback, module: LoraGANModule, **metrics: float) -> None:
    """A round that reported these metrics; "/" is written "__"."""
    outputs = {name.replace("__", "/"): torch.tensor(value) for name, value in metrics.items()}
    callback.on_train_batch_end(at(0), module, outputs, None, 0)


def knobs(callback: L.Callback, module: LoraGANModule, name: str, steps: Sequence[int]) -> list[float]:
    """The knob at the start of the given rounds."""
    values = []
    for step in steps:
        callback.on_train_batch_start(at(step), module, None, 0)
        values.append(float(getattr(module.knobs, name)))
    return values


# by hand


def test_the_discriminator_learns_in_every_third_round(build: Build) -> None:
    assert knobs(DiscriminatorControl(every_n_rounds=3), build(), "discriminator_gate", range(5)) == [1, 0, 0, 1, 0]


def test_the_discriminator_freezes_above_its_band_and_learns_again_below(build: Build) -> None:
    module = build()
    control = DiscriminatorControl(freeze_above=0.9, train_below=0.7, decay=0.0)
    gates = []
    for accuracy in (0.8, 0.91, 0.8, 0.71, 0.69, 0.8):
        tell(control, module, judge__accuracy=accuracy)
        gates += knobs(control, module, "discriminator_gate", [1])
    assert gates == [1, 0, 0, 0, 1, 1]


def test_accuracy_is_averaged_and_survives_a_resume(build: Build) -> None:
    """0.5, then 0.75·0.5 + 0.25·1 = 0.625."""
    module = build()
    control = DiscriminatorControl(freeze_above=0.6, decay=0.75)
    tell(control, module, judge__accuracy=0.5)
    tell(control, module, judge__accuracy=1.0)
    assert control.accuracy == pytest.approx(0.625) and control.frozen
    resumed = DiscriminatorControl(freeze_above=0.6, decay=0.75)
    resumed.load_state_dict(control.state_dict())
    assert resumed.accuracy == control.accuracy and resumed.frozen


def test_a_judge_that_is_always_right_is_not_believed_until_it_errs(build: Build) -> None:
    module = build()
    gate = ConfidenceGate(close_above=0.98, open_below=0.9, decay=0.0)
    seen = []
    for accuracy in (0.97, 1.0, 0.95, 0.89):
        tell(gate, module, judge__accuracy=accuracy)
        seen.append(float(module.knobs.adversarial_gate))
    assert seen == [1, 0, 0, 1]


def test_lambda_grows_with_the_judges_confidence(build: Build) -> None:
    module = build()
    adaptive = AdaptiveAdversarialWeight(low=0.5, high=0.9, decay=0.0)
    adaptive.on_fit_start(at(0), module)
    seen = [float(module.knobs.adversarial_scale)]
    for accuracy in (0.4, 0.7, 0.95):
        tell(adaptive, module, judge__accuracy=accuracy)
        seen.append(float(module.knobs.adversarial_scale))
    assert seen == pytest.approx([0.0, 0.0, 0.5, 1.0])


def test_the_kl_schedule_is_a_straight_line(build: Build) -> None:
    schedule = KLSchedule(first=0.2, last=0.0, start=10, end=20, knob="kl_penalty")
    assert knobs(schedule, build(), "kl_penalty", [0, 10, 15, 20, 99]) == pytest.approx([0.2, 0.2, 0.1, 0.0, 0.0])


def test_the_adaptive_controller_by_hand(build: Build, batch: PromptBatch) -> None:
    """12 answers, horizon 60: KL 9 of 6 is cut to +0.2, so 1 + 0.2·12/60 = 1.04; KL 5.4 is −0.1, so 0.98."""
    module = build(kl_coefficient=0.5)
    module.play(batch)
    controller = AdaptiveKL(target=6.0, horizon=60)
    tell(controller, module, policy__kl=3.0, policy__length=3.0)
    assert float(module.knobs.kl_coefficient) == pytest.approx(0.52)
    tell(controller, module, policy__kl=1.8, policy__length=3.0)
    assert float(module.knobs.kl_coefficient) == pytest.approx(0.52 * 0.98)
    tell(controller, module, reward__total=1.0)
    assert float(module.knobs.kl_coefficient) == pytest.approx(0.52 * 0.98), "a round without samples says nothing"


def test_the_entropy_coefficient_follows_the_shortfall(build: Build) -> None:
    module = build()
    adaptive = AdaptiveEntropy(target=2.0, rate=0.1, largest=0.15)
    seen = []
    for entropy in (1.0, 1.0, 5.0):
        tell(adaptive, module, policy__entropy=entropy)
        seen.append(float(module.knobs.entropy_coefficient))
    assert seen == pytest.approx([0.1, 0.15, 0.0])


def test_easy_prompts_come_first(build: Build) -> None:
    assert knobs(EasyFirst(0.5, 10, 20), build(), "easiest_share", [0, 10, 15, 20]) == pytest.approx(
        [0.5, 0.5, 0.75, 1]
    )


def test_snapshots_are_taken_when_they_are_due(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    module, taken = build(), []
    monkeypatch.setattr(module.backbone, "take_snapshot", lambda: taken.append(step))
    callback = Snapshot(every_n_rounds=3, start=2)
    for step in range(9):
        callback.on_train_batch_start(at(step), module, None, 0)
    assert taken == [2, 5, 8]


def test_a_phase_takes_a_snapshot_and_starts_the_judge_from_the_generator(build: Build, batch: PromptBatch) -> None:
    module = build(discriminator_updates=1)
    fit(module, batch, 3)
    Curriculum([Phase(0, take_snapshot=True, judge_from_generator=True)]).on_train_batch_start(at(0), module, batch, 0)
    weights = dict(module.backbone.named_parameters())
    names = [name for name in weights if ".generator." in name]
    assert names
    for name in names:
        for copy in ("snapshot", "discriminator"):
            assert torch.equal(weights[name], weights[name.replace(".generator.", f".{copy}.")])


@pytest.mark.parametrize(
    "make",
    [
        lambda: DiscriminatorControl(every_n_rounds=0),
        lambda: DiscriminatorControl(freeze_above=0.7, train_below=0.8),
        lambda: DiscriminatorControl(decay=1.0),
        lambda: ConfidenceGate(0.9, 0.95),
        lambda: AdaptiveAdversarialWeight(0.9, 0.5),
        lambda: KLSchedule(0.1, 0.2, 5, 5),
        lambda: KLSchedule(0.1, 0.2, 0, 5, knob="kl"),
        lambda: AdaptiveKL(target=0.0),
        lambda: AdaptiveEntropy(target=-1.0),
        lambda: Snapshot(every_n_rounds=0),
        lambda: EasyFirst(first=0.0),
    ],
)
def test_settings_are_checked(make: Callable[[], L.Callback]) -> None:
    with pytest.raises(LoraGANError):
        make()


# planted failures


def test_a_kl_blow_up_is_held_by_the_adaptive_controller(build: Build, batch: PromptBatch) -> None:
    """A reward for one letter at a large learning rate drives the policy off; the controller pulls it back."""

    def run(coefficient: float, *callbacks: L.Callback) -> float:
        module = build(generator_optimizer=lambda p: AdamW(p, lr=1e-2), kl_coefficient=coefficient)
        reports = fit(module, batch, 90, *callbacks)
        return sum(r["policy/kl"] * r["policy/length"] for r in reports[-20:]) / 20

    free, held = run(0.01), run(0.1, AdaptiveKL(target=3.0, horizon=60))
    assert free > 20.0, "nats an answer"
    assert held < 6.0


def test_a_judge_that_is_always_right_is_gated(build: Build, batch: PromptBatch) -> None:
    """Samples of a random model are nothing like the targets: the discriminator wins, and the payoff is shut off."""
    module = build(
        discriminator_updates=1,
        adversarial_weight=10.0,
        objective=RealGenerated(),
        discriminator_optimizer=lambda p: AdamW(p, lr=1e-2),
    )
    reports = fit(module, batch, 40, ConfidenceGate(close_above=0.95, decay=0.5))
    assert reports[0]["knob/adversarial_gate"] == 1 and reports[-1]["judge/accuracy"] == 1
    assert reports[-1]["knob/adversarial_gate"] == 0
    assert reports[-1]["reward/total"] == pytest.approx(reports[-1]["reward/share_of_a"])
    assert reports[0]["reward/total"] != pytest.approx(reports[0]["reward/share_of_a"])


def test_the_entropy_bonus_keeps_the_policy_from_collapsing(build: Build, batch: PromptBatch) -> None:
    def run(*callbacks: L.Callback) -> float:
        module = build(generator_optimizer=lambda p: AdamW(p, lr=3e-2))
        return sum(r["policy/entropy"] for r in fit(module, batch, 60, *callbacks)[-10:]) / 10

    assert run() < 0.5
    assert run(AdaptiveEntropy(target=1.5, rate=0.05)) > 1.0
