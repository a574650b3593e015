"""The step, in a real trainer on a tiny model: what it counts, what it moves, what it learns, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lora_gan.advantages import LeaveOneOut, MovingAverage, PredictedReward, ValueGAE
from lora_gan.attention import TreeForward
from lora_gan.backbone import DISCRIMINATOR, GENERATOR, LoraSettings
from lora_gan.callbacks import Curriculum, MovingAverageBaseline, Phase
from lora_gan.discriminator.negatives import HardNegatives
from lora_gan.discriminator.objectives import Auxiliary, BradleyTerry, Combined, DiscriminatorObjective
from lora_gan.discriminator.replay import Replay
from lora_gan.errors import LoraGANError, NonFiniteError, RewardError
from lora_gan.generator import easiest
from lora_gan.losses import ClippedPPO, PolicyLoss
from lora_gan.module import LoraGANModule
from lora_gan.number_formats import default_device, resolved_dtype
from lora_gan.optimization import OptimizationSettings
from lora_gan.rewards import FunctionReward, Guarded, LengthReward, NormalizeThenSum
from lora_gan.rewards.adversarial import WinRate
from lora_gan.sampling import Sampling
from lora_gan.step_callback import OUTPUT, StepCallback, StepModule
from lora_gan.tree import PromptTree, grow
from lora_gan.types import (
    Advantages,
    DiscriminatorOutput,
    DiscriminatorScores,
    LossTerm,
    Minibatch,
    PromptBatch,
    Rollout,
    Scores,
    StepOutput,
)
from tests.conftest import randomise
from tests.helpers.steps import Build, fit, moved, share_of_a, state

# counting


def test_max_steps_counts_steps(build: Build, batch: PromptBatch) -> None:
    recorder, runner = fit(build(), [batch, batch], 7)
    assert len(recorder.reports) == 7
    assert runner.global_step == 7
    names = [moved(before, after) for before, after in pairwise(recorder.weights)]
    assert all(any(f".{p}." in n for n in changed) for changed in names for p in (GENERATOR, DISCRIMINATOR))


def test_schedulers_are_stepped_with_their_optimizer(build: Build, batch: PromptBatch) -> None:
    def halve(optimizer: torch.optim.Optimizer) -> StepLR:
        return StepLR(optimizer, step_size=1, gamma=0.5)

    recorder, _ = fit(build(generator_scheduler=halve), [batch], 3)
    assert recorder.rates == [[5e-4, 1e-3], [2.5e-4, 1e-3], [1.25e-4, 1e-3]]
    recorder, _ = fit(build(discriminator_scheduler=halve), [batch], 1)
    assert recorder.rates == [[1e-3, 5e-4]]


# what a step moves


@pytest.mark.parametrize(
    ("settings", "roles"),
    [
        ({"discriminator_updates": 0}, {GENERATOR}),
        ({"supervised": 0.0, "policy": 0.0}, {DISCRIMINATOR}),
        ({}, {GENERATOR, DISCRIMINATOR}),
    ],
)
def test_a_role_moves_itself_only(settings: dict[str, Any], roles: set[str], build: Build, batch: PromptBatch) -> None:
    module = build(**settings)
    before = state(module)
    recorder, _ = fit(module, [batch], 3)
    changed = moved(before, recorder.weights[-1])
    allowed = {name for name in before for role in roles if f".{role}." in name}
    if DISCRIMINATOR in roles:
        allowed |= {"score_head.weight", "score_head.bias"}
    assert changed == allowed


def test_gradient_clipping_holds(build: Build, batch: PromptBatch) -> None:
    """SGD at rate 1 moves by the clipped gradient, so by a vector of length 0.001 for each role."""
    sgd: dict[str, Any] = {f"{p}_optimizer": lambda p: SGD(p, lr=1.0) for p in (GENERATOR, DISCRIMINATOR)}
    module = build(max_grad_norm=1e-3, **sgd)
    before = state(module)
    recorder, _ = fit(module, [batch], 1)
    for role in (GENERATOR, DISCRIMINATOR):
        mine = [n for n in before if f".{role}." in n or (role == DISCRIMINATOR and "score_head" in n)]
        length = math.sqrt(sum((recorder.weights[0][n] - before[n]).square().sum().item() for n in mine))
        assert length == pytest.approx(1e-3, rel=1e-3)


def test_nothing_is_sampled_without_need(build: Build, batch: PromptBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    off: dict[str, Any] = {"policy": 0.0, "kl": 0.0, "discriminator_updates": 0}
    monkeypatch.setattr("lora_gan.module.sample", lambda *_: pytest.fail("sampled"))
    assert len(build(**off).sample_rollout(batch)) == 0
    recorder, _ = fit(build(**off), [batch], 2)
    assert "completions/mean_length" not in recorder.reports[0]
    assert recorder.reports[0]["loss/generator"] == recorder.reports[0]["loss/supervised"] > 0


@pytest.mark.parametrize("use", ["policy", "kl", "discriminator_updates", "adversarial"])
def test_each_need_alone_samples(use: str, build: Build, batch: PromptBatch) -> None:
    settings: dict[str, Any] = {"policy": 0.0, "kl": 0.0, "discriminator_updates": 0, use: 1.0}
    rollout = build(**settings).sample_rollout(batch)
    assert len(rollout) == 6 and rollout.num_generations == 2
    assert not rollout.logprobs.requires_grad


def test_one_prompt_without_negatives_needs_none(build: Build, make_batch: Callable[..., PromptBatch]) -> None:
    recorder, _ = fit(build(), [make_batch(("alone", "yes"))], 2)
    assert (
        "discriminator/error_negatives" not in recorder.reports[0]
        and "discriminator/error_target" in recorder.reports[0]
    )
    recorder, _ = fit(build(negatives=[]), [make_batch(("p", "q", "r"), ("s", "t"))], 1)
    assert "discriminator/error_negatives" not in recorder.reports[0]


def test_the_discriminator_sees_eos_behind_every_completion(build: Build, batch: PromptBatch) -> None:
    module = build()
    torch.manual_seed(6)
    rollout = module.sample_rollout(batch)
    assert rollout.truncated.any()
    scores = module.score(rollout, batch, with_targets=True)
    shown = module.discriminator.make_batch(
        module.backbone.tokenizer, batch, rollout, Rollout.empty(module.device), scores
    )
    for rows in shown.completions.values():
        for completion in (completion for row in rows for completion in row):
            assert (completion == 256).nonzero().flatten().tolist() == [len(completion) - 1]


# what a step reports


def test_kl_is_zero_at_the_start_and_grows(build: Build, batch: PromptBatch) -> None:
    rate: dict[str, Any] = {"generator_optimizer": lambda p: AdamW(p, lr=1e-2, weight_decay=0.0)}
    recorder, _ = fit(build(**rate), [batch], 10)
    assert abs(recorder.reports[0]["policy/kl"]) < 1e-5
    assert recorder.reports[-1]["policy/kl"] > 1e-2


def test_a_kl_term_keeps_the_policy_near_the_base(build: Build, batch: PromptBatch) -> None:
    rate: dict[str, Any] = {"generator_optimizer": lambda p: AdamW(p, lr=1e-2, weight_decay=0.0)}
    free, _ = fit(build(**rate), [batch], 12)
    held, _ = fit(build(**rate, kl=5.0), [batch], 12)
    assert held.reports[-1]["policy/kl"] < 0.5 * free.reports[-1]["policy/kl"]


def test_the_names_in_the_log(build: Build, batch: PromptBatch) -> None:
    recorder, _ = fit(build(), [batch], 1)
    report = recorder.reports[0]
    assert {name.split("/")[0] for name in report} == {
        "loss",
        "reward",
        "policy",
        "generator",
        "completions",
        "discriminator",
        "coefficient",
    }
    assert report["reward/total"] == report["reward/share_of_a"]
    assert 1 <= report["completions/mean_length"] <= 5 and 0 <= report["completions/truncated_fraction"] <= 1
    assert report["policy/entropy"] > 0
    assert report["reward/target"] == pytest.approx(1 / 3), "of the targets a, hi and 4, one third of the shares is a"
    assert report["loss/generator"] == pytest.approx(report["loss/supervised"] + report["loss/policy"], abs=1e-5)


def test_the_discriminator_pays_by_its_weight(build: Build, batch: PromptBatch) -> None:
    recorder, _ = fit(build(adversarial=0.5), [batch], 1)
    report = recorder.reports[0]
    wanted = report["reward/share_of_a"] + 0.5 * report["discriminator/score_sampled"]
    assert report["reward/total"] == pytest.approx(wanted, abs=1e-6)
    assert abs(report["discriminator/score_sampled"]) > 1e-3


@pytest.mark.parametrize("k", [2, 3])
def test_centred_advantages_sum_to_zero(
    k: int, build: Build, batch: PromptBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Advantages] = []
    module = build(num_generations=k, adversarial=0.5)
    given = module.compute_advantages
    monkeypatch.setattr(module, "compute_advantages", lambda *step: seen.append(given(*step)) or seen[-1])
    fit(module, [batch], 2)
    for advantages in seen:
        per_prompt = advantages.per_token[:, 0].view(3, k)
        torch.testing.assert_close(per_prompt.sum(1), torch.zeros(3), atol=1e-5, rtol=0)
        assert per_prompt.abs().max() > 0


# learning


def test_reinforce_raises_what_is_rewarded(build: Build, make_batch: Callable[..., PromptBatch]) -> None:
    """Share of "a" in the completions: from about 1 in 257 tokens to more than half of them."""
    module = build(
        supervised=0.0,
        discriminator_updates=0,
        num_generations=16,
        sampling=Sampling(max_new_tokens=4),
        generator_optimizer=lambda p: AdamW(p, lr=2e-2, weight_decay=0.0),
    )
    recorder, _ = fit(module, [make_batch(("Say it: ", "a"), ("And you? ", "a"))], 60)
    reward = [report["reward/total"] for report in recorder.reports]
    assert sum(reward[:5]) / 5 < 0.1
    assert sum(reward[-5:]) / 5 > 0.5


def test_supervised_learning_lowers_the_loss(build: Build, batch: PromptBatch) -> None:
    module = build(
        policy=0.0, discriminator_updates=0, generator_optimizer=lambda p: AdamW(p, lr=1e-2, weight_decay=0.0)
    )
    recorder, _ = fit(module, [batch], 25)
    losses = [report["loss/supervised"] for report in recorder.reports]
    assert losses[-1] < 0.2 * losses[0]
    with module.backbone.generator():
        assert module.complete(batch, module.greedy).texts == ("a", "hi", "4")
    with module.backbone.reference():
        assert module.complete(batch, module.greedy).texts != ("a", "hi", "4")


def test_the_discriminator_learns_the_reward(build: Build, batch: PromptBatch) -> None:
    module = build(
        policy=0.0,
        supervised=0.0,
        discriminator_optimizer=lambda p: AdamW(p, lr=5e-3, weight_decay=0.0),
    )
    recorder, _ = fit(module, [batch], 40)
    first, last = recorder.reports[:5], recorder.reports[-5:]
    for kind in ("sampled", "target", "negatives"):
        name = f"discriminator/error_{kind}"
        assert sum(r[name] for r in last) < 0.5 * sum(r[name] for r in first), name


# what is refused


class Broken(PolicyLoss):
    """A loss with a chosen value, or a finite one with a gradient that is not."""

    def __init__(self, value: float | None) -> None:
        self.value = value

    def __call__(self, logprobs: Tensor, rollout: Rollout, credit: Advantages) -> LossTerm:
        nothing = (logprobs * 0).sum()
        return LossTerm(nothing.abs().sqrt() if self.value is None else nothing + self.value, {})


class BrokenObjective(DiscriminatorObjective):
    def __call__(self, outputs: Mapping[str, DiscriminatorOutput]) -> LossTerm:
        return LossTerm(outputs["target"].score.sum() * float("nan"), {})


def not_a_number(response: str, target: str) -> float:
    return float("nan")


def test_a_nan_reward_stops_by_name(build: Build, batch: PromptBatch) -> None:
    module = build(rewards=[FunctionReward(not_a_number, name="mine")])
    before = state(module)
    with pytest.raises(RewardError, match=r"reward 'mine' \(FunctionReward\) must return finite numbers, got nan for"):
        fit(module, [batch], 1)
    assert not moved(before, state(module))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy_loss": Broken(float("nan")), "discriminator_updates": 0}, "loss/policy is nan in step 0"),
        ({"policy_loss": Broken(float("inf")), "discriminator_updates": 0}, "loss/policy is inf in step 0"),
        ({"policy_loss": Broken(None), "discriminator_updates": 0}, "the gradient's norm is nan"),
        ({"objective": BrokenObjective()}, "loss/discriminator is nan"),
    ],
)
def test_what_is_not_finite_stops_before_the_weights(
    settings: dict[str, Any], message: str, build: Build, batch: PromptBatch
) -> None:
    module = build(**settings)
    before = state(module)
    with pytest.raises(NonFiniteError, match=message):
        fit(module, [batch], 2)
    assert not moved(before, state(module))


def test_the_module_brings_the_baseline_that_its_advantage_needs(build: Build, batch: PromptBatch) -> None:
    """Under a plain trainer, once; a callback given by hand stays, with its own decay."""
    for given, decay in (((), 0.9), ((MovingAverageBaseline(0.5),), 0.5)):
        recorder, runner = fit(build(advantage=MovingAverage()), [batch], 2, *given)
        (baseline,) = [c for c in runner.callbacks if isinstance(c, MovingAverageBaseline)]  # type: ignore[attr-defined]
        assert baseline.decay == decay and baseline.started
        assert recorder.reports[1]["coefficient/baseline"] == pytest.approx(recorder.reports[0]["reward/total"])
    _, runner = fit(build(advantage=LeaveOneOut()), [batch], 1)
    assert not any(isinstance(c, MovingAverageBaseline) for c in runner.callbacks)  # type: ignore[attr-defined]


def test_a_baseline_of_the_users_own_stays(build: Build, batch: PromptBatch) -> None:
    class Constant(StepCallback):
        sets_baseline = True

        def after_step(self, trainer: L.Trainer, module: StepModule, output: StepOutput, batch: PromptBatch) -> None:
            module.coefficients.set(baseline=5.0)

    module = build(advantage=MovingAverage())
    fit(module, [batch], 1, Constant())
    assert float(module.coefficients.baseline) == 5.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 0}, "num_generations must be at least 1, got 0"),
        ({"num_generations": 1}, "LeaveOneOut compares a prompt's completions"),
        ({"micro_batch_size": 0}, "micro_batch_size must be at least 1, got 0; null is the whole batch"),
        ({"discriminator_updates": -1}, "discriminator_updates"),
        ({"kl_reference": "teacher"}, "kl_reference"),
        ({"negatives": [HardNegatives(), HardNegatives()]}, "hard"),
        ({"policy": -0.1}, "policy"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be > 0, got 0.0"),
        ({"rewards": [FunctionReward(share_of_a), FunctionReward(share_of_a)]}, "two rewards are named 'share_of_a'"),
        ({"aggregation": Guarded()}, "Guarded trusts the reward 'answer', and there is none of that name among share"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str, build: Build) -> None:
    with pytest.raises(LoraGANError, match=message):
        build(**settings)


# callbacks


def outputs(metrics: dict[str, float]) -> dict[str, StepOutput]:
    """What a training step returns, as far as callbacks look at its metrics."""
    tensors = {name: torch.tensor(value) for name, value in metrics.items()}
    return {OUTPUT: StepOutput(tensors, Rollout.empty(torch.device("cpu")), None, None, {})}


def test_moving_average_baseline_by_hand(build: Build) -> None:
    """Decay 0.9: starts at 1; 0.9·1 + 0.1·2 = 1.1; 0.9·1.1 + 0.1·0 = 0.99; a step without completions changes
    nothing.
    """
    module, callback = build(), MovingAverageBaseline(0.9)
    kept = []
    for report in ({"reward/total": 1.0}, {"reward/total": 2.0}, {}, {"reward/total": 0.0}):
        callback.on_train_batch_end(None, module, outputs(report), None, 0)  # type: ignore[arg-type]
        kept.append(module.coefficients.baseline.item())
    assert kept == pytest.approx([1.0, 1.1, 1.1, 0.99])
    resumed = MovingAverageBaseline(0.9)
    resumed.load_state_dict(callback.state_dict())
    resumed.on_train_batch_end(None, module, outputs({"reward/total": 1.99}), None, 0)  # type: ignore[arg-type]
    assert module.coefficients.baseline.item() == pytest.approx(0.9 * 0.99 + 0.1 * 1.99)
    with pytest.raises(LoraGANError, match="decay"):
        MovingAverageBaseline(1.0)


def test_the_baseline_follows_the_run(build: Build, batch: PromptBatch) -> None:
    recorder, _ = fit(build(advantage=MovingAverage()), [batch], 3, MovingAverageBaseline(0.5))
    reward = [report["reward/total"] for report in recorder.reports]
    found = [report["coefficient/baseline"] for report in recorder.reports]
    assert found == pytest.approx([0.0, reward[0], (reward[0] + reward[1]) / 2])


def test_curriculum_by_hand(build: Build) -> None:
    module = build()
    phases = [
        Phase(0, {"policy": 0.0, "discriminator_updates": 0}),
        Phase(2, {"policy": 0.5, "kl": 0.1}),
    ]
    callback = Curriculum(phases)
    seen = []
    for step in range(4):
        callback.on_train_batch_start(SimpleNamespace(global_step=step), module, None, 0)  # type: ignore[arg-type]
        coefficients = module.coefficients
        seen.append([x.item() for x in (coefficients.policy, coefficients.kl, coefficients.discriminator_updates)])
    assert seen[:2] == [[0.0, 0.0, 0.0]] * 2
    assert seen[2:] == [pytest.approx([0.5, 0.1, 0.0])] * 2
    assert module.coefficients.supervised.item() == 1.0, "what is not given stays"
    for starts in ([2, 1], [0, 0], [-1]):
        with pytest.raises(LoraGANError, match="increasing steps"):
            Curriculum([Phase(start) for start in starts])


def test_a_curriculum_warms_up_without_sampling(build: Build, batch: PromptBatch) -> None:
    warm_up = Phase(0, {"policy": 0.0, "discriminator_updates": 0})
    recorder, _ = fit(build(), [batch], 4, Curriculum([warm_up, Phase(2, {"policy": 1.0, "discriminator_updates": 1})]))
    assert ["completions/mean_length" in report for report in recorder.reports] == [False, False, True, True]
    assert ["loss/discriminator" in report for report in recorder.reports] == [False, False, True, True]


# checkpoints


def test_a_checkpoint_holds_what_is_trained(build: Build, batch: PromptBatch, tmp_path: Path) -> None:
    module = build()
    _, runner = fit(module, [batch], 2)
    path = tmp_path / "two.ckpt"
    runner.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert all(
        ".lora_A." in n or ".lora_B." in n or "score_head" in n or "coefficients." in n for n in saved["state_dict"]
    )
    assert len(saved["state_dict"]) == 8 * 2 * 2 + 2 + 14  # layers · matrices · roles, head, coefficients
    assert not any("base_layer" in name for name in saved["state_dict"])
    assert saved["global_step"] == 2
    assert saved["lora_gan"]["base"] == module.base

    other = build()
    other.on_load_checkpoint(saved)
    other.load_state_dict(saved["state_dict"], strict=False)
    assert not moved(state(module), state(other))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generator_lora": LoraSettings(2, 8)}, r"generator\.lora\.rank: 4 in the checkpoint, 2 now"),
        ({"discriminator_lora": LoraSettings(4, 9)}, r"discriminator\.lora\.alpha: 8 in the checkpoint, 9 now"),
        ({"architecture": "llama"}, "base: .*gpt2.* in the checkpoint, .*llama.* now"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    settings: dict[str, Any], message: str, build: Build, batch: PromptBatch, tmp_path: Path
) -> None:
    path = tmp_path / "one.ckpt"
    fit(build(), [batch], 1)[1].save_checkpoint(path)
    with pytest.raises(LoraGANError, match=message):
        fit(build(**settings), [batch], 2, ckpt_path=path)
    saved = torch.load(path, weights_only=True)
    with pytest.raises(LoraGANError, match="not written by lora-gan"):
        build().on_load_checkpoint({"state_dict": saved["state_dict"]})
    saved["state_dict"].pop("backbone.score_head.bias")
    with pytest.raises(LoraGANError, match=r"score_head\.bias"):
        build().on_load_checkpoint(saved)


def test_three_steps_and_two_are_five(build: Build, batch: PromptBatch, tmp_path: Path) -> None:
    """Supervised steps draw nothing at random, so a resumed run must equal an uninterrupted one."""
    off: dict[str, Any] = {"policy": 0.0, "discriminator_updates": 0}
    whole, _ = fit(build(**off), [batch], 5)
    path = tmp_path / "three.ckpt"
    fit(build(**off), [batch], 3)[1].save_checkpoint(path)
    resumed, runner = fit(build(**off), [batch], 5, ckpt_path=path)
    assert len(resumed.reports) == 2 and runner.global_step == 5
    assert resumed.reports == whole.reports[3:]
    assert not moved(whole.weights[-1], resumed.weights[-1])


def one(response: str, target: str) -> float:
    return 1.0


def test_coefficients_are_resumed_and_new_settings_win(build: Build, batch: PromptBatch, tmp_path: Path) -> None:
    """A reward of 1: the baseline is 0 in the first step, then 1. The curriculum's phase of step 1 stays in force."""
    path = tmp_path / "two.ckpt"
    settings: dict[str, Any] = {
        "advantage": MovingAverage(),
        "rewards": [FunctionReward(one)],
        "discriminator_updates": 0,
    }
    callbacks = [MovingAverageBaseline(0.5), Curriculum([Phase(1, {"supervised": 0.3})])]
    first, runner = fit(build(**settings), [batch], 2, *callbacks)
    assert [report["coefficient/baseline"] for report in first.reports] == [0.0, 1.0]
    runner.save_checkpoint(path)
    callbacks = [MovingAverageBaseline(0.5), Curriculum([Phase(1, {"supervised": 0.3})])]
    resumed, _ = fit(build(**settings, kl=0.25), [batch], 3, *callbacks, ckpt_path=path)
    (report,) = resumed.reports
    assert report["coefficient/baseline"] == 1.0
    assert report["coefficient/supervised"] == pytest.approx(0.3), "not asked for anew, so as it was"
    assert report["coefficient/kl"] == 0.25, "asked for anew"


