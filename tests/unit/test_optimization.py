"""Several passes make one optimizer step; learning-rate schedules, fresh and resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LinearLR,
    OneCycleLR,
    SequentialLR,
)
from torch.optim.lr_scheduler import ReduceLROnPlateau as PlateauOfTorch
from torch.utils.data import DataLoader

from lora_gan.advantages import GroupNormalised, LeaveOneOut, MovingAverage, PredictedReward, ValueGAE
from lora_gan.backbone import DISCRIMINATOR, GENERATOR
from lora_gan.discriminator import BradleyTerry
from lora_gan.discriminator.replay import Replay
from lora_gan.errors import LoraGANError
from lora_gan.losses import ClippedPPO, Reinforce
from lora_gan.module import LoraGANModule
from lora_gan.optimization import WarmupCosine, WarmupLinear
from lora_gan.rewards import FunctionReward
from lora_gan.rewards.adversarial import WinRate
from lora_gan.types import PromptBatch
from tests.conftest import randomise
from tests.helpers.steps import Build, Recorder, fit, half, trainer
from tests.system.test_combinations import MODELS, OBJECTIVES

# micro-batches


class Watched(SGD):
    """Stays where it is and keeps the gradient of each of its steps."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.0)
        self.gradients: list[Tensor] = []

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return result


@pytest.fixture
def uneven(make_batch: Callable[..., PromptBatch]) -> PromptBatch:
    """One long target among short ones, one prompt without any."""
    long = "a completion that goes on and on, until it ends"
    return make_batch(
        ("Say a", "a", "b"), ("Q: hello?", long, "x", "yz"), ("open", ""), ("2+2=", "4"), ("z", "ab", "c")
    )


def anything(response: str, target: str) -> float:
    """Another number for another text."""
    return sum(map(ord, response)) % 7 / 7


def gradients(
    build: Build,
    batch: PromptBatch,
    size: int | None,
    *callbacks: L.Callback,
    steps: int = 1,
    plugins: Sequence[Any] = (),
    **settings: Any,
) -> tuple[list[list[Tensor]], list[dict[str, float]]]:
    """The gradients of all optimizer steps by role, and what each training step reported; no weight moves."""
    module = build(
        micro_batch_size=size,
        max_grad_norm=1e9,
        rewards=[FunctionReward(anything, name="share_of_a")],
        **{f"{role}_optimizer": Watched for role in (GENERATOR, DISCRIMINATOR)},
        **settings,
    )
    randomise(module.backbone)
    recorder, runner = fit(module, [batch], steps, *callbacks, plugins=list(plugins))
    return [optimizer.gradients for optimizer in runner.optimizers], recorder.reports  # type: ignore[attr-defined]


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest distance of two gradients, as a share of their length."""
    return max(float((x - y).norm() / y.norm()) for x, y in zip(found, wanted, strict=True))


OFF: dict[str, Any] = {"policy": 0.0, "discriminator_updates": 0}
GENERATOR_CASES: dict[str, dict[str, Any]] = {
    "supervised": OFF,
    "policy": {"supervised": 0.0, "discriminator_updates": 0},
    "everything": {
        "kl": 0.3,
        "entropy": 0.1,
        "advantage": ValueGAE(),
        "value": 1.0,
        "coupled": 0.5,
        "adversarial": 0.3,
    },
    "capped": {
        "policy_loss": Reinforce(ratio_cap=1.0),
        "advantage": GroupNormalised(),
        "mask_truncated": True,
        "kl": 0.2,
    },
    "by completion": {
        "policy_loss": Reinforce(ratio_cap=1.0, loss_type="grpo"),
        "advantage": GroupNormalised(scale_rewards="batch"),
        "mask_truncated": True,
    },
    "dr_grpo": {
        "policy_loss": Reinforce(loss_type="dr_grpo"),
        "advantage": GroupNormalised(scale_rewards="none"),
        "kl": 0.2,
    },
    "sequences": {
        "policy_loss": ClippedPPO(3e-4, None, 2, 2, 10.0, "grpo", "sequence", 3.0),
        "advantage": LeaveOneOut(),
    },
    "ppo": {
        "policy_loss": ClippedPPO(num_iterations=2, num_minibatches=2, target_kl=10.0),
        "advantage": PredictedReward(),
    },
    "moving average": {"advantage": MovingAverage(), "kl_penalty": 0.3, "kl_reference": "snapshot"},
}


@pytest.mark.parametrize("case", GENERATOR_CASES)
def test_the_gradient_of_micro_batches_is_that_of_the_whole_batch(case: str, build: Build, uneven: PromptBatch) -> None:
    """Weighted by tokens, one long target among short ones; every metric agrees, too."""
    (wanted, _), whole = gradients(build, uneven, None, **GENERATOR_CASES[case])
    (found, _), reports = gradients(build, uneven, 2, **GENERATOR_CASES[case])
    assert min(float(gradient.norm()) for gradient in wanted) > 1e-3
    assert difference(found, wanted) < 1e-6
    assert reports[0] == pytest.approx(whole[0], rel=1e-4, abs=1e-5)


class Objectives(L.Callback):
    """Another objective in each step."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.discriminator.objective = list(OBJECTIVES.values())[trainer.global_step]()


