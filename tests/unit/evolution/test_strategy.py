"""The evolution strategy: a generation by hand, invariants of its noise, and runs in a real trainer."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from lora_gan.errors import LoraGANError
from lora_gan.evolution import (
    ConstantSigma,
    DecayingSigma,
    EvolutionStrategy,
    FullNoise,
    Noise,
    RankOneNoise,
    Sigma,
    SuccessRule,
)
from lora_gan.evolution import tasks as evolution_tasks
from lora_gan.evolution.lowrank import Factors, Weights
from lora_gan.evolution.noise import Perturbed, shifted
from lora_gan.evolution.population import read_weights
from lora_gan.evolution.remote import to_bytes
from lora_gan.evolution.strategy import centred_ranks, gradient
from lora_gan.evolution.tasks import EvaluateTask
from lora_gan.rewards import FunctionReward
from lora_gan.types import PromptBatch
from tests.conftest import tiny
from tests.helpers.generations import adamw, graded, same
from tests.helpers.settings import grouped
from tests.helpers.steps import fit
from tests.unit.evolution.test_workers import BytesWorker

Build = Callable[..., EvolutionStrategy]


@pytest.fixture
def strategy(bases: dict[str, str]) -> Build:
    def build(**changed: Any) -> EvolutionStrategy:
        torch.manual_seed(4)
        settings = {**tiny(bases["gpt2"]), "population": 4, "rewards": [FunctionReward(graded)]}
        return EvolutionStrategy(**grouped({**settings, "discriminator_updates": 0, **changed}))

    return build


def one(a: float, b: float) -> Weights:
    return {"layer": Factors(torch.tensor([[a]]), torch.tensor([[b]]), 1.0)}


class Known(Noise):
    """ε of A is 1, 2, … in turn, ε of B is −1."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, mean: Weights, rng: torch.Generator) -> Weights:
        self.calls += 1
        return one(float((self.calls - 1) % 2 + 1), -1)


def test_a_generation_by_hand() -> None:
    """Mean (0, 0), σ = 0.5, ε = (1, −1) and (2, −1), fitness a: ±0.5 and ±1; ranks 1/6, −1/6, 1/2, −1/2."""
    members = Perturbed(one(0, 0), Known(), 0.5, 0, 0, range(4))
    fitness = torch.tensor([0.5, -0.5, 1.0, -1.0])
    g = gradient(members, fitness)["layer"]
    assert float(g.a) == pytest.approx((1 / 3 * 1 + 1 * 2) / (4 * 0.5))
    assert float(g.b) == pytest.approx((1 / 3 * -1 + 1 * -1) / (4 * 0.5))


def test_ranks_are_centred_and_ties_share() -> None:
    assert centred_ranks(torch.tensor([3.0, 1.0, 1.0, 9.0])).tolist() == pytest.approx([1 / 6, -1 / 3, -1 / 3, 1 / 2])
    assert centred_ranks(torch.zeros(4)).tolist() == [0.0] * 4


@pytest.mark.parametrize("noise", [FullNoise(), RankOneNoise()])
def test_members_are_symmetric_and_made_again_from_seeds(noise: Noise) -> None:
    mean = {"layer": Factors(torch.randn(2, 5), torch.randn(3, 2), 2.0)}
    first, again = (Perturbed(mean, noise, 0.1, 7, 3, range(6)) for _ in range(2))
    for pair in range(3):
        plus, minus = first[2 * pair]["layer"], first[2 * pair + 1]["layer"]
        torch.testing.assert_close((plus.a + minus.a) / 2, mean["layer"].a)
        torch.testing.assert_close((plus.b + minus.b) / 2, mean["layer"].b)
        if isinstance(noise, RankOneNoise):
            assert torch.linalg.matrix_rank(plus.delta - mean["layer"].delta, rtol=1e-4) == 1
        assert torch.equal(again[2:][2 * pair - 2]["layer"].a if pair else again[0]["layer"].a, plus.a)
    assert not torch.equal(first[0]["layer"].delta, first[2]["layer"].delta)


@pytest.mark.parametrize("shape", [(2, 5, 3), (4, 2, 3)])  # also with a rank above in or out
@pytest.mark.parametrize("free", [True, False])
def test_changes_of_rank_one_are_those_of_the_members(free: bool, shape: tuple[int, int, int]) -> None:
    """Also where B is 0, and 0 for the mean."""
    rank, inputs, outputs = shape
    mean = {n: Factors(torch.randn(rank, inputs), free * torch.randn(outputs, rank), 2.0) for n in ("one", "two")}
    members = Perturbed(mean, RankOneNoise(), 0.1, 7, 3, range(-1, 12))
    stacked = members.stacked()
    assert stacked.mean is mean
    for name, x in stacked.factors.items():
        assert x.a.shape == (13, 1, inputs) and x.b.shape == (13, outputs, 1)
        changes = x.scale * x.b @ x.a
        assert not changes[0].any()
        for member, change in zip(members, changes, strict=True):
            torch.testing.assert_close(member[name].delta - mean[name].delta, change, atol=1e-6, rtol=1e-4)
        part = members[3:5].stacked().factors[name]
        assert torch.equal(part.a, x.a[3:5]) and torch.equal(part.b, x.b[3:5])