# number formats, other stages


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}], ids=["float32 base", "bfloat16 base"])
def test_bf16_mixed_runs(settings: dict[str, str], build: Build, batch: PromptBatch) -> None:
    module = build(**settings)
    before = state(module)
    recorder, _ = fit(module, [batch], 2, precision="bf16-mixed")
    assert all(math.isfinite(value) for report in recorder.reports for value in report.values())
    changed = moved(before, recorder.weights[-1])
    assert changed and all("lora_" in name or "score_head" in name for name in changed)
    assert {recorder.weights[-1][name].dtype for name in changed} == {torch.float32}


def test_a_checkpoint_names_the_number_format_and_resumes_in_another(
    build: Build, batch: PromptBatch, tmp_path: Path
) -> None:
    """auto is float32 here; the weights of a bfloat16 base are others, so the base is known by its name then."""
    path = tmp_path / "one.ckpt"
    fit(build(dtype="auto"), [batch], 1)[1].save_checkpoint(path)
    described = torch.load(path, weights_only=True)["lora_gan"]
    wanted = resolved_dtype("auto", default_device())
    assert (described["dtype"], described["fingerprint"]["format"], described["quantization"]) == (wanted, wanted, None)
    resumed, _ = fit(build(dtype="bfloat16"), [batch], 2, ckpt_path=path)
    assert len(resumed.reports) == 1
    with pytest.raises(LoraGANError, match=r"base: .*gpt2.* in the checkpoint, .*llama.* now"):
        fit(build("llama", dtype="bfloat16"), [batch], 2, ckpt_path=path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true"])
def test_a_gpu_trains_in(precision: str, build: Build, batch: PromptBatch) -> None:
    module = build(advantage=LeaveOneOut(), coupled=0.1, gradient_checkpointing=True)
    before = state(module)
    recorder, _ = fit(module, [batch], 6, accelerator="gpu", devices=1, precision=precision)
    assert all(math.isfinite(value) for report in recorder.reports for value in report.values())
    after = {name: tensor.cpu() for name, tensor in recorder.weights[-1].items()}
    changed = moved(before, after)
    assert any(f".{GENERATOR}." in n for n in changed) and any(f".{DISCRIMINATOR}." in n for n in changed)
    assert not any("base_layer" in name for name in changed)


def test_evaluation_completes_greedily_in_the_right_mode(build: Build, batch: PromptBatch) -> None:
    module = build(policy=0.0, generator_optimizer=lambda p: AdamW(p, lr=1e-2, weight_decay=0.0))
    fit(module, [batch], 25)
    tested = module.test_step(batch, 0)
    assert list(tested) == ["base", "trained", "sampled"]
    validated = module.validation_step(batch, 0)["trained"]
    assert validated.texts == tested["trained"].texts == ("a", "hi", "4") != tested["base"].texts
    assert validated.reward.tolist() == [1.0, 0.0, 0.0]
    assert module.predict_step(batch, 0)[0] == {
        "prompt": "Say a",
        "completion": "a",
        "target": "a",
        "references": ["a"],
        "negatives": ["b"],
        "reward": 1.0,
    }


# several steps a step


class Stepper:
    """Makes SGD and counts its steps."""

    def __init__(self, lr: float = 1e-2) -> None:
        self.lr = lr
        self.count = 0

    def __call__(self, parameters: Any) -> SGD:
        optimizer = SGD(parameters, lr=self.lr)
        optimizer.register_step_post_hook(self.counted)
        return optimizer

    def counted(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize(
    ("epochs", "num_minibatches", "steps"), [(1, 1, 1), (3, 1, 3), (1, 3, 3), (2, 2, 4), (2, 99, 6)], ids=str
)
def test_ppo_takes_a_step_for_each_minibatch_of_each_epoch(
    epochs: int, num_minibatches: int, steps: int, build: Build, batch: PromptBatch
) -> None:
    """Two steps of three prompts; no minibatch is empty. The discriminator steps once, a step counts once."""
    mine, theirs = Stepper(), Stepper()
    module = build(
        policy_loss=ClippedPPO(num_iterations=epochs, num_minibatches=num_minibatches),
        generator_optimizer=mine,
        discriminator_optimizer=theirs,
    )
    recorder, runner = fit(module, [batch], 2)
    assert (mine.count, theirs.count, runner.global_step) == (2 * steps, 2, 2)
    updates = [report.get("policy/updates") for report in recorder.reports]
    assert updates == ([None] * 2 if steps == 1 else [steps] * 2)


def test_the_ratio_is_1_in_the_first_minibatch(build: Build, batch: PromptBatch) -> None:
    how = Sampling(max_new_tokens=5, temperature=0.7)
    recorder, _ = fit(build(policy_loss=ClippedPPO(num_iterations=1), sampling=how), [batch], 3)
    for report in recorder.reports:
        assert report["policy/ratio"] == pytest.approx(1, abs=1e-5)
        assert report["policy/approx_kl"] == pytest.approx(0, abs=1e-6)
        assert report["policy/clip_fraction"] == 0


def test_an_absurd_learning_rate_is_stopped_by_the_target_kl(build: Build, batch: PromptBatch) -> None:
    """The first step goes too far; the second is not taken, whatever is left of the epochs."""
    held = Stepper(lr=1e3)
    settings: dict[str, Any] = {"supervised": 0.0, "max_grad_norm": 1e9, "discriminator_updates": 0}
    settings |= {"rewards": [FunctionReward(length_of)], "num_generations": 4}
    module = build(policy_loss=ClippedPPO(num_iterations=6, target_kl=0.05), generator_optimizer=held, **settings)
    recorder, _ = fit(module, [batch], 1)
    report = recorder.reports[0]
    assert held.count == 1 and report["policy/updates"] == 1
    assert report["policy/approx_kl"] > 0.05
    free = Stepper(lr=1e-3)
    calm, _ = fit(
        build(policy_loss=ClippedPPO(num_iterations=6, target_kl=0.05), generator_optimizer=free, **settings),
        [batch],
        1,
    )
    assert free.count == 6 and calm.reports[0]["policy/approx_kl"] < 0.05


def length_of(response: str, target: str) -> float:
    return float(len(response))


def test_a_warm_up_without_policy_takes_one_step_and_reports(build: Build, batch: PromptBatch) -> None:
    mine = Stepper()
    module = build(policy_loss=ClippedPPO(num_iterations=3, num_minibatches=2), generator_optimizer=mine, policy=0.0)
    recorder, _ = fit(module, [batch], 3, Curriculum([Phase(2, {"policy": 1.0})]))
    assert mine.count == 1 + 1 + 6
    assert ["policy/updates" in report for report in recorder.reports] == [False, False, True]


def test_schedulers_are_stepped_once_a_step_however_many_steps_it_takes(build: Build, batch: PromptBatch) -> None:
    def halve(optimizer: torch.optim.Optimizer) -> StepLR:
        return StepLR(optimizer, step_size=1, gamma=0.5)

    module = build(
        policy_loss=ClippedPPO(num_iterations=2, num_minibatches=2),
        discriminator_updates=3,
        generator_scheduler=halve,
        discriminator_scheduler=halve,
    )
    recorder, _ = fit(module, [batch], 2)
    assert recorder.rates == [[5e-4, 5e-4], [2.5e-4, 2.5e-4]]


def test_the_discriminator_may_take_several_updates_a_step(build: Build, batch: PromptBatch) -> None:
    """One loss is logged, that before the first step; at rate 0 every step sees the same, so nothing moves."""
    once, thrice = Stepper(), Stepper()
    reports = []
    for updates, steps in ((1, once), (3, thrice)):
        recorder, _ = fit(build(discriminator_updates=updates, discriminator_optimizer=steps), [batch], 1)
        reports.append(recorder.reports[0])
    assert (once.count, thrice.count) == (1, 3)
    assert reports[0]["loss/discriminator"] == reports[1]["loss/discriminator"]
    assert reports[0]["discriminator/accuracy"] == reports[1]["discriminator/accuracy"]


def sampled_minibatch(module: LoraGANModule, batch: PromptBatch, ends: tuple[int, ...] = ()) -> Minibatch:
    """A sampled rollout with advantages 1, 2, 3, … and a reference that is off by ⅒."""
    if ends:
        assert module.backbone.causal_lm.generation_config is not None
        module.backbone.causal_lm.generation_config.eos_token_id = list(ends)
    torch.manual_seed(8)
    rollout = module.sample_rollout(batch)
    advantages = torch.arange(1.0, len(rollout) + 1)[:, None] * rollout.mask
    given = Advantages(advantages, {}, returns=advantages, values=advantages / 2)
    return Minibatch(batch, rollout, given, rollout.logprobs - 0.1)


def losses(module: LoraGANModule, minibatch: Minibatch) -> dict[str, Tensor]:
    """The terms of the generator's loss, before their weights."""
    model = module.discriminator.model
    found = module.generator.losses(module.backbone, minibatch, module.coefficients, model)
    return {name: term.loss for name, term in found.items()}


@pytest.mark.parametrize(("parts", "steps"), [(1, 1), (2, 2), (99, 3)])
def test_targets_may_be_learned_in_parts(parts: int, steps: int, build: Build, batch: PromptBatch) -> None:
    """Of three prompts with targets; in a step with a policy loss its own settings count, and a step counts once."""
    for policy, wanted in ((0.0, steps), (1.0, 1)):
        mine = Stepper()
        module = build(generator_optimizer=mine, supervised_minibatches=parts, policy=policy)
        recorder, runner = fit(module, [batch], 2)
        assert (mine.count, runner.global_step) == (2 * wanted, 2)
        assert all(math.isfinite(report["loss/supervised"]) for report in recorder.reports)
    with pytest.raises(LoraGANError, match="supervised_minibatches must be at least 1, got 0"):
        build(supervised_minibatches=0)


def test_a_part_without_a_target_takes_no_step(build: Build, make_batch: Callable[..., PromptBatch]) -> None:
    """One target in three prompts, each a part: one optimizer step, whichever comes first."""
    some = make_batch(("Say a", ""), ("2+2=", "4"), ("Hi", ""))
    for seed in range(3):
        mine = Stepper()
        module = build(generator_optimizer=mine, supervised_minibatches=3, policy=0.0, discriminator_updates=0)
        module.seed = seed
        recorder, _ = fit(module, [some], 1)
        assert mine.count == 1 and recorder.reports[0]["loss/supervised"] > 0
    none = make_batch(("Say a", ""), ("2+2=", ""))
    mine = Stepper()
    module = build(generator_optimizer=mine, supervised_minibatches=2, policy=0.0, discriminator_updates=0)
    recorder, _ = fit(module, [none], 1)
    assert mine.count == 0 and "loss/generator" not in recorder.reports[0]


def test_minibatches_together_are_the_batch(build: Build, batch: PromptBatch) -> None:
    """Every term is a mean over tokens: those of the num_minibatches, weighted by their tokens, are that of the batch.

    Completions are of unequal length, and in some num_minibatches all of them shorter than the longest of the step.
    """
    module = build(policy_loss=ClippedPPO(), advantage=ValueGAE(), kl=1.0, entropy=1.0, value_clip=1e9)
    module.coefficients.set(supervised=0.0)
    whole = sampled_minibatch(module, batch, ends=tuple(range(0, 256, 4)))
    parts = [whole.of([2]), whole.of([0, 1])]
    widths = [part.rollout.ids.shape[1] for part in parts]
    assert min(widths) < max(widths) == whole.rollout.ids.shape[1]
    tokens = [int(part.rollout.mask.sum()) for part in parts]
    with module.backbone.generator():
        wanted = losses(module, whole)
        found = [losses(module, part) for part in parts]
    assert set(wanted) == {"policy", "value", "kl", "entropy"}
    for name, term in wanted.items():
        mean = sum(n * part[name] for n, part in zip(tokens, found, strict=True)) / sum(tokens)
        torch.testing.assert_close(term, mean, atol=1e-5, rtol=1e-5)


# what the policy is paid


def paid(module: LoraGANModule, batch: PromptBatch, sampled: list[float]) -> Tensor:
    """Two prompts, a completion of 3 and one of 2 tokens each, the 2nd and 4th cut off; rewards 1, 2, 3 and 4."""
    mask = torch.tensor([[True, True, True], [True, True, False]] * 2)
    rollout = Rollout(mask.long(), mask, -1.0 * mask, torch.tensor([False, True] * 2), ("",) * 4, 2)
    reference = torch.tensor([[-1.0, -3.0, -0.5], [-2.0, -1.0, 0.0]] * 2)
    total = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scores = Scores(total, {"share_of_a": total}, {}, torch.zeros(2), {}, {}, reference, reference)
    disc_scores = DiscriminatorScores(torch.tensor(sampled), torch.zeros(2), torch.zeros(0), 2, {})
    return module.compute_rewards(rollout, scores, disc_scores, batch).per_token


def test_the_reward_stands_at_the_last_token_less_the_penalty_for_truncation(build: Build, batch: PromptBatch) -> None:
    found = paid(build(truncated_penalty=0.5), batch, [0.0] * 4)
    assert found.tolist() == [[0.0, 0.0, 1.0], [0.0, 1.5, 0.0], [0.0, 0.0, 3.0], [0.0, 3.5, 0.0]]


def test_the_kl_penalty_stands_at_the_token_where_it_arises(build: Build, batch: PromptBatch) -> None:
    """log π − log reference is 0, 2, −½ for the first completion and 1, 0 for the second; half of it is taken off."""
    found = paid(build(kl_penalty=0.5), batch, [0.0] * 4)
    assert found[:2].tolist() == [[0.0, -1.0, 1.25], [-0.5, 2.0, 0.0]]
    assert found[2:].tolist() == [[0.0, -1.0, 3.25], [-0.5, 4.0, 0.0]]


def test_the_adversarial_reward_counts_by_weight_scale_and_gate(build: Build, batch: PromptBatch) -> None:
    """½·2·½ of a score of 4 and so on; a gate of 0 pays nothing."""
    module = build(adversarial=0.5)
    module.coefficients.set(adversarial_scale=2.0, adversarial_gate=0.5)
    assert paid(module, batch, [4.0, -2.0, 0.0, 1.0]).sum(1).tolist() == [3.0, 1.0, 3.0, 4.5]
    module.coefficients.set(adversarial_gate=0.0)
    assert paid(module, batch, [4.0, -2.0, 0.0, 1.0]).sum(1).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_kl_penalty_keeps_the_policy_near_the_base(build: Build, batch: PromptBatch) -> None:
    settings: dict[str, Any] = {
        "supervised": 0.0,
        "discriminator_updates": 0,
        "num_generations": 8,
        "rewards": [FunctionReward(length_of)],
        "generator_optimizer": lambda p: AdamW(p, lr=1e-2, weight_decay=0.0),
    }
    free, _ = fit(build(**settings), [batch], 15)
    held, _ = fit(build(**settings, kl_penalty=5.0), [batch], 15)
    assert held.reports[-1]["policy/kl"] < 0.5 * free.reports[-1]["policy/kl"]


@pytest.mark.parametrize("masked", [True, False])
def test_truncated_completions_may_be_left_out(masked: bool, build: Build, batch: PromptBatch) -> None:
    """Then nothing of the policy's losses depends on what they were credited with or on where the reference was."""
    module = build(
        mask_truncated=masked,
        supervised=0.0,
        kl=1.0,
        advantage=ValueGAE(),
        num_generations=4,
    )
    minibatch = sampled_minibatch(module, batch, ends=tuple(range(0, 256, 6)))
    cut = minibatch.rollout.truncated
    assert 0 < cut.sum() < len(cut)
    other = torch.where(cut[:, None], 7.0, minibatch.advantages.per_token)
    changed = replace(
        minibatch,
        advantages=Advantages(other, {}, returns=other, values=minibatch.advantages.values),
        reference_logprobs=torch.where(cut[:, None], -9.0, minibatch.reference_logprobs),
    )
    with module.backbone.generator():
        left, right = losses(module, minibatch), losses(module, changed)
    assert set(left) == {"policy", "value", "kl"}
    for name in left:
        assert (left[name].item() == right[name].item()) == masked, name


# entropy, references, opponents


def test_an_entropy_bonus_raises_the_entropy(build: Build, batch: PromptBatch) -> None:
    """loss/entropy is the mean of −H, so at least −ln 257; where nothing else counts it nears that."""
    module = build(
        supervised=0.0,
        policy=0.0,
        discriminator_updates=0,
        entropy=1.0,
        generator_optimizer=lambda p: AdamW(p, lr=1e-2, weight_decay=0.0),
    )
    recorder, _ = fit(module, [batch], 12)
    entropy = [-report["loss/entropy"] for report in recorder.reports]
    assert entropy[0] < entropy[-1] - 0.3
    assert max(entropy) < math.log(257)
    assert recorder.reports[0]["loss/generator"] == recorder.reports[0]["loss/entropy"]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_reference_may_be_a_snapshot(temperature: float, build: Build, batch: PromptBatch) -> None:
    """A snapshot of now is no distance away, the base is; both at the sampling temperature."""
    how = Sampling(max_new_tokens=5, temperature=temperature)
    distances = []
    for reference in ("snapshot", "base"):
        module = build(kl_reference=reference, sampling=how)
        randomise(module.backbone)
        module.backbone.take_snapshot()
        torch.manual_seed(8)
        rollout = module.sample_rollout(batch)
        scores = module.score(rollout, batch, with_targets=False)
        distances.append((scores.reference_logprobs - rollout.logprobs).abs().max().item())
    assert distances[0] < 1e-4 < 0.1 < distances[1]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts in each pass of the model over trees."""
    seen: list[int] = []
    forward = TreeForward.__call__

    def counted(self: TreeForward, tree: PromptTree, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(tree.ids))
        return forward(self, tree, *args, **kwargs)

    monkeypatch.setattr(TreeForward, "__call__", counted)
    return seen


def test_one_reference_pass_gives_both_temperatures(build: Build, batch: PromptBatch, passes: list[int]) -> None:
    module = build(sampling=Sampling(max_new_tokens=5, temperature=0.7))
    randomise(module.backbone)
    rollout = module.sample_rollout(batch)
    passes.clear()
    scores = module.score(rollout, batch, with_targets=True)
    assert passes == [3]
    tree = grow(batch.prompt_ids, {"sampled": rollout.by_prompt(3)})
    for temperature, found in ((1.0, scores.base_logprobs), (0.7, scores.reference_logprobs)):
        with module.backbone.reference():
            wanted = module.backbone.logprobs(tree, {"sampled": temperature})["sampled"]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-6)


def test_a_step_without_completions_has_no_reference_pass(build: Build, batch: PromptBatch, passes: list[int]) -> None:
    fit(build(policy=0.0, discriminator_updates=0), [batch], 1)
    assert passes == [3], "the generator's own"


def test_passes_without_gradient_are_split_as_others(build: Build, batch: PromptBatch, passes: list[int]) -> None:
    module = build(advantage=ValueGAE(), sampling=Sampling(max_new_tokens=9))
    randomise(module.backbone)
    rollout = module.sample_rollout(batch)
    results = []
    for size in (None, 2):
        module.optimization.settings = OptimizationSettings(micro_batch_size=size)
        passes.clear()
        scores = module.score(rollout, batch, with_targets=True)
        values = module.generator.values(module.backbone, rollout, batch, module.optimization)
        results.append([scores.base_logprobs, scores.total, scores.target_total, values, module.target_logprobs(batch)])
    assert passes == [2, 1] * 3
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-6)


def test_the_kl_to_a_snapshot_begins_anew_when_one_is_taken(build: Build, batch: PromptBatch) -> None:
    rate: dict[str, Any] = {"generator_optimizer": lambda p: AdamW(p, lr=1e-2, weight_decay=0.0)}
    recorder, _ = fit(build(kl_reference="snapshot", **rate), [batch], 7, Curriculum([Phase(5, take_snapshot=True)]))
    kl = [report["policy/kl"] for report in recorder.reports]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[5] == pytest.approx(0, abs=1e-6)
    assert min(kl[4], kl[6]) > 1e-3


def test_self_play_pays_the_share_of_wins(build: Build, batch: PromptBatch) -> None:
    """The opponent completes the same prompts, the discriminator learns from that, the generator earns its wins."""
    module = build(adversarial_reward=WinRate(), adversarial=2.0)
    recorder, _ = fit(module, [batch], 2)
    for report in recorder.reports:
        assert report["reward/total"] == pytest.approx(report["reward/share_of_a"] + 2 * report["reward/win_rate"])
        assert 0 <= report["reward/win_rate"] <= 1
        assert "discriminator/accuracy_opponent" in report and "discriminator/score_opponent" in report


def test_the_opponent_is_the_snapshot(build: Build, batch: PromptBatch) -> None:
    """Its log-probabilities are the snapshot's, not today's generator's; before one is taken they are the base's."""
    module = build(adversarial_reward=WinRate())
    backbone = module.backbone
    randomise(backbone)
    for wanted, other in ((backbone.reference, backbone.generator), (backbone.snapshot, backbone.generator)):
        opponent = module.sample_opponent(batch)
        rows = [list(opponent.completion_ids[2 * b : 2 * b + 2]) for b in range(3)]
        distances = []
        for mode in (wanted, other):
            with mode(), torch.no_grad():
                found = backbone.logprobs(grow(batch.prompt_ids, {"theirs": rows}))["theirs"]
            distances.append((opponent.logprobs - found).abs().max().item())
        assert distances[0] < 1e-4 < 0.1 < distances[1]
        backbone.take_snapshot()
        randomise(backbone)
    assert len(build().sample_opponent(batch)) == 0, "no part needs one"


# which prompts


@pytest.mark.parametrize(("share", "wanted"), [(1.0, [0, 1, 2]), (0.6, [0, 2]), (0.34, [0, 2]), (0.3, [2]), (0.0, [2])])
def test_the_easiest_prompts_are_those_with_the_best_scores(share: float, wanted: list[int]) -> None:
    """Mean scores 1, 0 and 2; a share is rounded up and leaves at least one prompt."""
    assert easiest(torch.tensor([[3.0, -1.0], [0.0, 0.0], [2.0, 2.0]]), share) == wanted


def test_only_the_easiest_prompts_are_learned_from(
    build: Build, batch: PromptBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(policy_loss=ClippedPPO(num_iterations=2, num_minibatches=2))
    module.coefficients.set(easiest_share=0.5)
    used: list[Minibatch] = []
    given = module.generator.losses

    def seen(backbone: Any, minibatch: Minibatch, *rest: Any) -> Any:
        used.append(minibatch)
        return given(backbone, minibatch, *rest)

    monkeypatch.setattr(module.generator, "losses", seen)
    monkeypatch.setattr("lora_gan.module.easiest", lambda scores, share: [0, 2])
    rollouts = []
    sampled = module.sample_rollout
    monkeypatch.setattr(module, "sample_rollout", lambda batch: rollouts.append(sampled(batch)) or rollouts[-1])
    recorder, _ = fit(module, [batch], 1)
    prompts = [minibatch.batch.examples[0].prompt for minibatch in used]
    assert len(prompts) == recorder.reports[0]["policy/updates"] == 4
    assert sorted(prompts[:2]) == sorted(prompts[2:]) == ["2+2=", "Say a"]
    texts = {"Say a": rollouts[0].texts[:2], "2+2=": rollouts[0].texts[4:]}
    assert all(minibatch.rollout.texts == texts[prompt] for minibatch, prompt in zip(used, prompts, strict=True))


# the value head


def test_the_value_head_learns_the_returns(build: Build, batch: PromptBatch) -> None:
    """Every completion is paid 1, so that with trace 1 and no discount every token's return is 1."""
    module = build(
        advantage=ValueGAE(gae_lambda=1.0),
        rewards=[FunctionReward(one)],
        discriminator_updates=0,
        supervised=0.0,
        value=1.0,
        value_clip=1e9,
        generator_optimizer=lambda p: AdamW(p, lr=2e-2, weight_decay=0.0),
    )
    recorder, _ = fit(module, [batch], 40)
    first, last = recorder.reports[0], recorder.reports[-1]
    assert last["loss/value"] < 0.1 * first["loss/value"]
    assert last["value/mean"] == pytest.approx(1, abs=0.15)
    assert {"value/explained_variance", "policy/advantage_abs"} <= set(last)


def test_the_value_head_belongs_to_the_generator(build: Build, batch: PromptBatch, tmp_path: Path) -> None:
    """It is in the generator's optimizer, in its clipped gradient and in the checkpoint."""
    settings: dict[str, Any] = {"advantage": ValueGAE(), "max_grad_norm": 1e-3, "value": 1.0}
    settings |= {f"{p}_optimizer": lambda p: SGD(p, lr=1.0) for p in (GENERATOR, DISCRIMINATOR)}
    module = build(**settings)
    assert module.generator.value_head is not None and build().generator.value_head is None
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    _, runner = fit(module, [batch], 1)
    mine = [n for n in before if f".{GENERATOR}." in n or n.startswith("generator.value_head.")]
    steps = {n: p.detach() - before[n] for n, p in module.named_parameters() if n in mine}
    assert all(steps[f"generator.value_head.{n}"].abs().max() > 0 for n in ("weight", "bias"))
    assert math.sqrt(sum(step.square().sum().item() for step in steps.values())) == pytest.approx(1e-3, rel=1e-3)
    runner.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["generator.value_head.weight"], module.generator.value_head.weight)


def test_the_values_of_a_step_are_those_before_each_token_was_drawn(build: Build, batch: PromptBatch) -> None:
    """Row by row: the head on the state of the token before, so the first value belongs to the prompt's end."""
    module = build(advantage=ValueGAE())
    randomise(module.backbone)
    rollout = module.sample_rollout(batch)
    found = module.generator.values(module.backbone, rollout, batch, module.optimization)
    assert found is not None and not found.requires_grad and module.generator.value_head is not None
    for n, completion in enumerate(rollout.completion_ids):
        prompt = batch.prompt_ids[n // 2]
        with module.backbone.generator(), torch.no_grad():
            row = torch.cat([prompt, completion])[None]
            states = module.backbone.causal_lm.base_model(input_ids=row).last_hidden_state[0, len(prompt) - 1 : -1]
        wanted = module.generator.value_head(states)[:, 0]
        torch.testing.assert_close(found[n, : len(completion)], wanted, atol=1e-5, rtol=1e-4)


# a run with everything, resumed


def test_a_run_with_everything_is_resumed_as_if_it_had_not_stopped(
    build: Build, batch: PromptBatch, tmp_path: Path
) -> None:
    """Three steps, a checkpoint into a fresh module, and two more are bit-identical to five.

    Snapshot, replay, value head, coefficients, both optimizers and schedulers have to come back for that.
    """

    def halve(optimizer: torch.optim.Optimizer) -> StepLR:
        return StepLR(optimizer, step_size=2, gamma=0.5)

    def everything() -> LoraGANModule:
        return build(
            advantage=ValueGAE(),
            policy_loss=ClippedPPO(num_iterations=2, num_minibatches=2),
            adversarial_reward=WinRate(),
            objective=Combined([BradleyTerry(), Auxiliary("share_of_a")], [1.0, 0.5]),
            replay=Replay(capacity=4, per_step=2),
            adversarial=0.5,
            coupled=0.1,
            kl_penalty=0.1,
            kl=0.1,
            kl_reference="snapshot",
            entropy=0.01,
            discriminator_updates=2,
            generator_scheduler=halve,
            discriminator_scheduler=halve,
        )

    def callbacks() -> list[L.Callback]:
        return [Curriculum([Phase(1, {"kl": 0.2}, take_snapshot=True)])]

    whole_module = everything()
    whole, _ = fit(whole_module, [batch], 5, *callbacks())
    path = tmp_path / "three.ckpt"
    fit(everything(), [batch], 3, *callbacks())[1].save_checkpoint(path)
    module = everything()
    assert not module.backbone.has_snapshot
    resumed, runner = fit(module, [batch], 5, *callbacks(), ckpt_path=path)
    assert runner.global_step == 5 and module.backbone.has_snapshot
    assert resumed.reports == whole.reports[3:]
    assert resumed.rates == whole.rates[3:]
    assert set(whole.weights[-1]) == set(resumed.weights[-1])
    assert not moved(whole.weights[-1], resumed.weights[-1])
    assert whole_module.generator.value_head is not None and module.generator.value_head is not None
    assert torch.equal(whole_module.generator.value_head.weight, module.generator.value_head.weight)
    assert len(module.discriminator.replay.episodes) == 4
    early = tmp_path / "one.ckpt"
    fit(everything(), [batch], 1, *callbacks())[1].save_checkpoint(early)
    loader = DataLoader([batch], batch_size=None)  # type: ignore[arg-type, var-annotated]
    runner.validate(module, loader, ckpt_path=early, weights_only=True, verbose=False)
    assert not module.backbone.has_snapshot, "the best state of a run may be from before its snapshot"
    report = whole.reports[-1]
    assert {"reward/win_rate", "loss/coupled", "loss/value", "loss/kl", "loss/entropy", "policy/updates"} <= set(report)
    assert all(math.isfinite(value) for value in report.values())


def test_prompts_without_targets_are_scored_and_rewarded_but_not_imitated(
    build: Build, make_batch: Callable[..., PromptBatch]
) -> None:
    """One of three prompts has no target: two targets are scored, and the supervised loss is that of the two alone."""
    mixed = make_batch(("Say a", "a"), ("open?", ""), ("2+2=", "4"))
    assert mixed.with_target == [0, 2]
    module = build(rewards=[FunctionReward(share_of_a), LengthReward(1, 3)], replay=Replay(capacity=8))
    recorder, _ = fit(module, [mixed], 2)
    assert all(math.isfinite(value) for value in recorder.reports[-1].values())
    assert [len(e.completions) for e in module.discriminator.replay.episodes] == [2, 2, 2, 2]
    quiet: dict[str, Any] = {"policy": 0.0, "discriminator_updates": 0}
    alone, _ = fit(build(**quiet), [make_batch(("Say a", "a"), ("2+2=", "4"))], 1)
    together, _ = fit(build(**quiet), [mixed], 1)
    assert together.reports[0]["loss/supervised"] == pytest.approx(alone.reports[0]["loss/supervised"], rel=1e-5)
    without, _ = fit(build(discriminator_updates=0), [make_batch(("open?", ""), ("why?", ""))], 1)
    assert "loss/supervised" not in without.reports[0] and "loss/policy" in without.reports[0]


def test_a_step_that_samples_for_its_kl_term_needs_no_discriminator(build: Build, batch: PromptBatch) -> None:
    settings: dict[str, Any] = {"policy": 0.0, "kl": 0.1, "discriminator_updates": 0}
    recorder, _ = fit(build(advantage=PredictedReward(), **settings), [batch], 1)
    assert recorder.outputs[0].discriminator is None and "loss/kl" in recorder.reports[0]


def test_the_discriminator_regresses_the_weighted_sum_whatever_the_policy_is_rewarded_with(
    build: Build, batch: PromptBatch
) -> None:
    """The policy's reward has mean 0 in each prompt's group; the discriminator's label stays the sum itself."""
    module = build(
        aggregation=NormalizeThenSum(), rewards=[FunctionReward(length_of)], sampling=Sampling(max_new_tokens=9)
    )
    torch.manual_seed(8)
    rollout = module.sample_rollout(batch)
    scores = module.score(rollout, batch, with_targets=True)
    empty = Rollout.empty(module.device)
    shown = module.discriminator.make_batch(module.backbone.tokenizer, batch, rollout, empty, scores)
    lengths = torch.tensor([float(length_of(text, "")) for text in rollout.texts])
    assert torch.equal(shown.rewards["sampled"], lengths) and lengths.unique().numel() > 1
    returns = module.compute_rewards(rollout, scores, None, batch).returns
    torch.testing.assert_close(returns.view(3, 2).sum(1), torch.zeros(3), atol=1e-5, rtol=0)
    assert returns.abs().max() > 0.1