@pytest.mark.parametrize("model", MODELS)
def test_the_discriminators_gradient_is_exact_for_every_objective(
    model: str, build: Build, bases: dict[str, str], uneven: PromptBatch
) -> None:
    """Also where the objective compares completions of different passes, replayed ones and an opponent's."""
    results, updates = [], 2 if model == "adapter" else 1
    for size in (None, 2):
        settings = {"model": MODELS[model](bases["llama"]), "replay": Replay(4, 3), "adversarial_reward": WinRate()}
        settings |= {"supervised": 0.0, "policy": 0.0, "discriminator_updates": updates}
        results.append(gradients(build, uneven, size, Objectives(), steps=len(OBJECTIVES), **settings))
    ((_, wanted), whole), ((_, found), reports) = results
    assert len(wanted) == updates * len(OBJECTIVES)
    for n, name in enumerate(OBJECTIVES):
        these = slice(updates * n, updates * (n + 1))
        if name == "auxiliary" and model == "likelihood":  # which has no such head, and is refused with it
            assert not any(gradient.any() for gradient in [*wanted[these], *found[these]])
            continue
        assert min(float(gradient.norm()) for gradient in wanted[these]) > 1e-3
        assert difference(found[these], wanted[these]) < 1e-6, name
        assert reports[n] == pytest.approx(whole[n], rel=1e-4, abs=1e-5), name


def test_processes_have_equally_many_passes(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five prompts at most two in each; beside a process that needs more passes, one is empty."""
    of = build(micro_batch_size=2).optimization
    assert of.micro_batches(5) == of.parts(5) == [[0, 1], [2, 3], [4]]
    assert build().optimization.micro_batches(5) == [[0, 1, 2, 3, 4]]
    monkeypatch.setattr("lora_gan.optimization.gathered", lambda passes: [passes, 4])
    assert of.micro_batches(3) == [[0], [1], [2], []]
    assert of.parts(3) == [[0, 1], [2]], "nothing waits for a pass without gradient"


@pytest.mark.parametrize("size", [1, 2])
def test_an_empty_pass_adds_nothing(
    size: int, build: Build, uneven: PromptBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has seven passes, so here some of the five prompts' are empty; the numbers stay the same."""
    wanted, whole = gradients(build, uneven, None)
    monkeypatch.setattr("lora_gan.optimization.gathered", lambda passes: [passes, 7])
    found, reports = gradients(build, uneven, size)
    assert all(difference(mine, theirs) < 1e-6 for mine, theirs in zip(found, wanted, strict=True))
    assert reports[0] == pytest.approx(whole[0], rel=1e-4, abs=1e-5)


def test_a_policy_that_moves_too_far_stops_as_in_one_pass(build: Build, uneven: PromptBatch) -> None:
    """The KL of all passes decides; the gradient of those before is forgotten."""

    def run(size: int | None) -> tuple[dict[str, float], list[bool]]:
        loss = ClippedPPO(num_iterations=4, target_kl=1e-3)
        module = build(policy_loss=loss, micro_batch_size=size, generator_optimizer=lambda p: SGD(p, lr=1.0))
        recorder, runner = fit(module, [uneven], 1)
        parameters = [p for group in runner.optimizers[0].param_groups for p in group["params"]]
        return recorder.reports[0], [p.grad is None for p in parameters]

    (whole, _), (found, without) = run(None), run(2)
    assert 1 <= whole["policy/updates"] < 4 and found == pytest.approx(whole, rel=1e-3, abs=1e-4)
    assert all(without)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate_grad_batches": 4}, r"accumulate_grad_batches: 4 .*optimization\.micro_batch_size"),
        ({"gradient_clip_val": 0.5}, r"gradient_clip_val: 0\.5 .*optimization\.max_grad_norm"),
    ],
)
def test_the_trainers_own_accumulation_and_clipping_are_refused(
    settings: dict[str, Any], message: str, build: Build, batch: PromptBatch
) -> None:
    with pytest.raises(LoraGANError, match=message):
        fit(build(), [batch], 1, **settings)