@pytest.mark.parametrize("noise", [FullNoise(), RankOneNoise()])
def test_the_optimum_of_a_quadratic_is_reached(noise: Noise) -> None:
    mean, goal = {"layer": Factors(torch.zeros(2, 3), torch.ones(2, 2), 1.0)}, 0.7
    for generation in range(150):
        members = Perturbed(mean, noise, 0.1, 0, generation, range(32))
        fitness = [-sum(float((w - goal).square().sum()) for w in (m["layer"].a, m["layer"].b)) for m in members]
        mean = shifted(mean, gradient(members, torch.tensor(fitness)), 0.02)
    x = mean["layer"]
    assert max(float((w - goal).abs().max()) for w in (x.a, x.b)) < 0.15


def test_a_step_of_the_trainer_follows_the_gradient(strategy: Build, batch: PromptBatch) -> None:
    module = strategy(generator_optimizer=lambda p: SGD(p, lr=0.5), max_grad_norm=1e9)
    population = module.perturbed()
    recorder, trainer = fit(module, [batch], 1)
    module.generation = 0  # whose random numbers the completions had
    fitness = torch.tensor(module.evaluated(population, batch).fitness)
    (report,) = recorder.reports
    assert report["fitness/best"] == pytest.approx(float(fitness.max())) and len(set(fitness.tolist())) > 1
    moved, wanted = read_weights(module.backbone), shifted(population.mean, gradient(population, fitness), 0.5)
    for name, x in wanted.items():
        torch.testing.assert_close(moved[name].a, x.a)
        torch.testing.assert_close(moved[name].b, x.b)
    assert report["es/sigma"] == pytest.approx(0.02) and report["es/grad_norm"] > 0 and trainer.global_step == 1


def test_the_success_rule_by_hand() -> None:
    """Two of four members are fitter than 1.5 and one is equal: p = 5/8, and (5/8 − 1/5)/(1 − 1/5) = 17/32."""
    rule = SuccessRule(0.1, target=0.2, rate=0.5, least=0.05, most=0.4)
    fitness = torch.tensor([3.0, 1.5, 1.0, 2.0])
    assert rule.following(0.1, fitness, 1.5) == pytest.approx(0.1 * math.exp(0.5 * 17 / 32))
    assert rule.following(0.1, fitness, 9.0) == pytest.approx(0.1 * math.exp(-0.5 / 4))
    assert rule.following(0.39, fitness, 0.0) == 0.4 and rule.following(0.051, fitness, 9.0) == 0.05


@pytest.mark.parametrize("sigma", [0.02, 20.0])
def test_the_success_rule_finds_the_size_of_the_noise(sigma: float) -> None:
    """The fitness −‖w − goal‖² of 10 weights at a distance of 14.6.

    w + σ·ε is fitter if 2σ·14.6·z > σ²·‖ε‖², z normal and ‖ε‖² about 10; with a probability of 0.2 (z > 0.842) if σ is
    2 · 14.6 · 0.842 / 10 = 2.46.
    """
    mean, goal = {"layer": Factors(torch.zeros(2, 3), torch.ones(2, 2), 1.0)}, 5.0
    rule, found = SuccessRule(sigma, most=20.0), []
    for generation in range(90):
        members = Perturbed(mean, FullNoise(), sigma, 0, generation, range(-1, 32))
        errors = [[(w - goal).square().sum() for w in (x["layer"].a, x["layer"].b)] for x in members]
        of_mean, *fitness = (-float(sum(error)) for error in errors)
        sigma = rule.following(sigma, torch.tensor(fitness), of_mean)
        found.append(math.log(sigma))
    assert members[0] is mean and math.exp(sum(found[-40:]) / 40) == pytest.approx(2.46, rel=0.15)


def test_the_mean_is_evaluated_beside_its_members(strategy: Build, batch: PromptBatch) -> None:
    """Its fitness decides the next σ, and the step is the one without it."""
    steps = []
    for sigma in (None, SuccessRule(0.02)):
        module = strategy(sigma=sigma)
        mean = read_weights(module.backbone)
        recorder, _ = fit(module, [batch], 1)
        steps.append((read_weights(module.backbone), recorder.reports[0]))
    assert module.sigma != 0.02
    module.generation = 0  # whose random numbers the completions had
    (of_mean,) = module.evaluated([mean], batch).fitness
    (plain, _), (moved, report) = steps
    assert report["fitness/of_mean"] == pytest.approx(of_mean)
    for name, x in plain.items():
        torch.testing.assert_close(moved[name].a, x.a)
        torch.testing.assert_close(moved[name].b, x.b)


