"""Operators: their effect on ΔW, by hand and by invariants."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from lora_gan.errors import LoraGANError
from lora_gan.evolution.lowrank import Factors, Weights, inner, lost, mix, norm, singular, singulars, total
from lora_gan.evolution.operators import (
    Crossover,
    ElementWise,
    FixedNoise,
    FromStart,
    GaussianMutation,
    MergeCoefficients,
    MixUpdates,
    Mutation,
    RankOneMutation,
    ScaledMutation,
    SingularValueMutation,
    SwapModules,
)
from lora_gan.evolution.selection import FitnessProportional, Selection, Tournament, Truncation, ranking
from tests.helpers.generations import distance, rms

SCALED: list[type[ScaledMutation]] = [GaussianMutation, RankOneMutation, SingularValueMutation]
CROSSOVERS: list[Crossover] = [SwapModules(), MixUpdates(), MergeCoefficients(), ElementWise()]
MUTATIONS: list[Mutation] = [*(make(0.01) for make in SCALED), FixedNoise()]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_factors(out: int, into: int, rank: int = 2, seed: int = 0) -> Factors:
    draw = rng(seed)
    return Factors(torch.randn(rank, into, generator=draw), torch.randn(out, rank, generator=draw), 2.0)


def member(seed: int, rank: int = 2) -> Weights:
    shapes = {"one": (5, 7), "two": (6, 4), "three": (8, 8), "four": (3, 9)}
    return {name: random_factors(*shape, rank, 10 * seed + i) for i, (name, shape) in enumerate(shapes.items())}


def moved(x: Factors, y: Factors) -> float:
    """Root mean square of ΔW_y − ΔW_x, by forming both."""
    return float((y.delta - x.delta).square().mean().sqrt())


# algebra


def test_norms_by_hand() -> None:
    x = Factors(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0]]), 2.0)  # ΔW = [[6, 8], [12, 16]]
    y = Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]]), 1.0)
    assert x.delta.tolist() == [[6, 8], [12, 16]]
    assert inner(x, y) == 6
    assert norm(x) == pytest.approx(math.sqrt(36 + 64 + 144 + 256))
    assert rms({"x": x}) == pytest.approx(math.sqrt(500 / 4))
    assert distance({"m": x}, {"m": y}) == pytest.approx(math.sqrt((25 + 64 + 144 + 256) / 4))


def test_singular_values_are_those_of_the_product() -> None:
    x = random_factors(5, 7, rank=3)
    found = singular(x)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(x.delta.double())[:3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.factors(x).delta, x.delta, rtol=1e-4, atol=1e-5)


def test_mixing_is_exact_if_the_rank_suffices() -> None:
    x, y = random_factors(6, 9, rank=4), random_factors(6, 9, rank=4, seed=1)
    thin = [Factors(f.a * (torch.arange(4) < 2)[:, None], f.b, f.scale) for f in (x, y)]  # rank 2 each, capacity for 4
    wanted = 0.3 * thin[0].delta - 1.2 * thin[1].delta
    mixed = mix([{"m": f} for f in thin], [0.3, -1.2], most_lost=1e-6)["m"]
    torch.testing.assert_close(mixed.delta, wanted, rtol=1e-4, atol=1e-5)


def test_mixing_is_the_best_approximation_otherwise() -> None:
    x, y = random_factors(6, 9), random_factors(6, 9, seed=1)
    wanted = 0.5 * x.delta + 0.5 * y.delta
    u, s, vh = torch.linalg.svd(wanted)
    best = u[:, :2] * s[:2] @ vh[:2]
    torch.testing.assert_close(mix([{"m": x}, {"m": y}], [0.5, 0.5])["m"].delta, best, rtol=1e-4, atol=1e-4)
    share = lost(singular(total([x, y], [0.5, 0.5])), 2)
    assert float(share) == pytest.approx(float((wanted - best).norm() / wanted.norm()), rel=1e-3)


def test_modules_of_one_shape_are_decomposed_together_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"a": (5, 7), "b": (6, 4), "c": (5, 7), "d": (7, 5), "e": (6, 4)}
    weights = {name: random_factors(*shape, rank=3, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    weights["e"] = replace(weights["e"], scale=0.5)
    alone = {name: singular(x) for name, x in weights.items()}
    sizes = []
    qr = torch.linalg.qr
    monkeypatch.setattr("torch.linalg.qr", lambda x: sizes.append(len(x)) or qr(x))
    together = singulars(weights)
    assert sizes == [2, 2, 2, 2, 1, 1] and list(together) == list(shapes)
    for name, found in together.items():
        for part, wanted in zip(vars(found).values(), vars(alone[name]).values(), strict=True):
            torch.testing.assert_close(part, wanted, atol=1e-10, rtol=0)


def test_a_mixture_of_zero_updates_can_still_learn() -> None:
    """If B is 0, as at initialisation, the factors of ΔW = 0 must not both be 0, or no gradient would flow."""
    x = Factors(torch.randn(2, 4, generator=rng()), torch.zeros(3, 2), 1.0)
    mixed = mix([{"m": x}, {"m": x}], [0.5, 0.5])["m"]
    assert not mixed.b.any()
    torch.testing.assert_close(mixed.a @ mixed.a.T, torch.eye(2))


# mutation


@pytest.mark.parametrize("make", SCALED)
def test_every_module_changes_by_the_target(make: type[ScaledMutation]) -> None:
    parent = member(0)
    for seed in range(4):
        for child in make(0.02)(parent, parent, 0, rng(seed)):
            for name, x in child.items():
                assert moved(parent[name], x) == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("make", SCALED)
def test_the_mutation_size_decays(make: type[ScaledMutation]) -> None:
    parent = member(0)
    (child, *_) = make(0.02, decay=0.5)(parent, parent, 3, rng())
    assert distance(parent, child) == pytest.approx(0.0025, rel=1e-3)


@pytest.mark.parametrize("make", SCALED)
def test_a_mutation_of_size_zero_changes_nothing(make: type[ScaledMutation]) -> None:
    parent = member(0)
    for child in make(0.0)(parent, parent, 0, rng()):
        assert all(child[name] is x for name, x in parent.items())


def test_a_fresh_adapter_is_mutated_too() -> None:
    fresh = {name: Factors(x.a, torch.zeros_like(x.b), x.scale) for name, x in member(0).items()}
    for mutate in (GaussianMutation(0.01), RankOneMutation(0.01)):
        for seed in range(4):
            child = mutate(fresh, fresh, 0, rng(seed))[0]
            assert distance(fresh, child) == pytest.approx(0.01, rel=1e-3)


def test_antithetic_children_are_opposites_of_rank_one() -> None:
    parent = member(0)
    plus, minus = RankOneMutation(0.05)(parent, parent, 0, rng())
    for name, x in parent.items():
        step, back = plus[name].delta - x.delta, minus[name].delta - x.delta
        torch.testing.assert_close(step, -back, rtol=1e-3, atol=1e-5)
        values = torch.linalg.svdvals(step)
        assert values[1] < 1e-4 * values[0]


def test_random_search_ignores_the_parent() -> None:
    parent, start = member(0), member(1)
    (child,) = FromStart(GaussianMutation(0.05))(parent, start, 3, rng())
    assert distance(child, start) == pytest.approx(0.05, rel=1e-3)
    (other,) = FromStart(GaussianMutation(0.05))(member(2), start, 3, rng())
    assert distance(child, other) == pytest.approx(0.0, abs=1e-7)


def test_singular_vectors_are_kept() -> None:
    x = {"one": random_factors(5, 7)}
    (child,) = SingularValueMutation(0.1)(x, x, 0, rng())
    before, after = singular(x["one"]), singular(child["one"])
    overlap = (before.u.T @ after.u).abs()
    torch.testing.assert_close(overlap.amax(1), torch.ones(2, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_the_anchor_pulls_back_to_the_start() -> None:
    parent, start = member(0), member(1)
    far = distance(parent, start)
    (home,) = GaussianMutation(0.0, anchor=1.0)(parent, start, 0, rng())
    (near,) = GaussianMutation(0.0, anchor=0.5)(parent, start, 0, rng())
    assert distance(home, start) < 1e-4 * far
    assert distance(near, start) < far


def test_fixed_noise_moves_the_factors() -> None:
    parent = {"one": random_factors(200, 300, rank=8)}
    (child,) = FixedNoise(0.02)(parent, parent, 0, rng())
    assert float((child["one"].a - parent["one"].a).std()) == pytest.approx(0.02, rel=0.05)
    assert float((child["one"].b - parent["one"].b).std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_mutation_keeps_the_parent_and_is_seeded(mutate: Mutation) -> None:
    parent, untouched = member(0), member(0)
    first, second = (mutate(parent, parent, 0, rng(3)) for _ in range(2))
    other = mutate(parent, parent, 0, rng(4))
    for name, x in parent.items():
        assert torch.equal(x.a, untouched[name].a) and torch.equal(x.b, untouched[name].b)
        assert torch.equal(first[0][name].b, second[0][name].b) and torch.equal(first[0][name].a, second[0][name].a)
    assert distance(first[0], other[0]) > 0


# crossover


def test_swapping_keeps_every_product() -> None:
    mother, father = member(0), member(1)
    child = SwapModules()([mother, father], rng())
    from_mother = [child[name] is mother[name] for name in child]
    assert any(from_mother) and not all(from_mother)
    assert all(child[name] is mother[name] or child[name] is father[name] for name in child)


def test_element_wise_crossover_breaks_the_products() -> None:
    mother, father = member(0), member(1)
    child = ElementWise()([mother, father], rng())
    for name, x in child.items():
        assert ((x.a == mother[name].a) | (x.a == father[name].a)).all()
        for parent in (mother, father):
            assert moved(parent[name], x) > 0.5 * moved(mother[name], father[name])
        assert not torch.isclose(x.delta, mother[name].delta).all()


def test_mixing_lies_between_the_parents() -> None:
    mother = member(0)
    father = {name: Factors(x.a, -x.b, x.scale) for name, x in mother.items()}  # ΔW′ = −ΔW: any mixture fits the rank
    child = MixUpdates(most_lost=0.0)([mother, father], rng())
    w = float(torch.rand(1, generator=rng()))
    for name, x in child.items():
        torch.testing.assert_close(x.delta, (2 * w - 1) * mother[name].delta, rtol=1e-3, atol=1e-5)


def test_merging_draws_coefficients_within_the_bound() -> None:
    parents = [member(0) for _ in range(3)]
    factors = []
    for seed in range(40):
        child = MergeCoefficients(bound=1.5, parents=3)(parents, rng(seed))
        first = parents[0]["one"]
        factors.append(float(inner(child["one"], first) / inner(first, first)))
    assert max(map(abs, factors)) <= 4.5 and min(factors) < 0 < max(factors)


def test_too_little_rank_is_an_error() -> None:
    with pytest.raises(LoraGANError, match=r"more rank than the 2.*raise generator.lora.rank"):
        MixUpdates(most_lost=0.01)([member(0), member(1)], rng())


@pytest.mark.parametrize("cross", CROSSOVERS)
def test_crossover_is_seeded_and_keeps_rank_and_scale(cross: Crossover) -> None:
    parents = [member(seed) for seed in range(cross.parents)]
    first, second = (cross(parents, rng(2)) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x.a, second[name].a) and torch.equal(x.b, second[name].b)
        assert x.a.shape == parents[0][name].a.shape and x.b.shape == parents[0][name].b.shape
        assert x.scale == parents[0][name].scale and x.a.dtype == torch.float32


# selection


def test_ranking_is_stable() -> None:
    assert ranking(torch.tensor([1.0, 3.0, 2.0, 3.0])) == [1, 3, 2, 0]


def test_tournaments_by_hand() -> None:
    fitness = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert Tournament(4)(fitness, 5, rng()) == [1] * 5, "the best of all always wins"
    counts = Counter(Tournament(2)(fitness, 6000, rng()))  # of 6 pairs the best wins 3, the second 2, the third 1
    assert counts[0] == 0
    assert [counts[i] / 1000 for i in (1, 3, 2)] == pytest.approx([3, 2, 1], abs=0.15)
    assert set(Tournament(1)(fitness, 100, rng())) == {0, 1, 2, 3}
    assert Tournament(9)(fitness, 1, rng()) == [1]


def test_truncation_by_hand() -> None:
    fitness = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert set(Truncation(0.5)(fitness, 100, rng())) == {1, 3}
    assert set(Truncation(0.1)(fitness, 10, rng())) == {1}


def test_fitness_proportional_by_hand() -> None:
    fitness = torch.tensor([-1.0, 0.0, 2.0])  # 0, 1, 3 above the worst
    probabilities = FitnessProportional(floor=0.0).probabilities(fitness)
    assert probabilities.tolist() == pytest.approx([0, 0.25, 0.75])
    assert FitnessProportional(0.5).probabilities(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([1 / 3, 2 / 3])
    assert FitnessProportional().probabilities(torch.zeros(4)).tolist() == [0.25] * 4


@pytest.mark.parametrize("select", [Tournament(), Truncation(), FitnessProportional()])
def test_selection_is_seeded(select: Selection) -> None:
    fitness = torch.rand(8, generator=rng())
    assert select(fitness, 6, rng(1)) == select(fitness, 6, rng(1))
    assert len(select(fitness, 6, rng(1))) == 6


def test_invalid_settings() -> None:
    for wrong in (
        lambda: Tournament(0),
        lambda: Truncation(0.0),
        lambda: FitnessProportional(2.0),
        lambda: GaussianMutation(-1.0),
        lambda: GaussianMutation(decay=0.0),
        lambda: GaussianMutation(anchor=2.0),
        lambda: SwapModules(2.0),
        lambda: MixUpdates(-1.0),
        lambda: MergeCoefficients(bound=0.0),
        lambda: MergeCoefficients(parents=1),
    ):
        with pytest.raises(LoraGANError, match="got"):
            wrong()