@pytest.mark.parametrize("setting", ["val_check_interval", "check_val_every_n_epoch"])
def test_a_validation_after_every_0_steps_is_refused_before_training(
    setting: str, build: Build, batch: PromptBatch
) -> None:
    """It was a division by zero after the first step."""
    with pytest.raises(LoraGANError, match=rf"{setting} must be more than 0, got 0; .*limit_val_batches: 0"):
        fit(build(), [batch], 1, **{setting: 0})


def test_the_rate_and_the_norm_of_the_gradient_are_logged(build: Build, batch: PromptBatch) -> None:
    """The norm from before clipping; none for a role that does not learn in a step."""
    settings: dict[str, Any] = {"discriminator_updates": 0, "generator_optimizer": Watched}
    recorder, runner = fit(build(max_grad_norm=1e-3, **settings), [batch], 1)
    (report,) = recorder.reports
    free, _ = fit(build(max_grad_norm=1e9, **settings), [batch], 1)
    watched: Any = runner.optimizers[0]
    assert float(watched.gradients[0].norm()) == pytest.approx(1e-3, rel=1e-3)
    assert report["generator/grad_norm"] == pytest.approx(free.reports[0]["generator/grad_norm"])
    assert report["generator/grad_norm"] > 1e-2
    assert report["generator/learning_rate"] == pytest.approx(0.0)
    assert not {"discriminator/grad_norm", "discriminator/learning_rate"} & report.keys()
    (report,) = fit(build(), [batch], 1)[0].reports
    assert report["discriminator/learning_rate"] == pytest.approx(1e-3) and report["discriminator/grad_norm"] > 0


# 16-mixed: losses are scaled for the backward pass, so that small gradients are not 0 in float16