@pytest.mark.parametrize(("refinement_steps", "sigma"), [(0, DecayingSigma(0.05, 0.5)), (2, SuccessRule(0.05))])
def test_a_resumed_run_equals_an_uninterrupted_one(
    strategy: Build, batch: PromptBatch, tmp_path: Path, refinement_steps: int, sigma: Sigma
) -> None:
    def build(**changed: Any) -> EvolutionStrategy:
        kept = {"sigma": sigma, "refinement_steps": refinement_steps, "members_at_once": 3}
        return strategy(**kept, generator_scheduler=lambda o: StepLR(o, 1, 0.9), **changed)

    whole, _ = fit(build(), [batch], 3)
    _, trainer = fit(build(), [batch], 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    rest, _ = fit(build(), [batch], 3, ckpt_path=str(tmp_path / "one.ckpt"))
    assert rest.reports == whole.reports[1:] and rest.rates == whole.rates[1:]
    same(rest.weights, whole.weights[1:])


@pytest.mark.parametrize(
    "changed", [{"population": 6}, {"sigma": ConstantSigma(0.1)}, {"noise": RankOneNoise()}, {"evolution_seed": 1}]
)
def test_another_search_does_not_go_on_from_a_checkpoint(
    changed: dict[str, Any], strategy: Build, batch: PromptBatch, tmp_path: Path
) -> None:
    _, trainer = fit(strategy(), [batch], 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    there = r"population 4, sigma 0\.02 \(ConstantSigma\), noise FullNoise, evolution_seed 0"
    with pytest.raises(LoraGANError, match=f"the search of the checkpoint has {there}, here it is "):
        fit(strategy(**changed), [batch], 2, ckpt_path=str(tmp_path / "one.ckpt"))


def test_members_are_made_in_waves(strategy: Build, batch: PromptBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of factors alive does not grow with the population."""
    most: list[int] = []
    sample_population = evolution_tasks.sample_population

    def counted(*given: Any) -> Any:
        most.append(sum(isinstance(x, Factors) for x in gc.get_objects()))
        return sample_population(*given)

    monkeypatch.setattr(evolution_tasks, "sample_population", counted)
    found = []
    for population in (4, 12):
        module = strategy(population=population, members_at_once=2)
        gc.collect()
        most.clear()
        before = sum(isinstance(x, Factors) for x in gc.get_objects())
        fit(module, [batch], 1)
        assert len(most) == population // 2
        found.append(max(most) - before)
    assert found[0] == found[1] > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"population": 3}, "must be even and at least 2.*got 3"),
        ({"population": 0}, "must be even and at least 2.*got 0"),
        ({"refinement_steps": -1}, "refinement_steps"),
        ({"members_at_once": 0}, "members_at_once"),
    ],
)
def test_invalid_settings(strategy: Build, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraGANError, match=message):
        strategy(**changed)


@pytest.mark.parametrize("noise", [FullNoise(), RankOneNoise()])
def test_a_remote_worker_makes_the_same_members_from_seeds(noise: Noise, strategy: Build, batch: PromptBatch) -> None:
    here, there = (
        fit(strategy(noise=noise, generator_optimizer=adamw, discriminator_optimizer=adamw, **workers), [batch], 2)[0]
        for workers in ({}, {"workers": BytesWorker()})
    )
    assert here.reports == there.reports
    same(here.weights, there.weights)


def test_a_task_holds_the_mean_whatever_the_number_of_members(strategy: Build, batch: PromptBatch) -> None:
    """A worker gets the mean and seeds; twelve members' weights would be more than ten times as many bytes."""
    module = strategy()
    mean = read_weights(module.backbone)
    few, many = (Perturbed(mean, FullNoise(), 0.1, 0, 0, range(count)) for count in (2, 12))
    uniform = torch.zeros(len(batch), 4, 1)
    sizes = [
        len(to_bytes(EvaluateTask(members, batch, 1, module.sampling, uniform)))
        for members in (few, many, [many[i] for i in range(12)])
    ]
    weights = sum(w.nbytes for x in mean.values() for w in (x.a, x.b))
    assert sizes[0] == sizes[1] < sizes[2] - 10 * weights


@pytest.mark.parametrize(
    "changed", [{"target": 0.0}, {"target": 1.0}, {"rate": 0.0}, {"least": 0.03}, {"most": 0.01}, {"sigma": math.nan}]
)
def test_invalid_success_rules(changed: dict[str, float]) -> None:
    with pytest.raises(LoraGANError, match=r"need target in|finite number > 0"):
        SuccessRule(**changed)