def test_micro_batches_in_float16_have_one_scale_in_each_step(
    build: Build, uneven: PromptBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale doubles after every step of an optimizer here, and never between the passes of one."""
    plugin = half(growth_interval=1, init_scale=2.0**10)
    scaler, scales = plugin.scaler, [list[float]()]  # at each backward pass, by optimizer step
    scale, step = scaler.scale, scaler.step
    monkeypatch.setattr(scaler, "scale", lambda loss: scales[-1].append(scaler.get_scale()) or scale(loss))
    monkeypatch.setattr(scaler, "step", lambda optimizer: scales.append([]) or step(optimizer))
    settings: dict[str, Any] = {**GENERATOR_CASES["everything"], "discriminator_updates": 2}
    found, _ = gradients(build, uneven, 2, plugins=[plugin], **settings)
    wanted, _ = gradients(build, uneven, None, plugins=[half(init_scale=2.0**10)], **settings)
    assert scales == [[2.0**10] * 3, [2.0**11] * 3, [2.0**12] * 3, []]
    errors = [difference(mine, theirs) for mine, theirs in zip(found, wanted, strict=True)]
    assert max(errors) < 0.02, errors


def test_a_step_that_overflows_is_left_out_and_not_counted(build: Build, batch: PromptBatch) -> None:
    """The first scale is too large; it halves until a step succeeds, and schedules follow the steps that were taken."""
    schedules: dict[str, Any] = {f"{role}_scheduler": lambda o: WarmupLinear(o, 0, 9) for role in ("generator",)}
    plugin = half(init_scale=2.0**22)
    module = build(policy=0.0, discriminator_updates=0, **schedules)
    recorder, _ = fit(module, [batch], 8, plugins=[plugin])
    taken = ["generator/grad_norm" in report for report in recorder.reports]
    assert 0 < sum(taken) < 8 and not taken[0]
    assert module.optimization.updates == {GENERATOR: sum(taken), DISCRIMINATOR: 0}
    assert recorder.rates[-1][0] == pytest.approx(1e-3 * (1 - sum(taken) / 9))
    assert plugin.scaler.get_scale() == 2.0 ** (22 - (8 - sum(taken)))


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("plugins", [[], [half()]], ids=["float32", "float16"])
def test_without_anything_to_learn_from_there_is_no_step(
    plugins: list[Any], size: int | None, build: Build, make_batch: Callable[..., PromptBatch]
) -> None:
    """Pairs need a target. GradScaler refuses a step of an optimizer without a gradient."""
    module = build(objective=BradleyTerry(), negatives=[], policy=1.0, micro_batch_size=size)
    recorder, _ = fit(module, [make_batch(("Say a", ""), ("Q: hello?", ""))], 2, plugins=plugins)
    assert module.optimization.updates[DISCRIMINATOR] == 0 < module.optimization.updates[GENERATOR]
    assert all("discriminator/grad_norm" not in report for report in recorder.reports)


def test_fused_optimizers_are_refused_in_16_mixed(build: Build, batch: PromptBatch) -> None:
    """They would divide by the scale after the gradient was clipped."""
    settings: dict[str, Any] = {"generator_optimizer": lambda p: torch.optim.AdamW(p, fused=True)}
    fit(build(**settings), [batch], 1, precision="bf16-mixed")
    with pytest.raises(LoraGANError, match=r"generator\.optimizer: fused: true .* set fused: false, or .*bf16-mixed"):
        fit(build(**settings), [batch], 1, plugins=[half()])


def test_the_scale_is_resumed(build: Build, batch: PromptBatch, tmp_path: Path) -> None:
    """Two steps and two more from the checkpoint are four, the scale among them."""
    plugins = [half(growth_interval=1, init_scale=4.0) for _ in range(3)]
    whole, _ = fit(build(), [batch], 4, plugins=plugins[:1])
    _, runner = fit(build(), [batch], 2, plugins=plugins[1:2])
    runner.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = fit(build(), [batch], 4, plugins=plugins[2:], ckpt_path=tmp_path / "two.ckpt")
    assert plugins[2].scaler.get_scale() == plugins[0].scaler.get_scale() != plugins[1].scaler.get_scale()
    assert all(torch.equal(x, resumed.weights[-1][name]) for name, x in whole.weights[-1].items())


# schedules


def rates(schedule: Any, steps: int) -> list[float]:
    """Shares of the full rate in the first steps."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    made = schedule(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        made.step()
    return found


def test_warm_up_and_decay_by_hand() -> None:
    linear = rates(lambda o: WarmupLinear(o, warmup_steps=3, total_steps=7, floor=0.2), 9)
    assert linear == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    cosine = rates(lambda o: WarmupCosine(o, warmup_steps=1, total_steps=5), 8)
    assert cosine == pytest.approx([0.5, 1.0, 0.5 + 0.5 / 2**0.5, 0.5, 0.5 - 0.5 / 2**0.5, 0, 0, 0])
    assert rates(lambda o: WarmupLinear(o, total_steps=4, floor=1.0), 6) == [1.0] * 6
    torch.testing.assert_close(
        rates(lambda o: WarmupCosine(o, total_steps=20), 20), rates(lambda o: CosineAnnealingLR(o, 20), 20)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps >= 0"),
        ({"floor": 1.5}, "floor in"),
        ({"warmup_steps": 5, "total_steps": 5}, "total_steps must be more than warmup_steps, got 5 and 5"),
    ],
)
def test_schedules_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraGANError, match=message):
        WarmupCosine(SGD([nn.Parameter(torch.zeros(1))], lr=1.0), **settings)


def generator_rates(
    build: Build, batch: PromptBatch, steps: int, schedule: Any, **settings: Any
) -> tuple[list[float], L.Trainer]:
    """The generator's rate in each step, as it is logged, its full rate being 1e-3."""
    recorder, runner = fit(build(**OFF, generator_scheduler=schedule), [batch], steps, **settings)
    return [1e3 * report["generator/learning_rate"] for report in recorder.reports], runner


def test_a_schedule_follows_max_steps(build: Build, batch: PromptBatch) -> None:
    """Or the epochs; without an end it is refused."""
    found, _ = generator_rates(build, batch, 4, WarmupLinear)
    assert found == pytest.approx([1.0, 0.75, 0.5, 0.25])
    recorder = Recorder()
    runner = L.Trainer(max_epochs=4, callbacks=[recorder], logger=False, enable_checkpointing=False, accelerator="cpu")
    runner.fit(build(**OFF, generator_scheduler=WarmupLinear), DataLoader([batch], batch_size=None))
    found = [1e3 * report["generator/learning_rate"] for report in recorder.reports]
    assert found == pytest.approx([1.0, 0.75, 0.5, 0.25])
    with pytest.raises(
        LoraGANError, match=r"total_steps: null needs a trainer.max_steps above it, got none; set it, or"
    ):
        generator_rates(build, batch, -1, WarmupLinear, max_time={"seconds": 30})
    with pytest.raises(LoraGANError, match=r"warmup_steps: 4 .* needs a trainer.max_steps above it, got 4"):
        generator_rates(build, batch, 4, lambda o: WarmupLinear(o, warmup_steps=4))


@pytest.mark.parametrize("fixed", [False, True])
def test_a_longer_run_does_not_raise_the_rate_again(
    fixed: bool, build: Build, batch: PromptBatch, tmp_path: Path
) -> None:
    """Stopped at step 3 of 4 and resumed to 8: it stays at ¼ until the longer line has fallen to it, at step 6."""
    path = tmp_path / "three.ckpt"

    def line(total: int) -> Any:
        return lambda optimizer: WarmupLinear(optimizer, total_steps=total if fixed else None)

    before, _ = generator_rates(build, batch, 4, line(4))
    _, runner = fit(build(**OFF, generator_scheduler=line(4)), [batch], 4, Stop(3))
    runner.save_checkpoint(path)
    same, _ = generator_rates(build, batch, 4, line(4), ckpt_path=path)
    assert same == before[3:] == pytest.approx([0.25])
    longer, runner = generator_rates(build, batch, 8, line(8), ckpt_path=path)
    assert longer == pytest.approx([0.25, 0.25, 0.25, 0.25, 0.125])
    shorter, runner = generator_rates(build, batch, 5, line(5), ckpt_path=path)
    assert shorter == pytest.approx([0.25, 0.2])
    runner.save_checkpoint(path)
    with pytest.raises(LoraGANError, match=r"ends at step 12 instead of 5, .* fallen to 0, .*: set its floor"):
        generator_rates(build, batch, 12, line(12), ckpt_path=path)
    with_floor, _ = generator_rates(
        build, batch, 7, lambda o: WarmupLinear(o, total_steps=7, floor=0.1), ckpt_path=path
    )
    assert with_floor == pytest.approx([0.1, 0.1])


def test_a_longer_run_goes_on_at_the_floor_and_in_the_warm_up(build: Build, batch: PromptBatch, tmp_path: Path) -> None:
    def line(optimizer: Any) -> WarmupLinear:
        return WarmupLinear(optimizer, warmup_steps=1, floor=0.5)

    for stopped, total, wanted in ((3, 3, [0.5, 0.5]), (1, 3, [1.0, 0.875, 0.75, 0.625])):
        _, runner = fit(build(**OFF, generator_scheduler=line), [batch], total, Stop(stopped))
        runner.save_checkpoint(tmp_path / "it.ckpt")
        found, _ = generator_rates(build, batch, 5, line, ckpt_path=tmp_path / "it.ckpt")
        assert found == pytest.approx(wanted)


class Stop(L.Callback):
    """Ends the run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *given: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def warmed_cosine(optimizer: Any) -> SequentialLR:
    parts = [LinearLR(optimizer, 0.1, total_iters=1), CosineAnnealingLR(optimizer, 2)]
    return SequentialLR(optimizer, parts, milestones=[1])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda o: CosineAnnealingLR(o, 3), "CosineAnnealingLR ends at step 3, .* up to step 6"),
        (lambda o: OneCycleLR(o, 1e-3, total_steps=3), "OneCycleLR ends at step 3"),
        (warmed_cosine, "SequentialLR ends at step 3"),
    ],
)
def test_a_schedule_that_would_rise_again_is_refused_before_the_first_step(
    schedule: Any, message: str, build: Build, batch: PromptBatch, tmp_path: Path
) -> None:
    """In a fresh run, and in one that is resumed for longer; a run without a known end stops there."""
    path = tmp_path / "three.ckpt"
    falling, runner = generator_rates(build, batch, 3, schedule)
    runner.save_checkpoint(path)
    assert falling[-1] < max(falling)
    for resumed in ({}, {"ckpt_path": path}):
        with pytest.raises(LoraGANError, match=f"generator.scheduler: {message}.*lora_gan.optimization.WarmupCosine"):
            generator_rates(build, batch, 6, schedule, **resumed)
    recorder = Recorder()
    with pytest.raises(LoraGANError, match="up to step 4"):
        fit(build(**OFF, generator_scheduler=schedule), [batch], -1, recorder, max_time={"seconds": 60})
    assert len(recorder.reports) == 3


def test_deliberate_restarts_are_left_alone(build: Build, batch: PromptBatch) -> None:
    found, _ = generator_rates(build, batch, 4, lambda o: CosineAnnealingWarmRestarts(o, 2))
    assert found == pytest.approx([1.0, 0.5, 1.0, 0.5])


class Measured(L.Callback):
    """Logs the same value in each validation."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.log("text/own", 0.5)


def plateau(monitor: str) -> Any:
    return lambda optimizer: ReduceLROnPlateau(optimizer, monitor, mode="max", factor=0.5, patience=0)


def validated(module: LoraGANModule, batch: PromptBatch, steps: int, **settings: Any) -> tuple[list[float], L.Trainer]:
    """The generator's rates in a run with a validation after every second step."""
    recorder = Recorder()
    every = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 1}
    runner = trainer(steps, recorder, Measured(), **every)
    loader = DataLoader([batch], batch_size=None)
    runner.fit(module, loader, loader, weights_only=True, **settings)
    return [1e3 * report["generator/learning_rate"] for report in recorder.reports], runner


def test_reduce_on_plateau_follows_a_metric_of_the_validation(build: Build, batch: PromptBatch, tmp_path: Path) -> None:
    """It does not improve, so the second validation, after step 4, halves the rate, and the third; resumed, too."""
    schedule = {"generator_scheduler": plateau("text/own")}
    whole, _ = validated(build(**OFF, **schedule), batch, 7)
    assert whole == pytest.approx([1, 1, 1, 1, 0.5, 0.5, 0.25])
    _, runner = validated(build(**OFF, **schedule), batch, 4)
    runner.save_checkpoint(tmp_path / "four.ckpt")
    assert validated(build(**OFF, **schedule), batch, 7, ckpt_path=tmp_path / "four.ckpt")[0] == whole[4:]


def test_plateaus_without_a_metric_are_refused_by_name(build: Build, batch: PromptBatch) -> None:
    with pytest.raises(LoraGANError, match=r"monitor: text/other, which the validation does not measure; .*text/own"):
        validated(build(**OFF, generator_scheduler=plateau("text/other")), batch, 4)
    with pytest.raises(LoraGANError, match=r"discriminator.scheduler: torch's .* use lightning.pytorch.cli.ReduceLROn"):
        validated(build(discriminator_scheduler=PlateauOfTorch), batch, 4)
    with pytest.raises(LoraGANError, match="follows a metric of the validation, and this run has none"):
        fit(build(generator_scheduler=plateau("text/own")), [batch], 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"^discriminator\.optimizer cannot be made: Invalid learning rate: -1\.0$"),
        ({"lr": float("nan")}, r"^discriminator\.optimizer cannot be made: Invalid learning rate: nan$"),
        ({"lr": float("inf")}, r"^discriminator\.optimizer: lr must be finite, got inf$"),
        ({"betas": (2.0, 3.0)}, r"^discriminator\.optimizer cannot be made: Invalid beta parameter"),
        ({"betas": (0.9, float("nan"))}, r"^discriminator\.optimizer cannot be made: Invalid beta parameter"),
        ({"weight_decay": -1.0}, r"^discriminator\.optimizer cannot be made: Invalid weight_decay value: -1\.0$"),
    ],
)
def test_values_that_an_optimizer_refuses_are_one_error_with_the_role(
    settings: dict[str, Any], message: str, build: Build, batch: PromptBatch
) -> None:
    module = build("gpt2", discriminator_optimizer=lambda parameters: AdamW(parameters, **settings))
    with pytest.raises(LoraGANError, match=message):
        fit(module, [batch], 1)


def test_values_that_a_schedule_refuses_are_one_error_with_the_role(build: Build, batch: PromptBatch) -> None:
    module = build("gpt2", generator_scheduler=lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=-1))
    with pytest.raises(LoraGANError, match=r"^generator\.scheduler cannot be made: "):
        fit(module, [batch], 1)
