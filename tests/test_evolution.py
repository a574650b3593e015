"""Generations in a real trainer: the limits in which evolution is something simpler, and what must never happen."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import tiny
from generations import distance, graded
from rounds import fit
from torch.optim.lr_scheduler import StepLR

from lora_gan.adapters import save_adapter
from lora_gan.advantages import MovingAverage
from lora_gan.backbone import GENERATOR, Backbone, LoraSettings
from lora_gan.callbacks import MovingAverageBaseline
from lora_gan.errors import LoraGANError
from lora_gan.evolution import (
    EvolutionModule,
    GaussianMutation,
    MixUpdates,
    RankOneMutation,
    SavedAdapters,
    SupervisedStart,
)
from lora_gan.evolution.lowrank import Weights, distances
from lora_gan.evolution.members import Errand, MemberModule
from lora_gan.evolution.population import (
    Member,
    diversity,
    read_weights,
    survival,
    write_weights,
)
from lora_gan.evolution.workers import Done, Here, Workers
from lora_gan.losses import ClippedPPO
from lora_gan.module import LoraGANModule
from lora_gan.replay import Replay
from lora_gan.rewards import FunctionReward
from lora_gan.sampling import Sampling
from lora_gan.types import PromptBatch, Rollout

Evolve = Callable[..., EvolutionModule]
GREEDY = Sampling(max_new_tokens=5, do_sample=False)


@pytest.fixture
def settings(bases: dict[str, str]) -> dict[str, Any]:
    return {**tiny(bases["gpt2"]), "discriminator_updates": 0}


@pytest.fixture
def evolve(settings: dict[str, Any]) -> Evolve:
    def build(**changed: Any) -> EvolutionModule:
        torch.manual_seed(4)
        sizes = {"population": 4, "elites": 1, "refined": 0, "mutation": GaussianMutation(0.03)}
        sizes["rewards"] = [FunctionReward(graded)]
        return EvolutionModule(**{**settings, **sizes, **changed})

    return build


class Watch(L.Callback):
    """Keeps the population with which each generation began."""

    def __init__(self) -> None:
        self.populations: list[list[Member]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.populations.append(list(pl_module.population))


def same(x: Weights, y: Weights) -> bool:
    return all(torch.equal(x[name].a, y[name].a) and torch.equal(x[name].b, y[name].b) for name in x)


# limits


@pytest.mark.parametrize("judged", [False, True])
def test_a_population_of_one_is_the_plain_run(settings: dict[str, Any], batch: PromptBatch, judged: bool) -> None:
    """Bit for bit: weights of both players, learning rates, and what every round reports."""
    changed: dict[str, Any] = {"generator_scheduler": lambda optimizer: StepLR(optimizer, 2, 0.5)}
    if judged:
        changed |= {"advantage": MovingAverage(), "policy_loss": ClippedPPO(epochs=2), "discriminator_updates": 1}
        changed |= {"adversarial_weight": 0.5}
    batches = [batch.of([0, 1]), batch.of([1, 2]), batch.of([2, 0])]
    torch.manual_seed(4)
    plain, _ = fit(LoraGANModule(**{**settings, **changed}), batches, 5, MovingAverageBaseline())
    torch.manual_seed(4)
    alone = EvolutionModule(population=1, elites=0, refined=1, **{**settings, **changed})
    evolved, _ = fit(alone, batches, 5, MovingAverageBaseline())
    assert evolved.rates == plain.rates and len({tuple(rates) for rates in plain.rates}) > 1
    for mine, wanted in zip(evolved.weights, plain.weights, strict=True):
        assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    for mine, told in zip(evolved.reports, plain.reports, strict=True):
        assert {name: mine[name] for name in told} == told


def test_rounds_of_a_refinement_share_out_the_prompts(
    settings: dict[str, Any], batch: PromptBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[list[str]] = []
    play = EvolutionModule.play

    def watched(module: EvolutionModule, prompts: PromptBatch) -> Rollout:
        played.append([example.prompt for example in prompts.examples])
        return play(module, prompts)

    monkeypatch.setattr(EvolutionModule, "play", watched)
    module = EvolutionModule(population=2, elites=0, refined=2, refinement_rounds=2, **settings)
    _, trainer = fit(module, [batch], 2)
    first, second, third = (example.prompt for example in batch.examples)
    assert played == [[first, second], [third]] * 4
    assert trainer.global_step == 2, "generations count, not rounds"


def test_without_mutation_elites_never_lose_the_best(evolve: Evolve, batch: PromptBatch) -> None:
    module = evolve(mutation=GaussianMutation(0.0), crossover=MixUpdates(), evaluation=GREEDY, start=Scattered())
    recorder, _ = fit(module, [batch], 5)
    best = [report["fitness/best"] for report in recorder.reports]
    assert best == sorted(best)
    assert max(best) > recorder.reports[0]["fitness/worst"], "the first members should differ"


def test_with_mutation_elites_never_lose_the_best_either(evolve: Evolve, batch: PromptBatch) -> None:
    """Where fitness is a function of the weights, as on one batch with greedy answers; and here evolution gets on."""
    recorder, _ = fit(evolve(population=8, evaluation=GREEDY), [batch], 12)
    best = [report["fitness/best"] for report in recorder.reports]
    assert best == sorted(best) and best[-1] > best[0]


class Scattered(SavedAdapters):
    """Very different members, without files."""

    def __init__(self) -> None:
        pass

    def __call__(self, backbone: Backbone, batches: Any, count: int) -> list[Weights]:
        own, members = read_weights(backbone), []
        for seed in range(count):
            rng = torch.Generator().manual_seed(seed)
            members += GaussianMutation(0.3)(own, own, 0, rng)
        return members


# generations


def test_a_generation_has_elites_refined_members_and_offspring(evolve: Evolve, batch: PromptBatch) -> None:
    watch = Watch()
    module = evolve(population=6, elites=2, refined=2, mutation=RankOneMutation(0.02), crossover_rate=0.5)
    recorder, _ = fit(module, [batch], 3, watch)
    first, second = watch.populations[1], watch.populations[2]
    assert [member.born for member in watch.populations[0]] == ["start"] * 6
    assert [member.born for member in first[2:4]] == ["refined"] * 2
    assert {member.born for member in first[4:]} <= {"mutated", "crossed"}
    assert [member.age for member in first] == [1, 1, 0, 0, 0, 0]
    assert len({member.number for population in watch.populations for member in population}) >= 6 + 2 * 4
    for population, before in ((first, watch.populations[0]), (second, first)):
        known = {member.number for member in before}
        assert all(set(member.parents) <= known for member in population if not member.age)
        elite = population[0]
        assert same(elite.weights, next(m.weights for m in before if m.number == elite.number))
    assert same(read_weights(module.backbone), module.population[0].weights), "the best stands in the backbone"
    report = recorder.reports[2]
    assert report["fitness/worst"] <= report["fitness/mean"] <= report["fitness/best"]
    assert report["population/diversity"] > 0
    assert {"fitness/elites", "survival/refined", "survival/elite", "reward/total"} <= set(report)


def test_a_refined_member_keeps_its_own_optimizer(evolve: Evolve, batch: PromptBatch) -> None:
    watch = Watch()
    module = evolve(population=3, elites=0, refined=3)
    fit(module, [batch], 3, watch)
    for generation, population in enumerate([*watch.populations, module.population]):
        for member in population:
            state = dict(member.learning).get("optimizer", {"state": {}})["state"]
            assert {float(s["step"]) for s in state.values()} == ({float(generation)} if generation else set())
    moments = [next(iter(member.learning["optimizer"]["state"].values()))["exp_avg"] for member in module.population]
    assert not torch.equal(moments[0], moments[1])


def test_a_refined_elite_leaves_the_elite_as_it_was(evolve: Evolve, batch: PromptBatch) -> None:
    module = evolve(population=2, elites=1, refined=1)
    watch = Watch()
    fit(module, [batch], 4, watch)
    for population in watch.populations[1:]:
        elite, refined = population
        assert distance(elite.weights, refined.weights) > 0
        steps = [
            {float(s["step"]) for s in dict(m.learning).get("optimizer", {"state": {}})["state"].values()}
            for m in (elite, refined)
        ]
        assert next(iter(steps[1])) == next(iter(steps[0]), 0) + 1 or elite.number not in refined.parents


def test_elites_are_scored_again_on_fresh_prompts(evolve: Evolve, batch: PromptBatch) -> None:
    watch = Watch()
    module = evolve(population=3, evaluation=GREEDY, mutation=GaussianMutation(0.0), start=Scattered())
    fit(module, [batch.of([0]), batch.of([1]), batch.of([2])], 3, watch)
    scores = [population[0].fitness for population in (*watch.populations[1:], module.population)]
    assert len(set(scores)) > 1


def test_the_discriminator_may_be_paid_for_in_refinement(evolve: Evolve, batch: PromptBatch) -> None:
    module = evolve(refined=1, discriminator_updates=1, adversarial_weight=0.5)
    recorder, _ = fit(module, [batch], 2)
    assert "loss/discriminator" in recorder.reports[-1]


class Backwards(Workers):
    """The last errand first."""

    def run(self, module: MemberModule, errands: Sequence[Errand[Done]]) -> list[Done]:
        return [errand(module) for errand in reversed(errands)][::-1]


def test_the_order_of_errands_does_not_matter(evolve: Evolve, batch: PromptBatch) -> None:
    """Each member is refined beside the discriminator of the generation's begin, by random numbers of its own."""
    found = []
    for workers in (Here(), Backwards()):
        module = evolve(
            elites=1,
            refined=3,
            refinement_rounds=2,
            members_at_once=3,
            workers=workers,
            advantage=MovingAverage(),
            discriminator_updates=1,
            adversarial_weight=0.5,
            replay=Replay(4, 2),
            discriminator_scheduler=lambda o: StepLR(o, 1, 0.9),
        )
        recorder, _ = fit(module, [batch], 3, MovingAverageBaseline())
        found.append((module, recorder))
    (here, told_here), (backwards, told_backwards) = found
    assert told_here.reports == told_backwards.reports and "loss/discriminator" in told_here.reports[-1]
    assert told_here.rates == told_backwards.rates
    assert all(same(x.weights, y.weights) for x, y in zip(here.population, backwards.population, strict=True))
    for mine, wanted in zip(told_here.weights, told_backwards.weights, strict=True):
        assert all(torch.equal(mine[name], wanted[name]) for name in wanted)


def test_members_that_answer_by_twos_are_worth_the_same(evolve: Evolve, batch: PromptBatch) -> None:
    together, _ = fit(evolve(evaluation=GREEDY), [batch], 3)
    by_twos, _ = fit(evolve(evaluation=GREEDY, members_at_once=2), [batch], 3)
    assert [r["fitness/best"] for r in by_twos.reports] == pytest.approx([r["fitness/best"] for r in together.reports])


# resume


def test_a_resumed_run_is_the_run(evolve: Evolve, batch: PromptBatch, tmp_path: Path) -> None:
    def module() -> EvolutionModule:
        return evolve(
            refined=1, mutation=GaussianMutation(0.02, anchor=0.1), generator_scheduler=lambda o: StepLR(o, 1, 0.9)
        )

    through = module()
    whole, _ = fit(through, [batch], 4, Watch())
    _, trainer = fit(module(), [batch], 2, Watch())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    torch.load(tmp_path / "two.ckpt", weights_only=True)
    resumed = module()
    rest, trainer = fit(resumed, [batch], 4, Watch(), ckpt_path=str(tmp_path / "two.ckpt"))
    assert rest.reports == whole.reports[2:]
    assert [m.number for m in resumed.population] == [m.number for m in through.population]
    assert all(same(x.weights, y.weights) for x, y in zip(resumed.population, through.population, strict=True))
    assert trainer.global_step == 4


def test_checkpoints_of_something_else_are_refused(
    evolve: Evolve, settings: dict[str, Any], batch: PromptBatch, tmp_path: Path
) -> None:
    path = str(tmp_path / "it.ckpt")
    _, trainer = fit(evolve(), [batch], 1)
    trainer.save_checkpoint(path)
    with pytest.raises(LoraGANError, match="population: 4 in the checkpoint, 5 here"):
        fit(evolve(population=5), [batch], 2, ckpt_path=path)
    _, trainer = fit(LoraGANModule(**settings), [batch], 1)
    trainer.save_checkpoint(path)
    with pytest.raises(LoraGANError, match="holds no population; begin with its adapter"):
        fit(evolve(), [batch], 2, ckpt_path=path)


# starts


def test_a_supervised_start_branches_off_a_trunk(evolve: Evolve, batch: PromptBatch) -> None:
    module = evolve(start=SupervisedStart(trunk=6, branch=2, prompts=1))
    watch = Watch()
    fit(module, [batch.of([0, 1]), batch.of([2])], 1, watch)
    members = [member.weights for member in watch.populations[0]]
    assert len(members) == 4
    between = distances(members)[0, 1:]
    trunk = distance(read_weights(evolve().backbone), members[0])
    assert (between > 0).all() and float(between.max()) < trunk
    with pytest.raises(LoraGANError, match="no prompt of the training data has a target"):
        SupervisedStart()(module.backbone, [PromptBatch.empty()], 2)


def test_members_start_from_adapters(
    evolve: Evolve, make_backbone: Callable[..., Backbone], batch: PromptBatch, tmp_path: Path, bases: dict[str, str]
) -> None:
    folders = [str(tmp_path / name) for name in ("one", "two")]
    weights = []
    for seed, folder in enumerate(folders):
        backbone = make_backbone()
        write_weights(
            backbone, GaussianMutation(0.1)(read_weights(backbone), {}, 0, torch.Generator().manual_seed(seed))[0]
        )
        save_adapter(backbone, GENERATOR, Path(folder))
        weights.append(read_weights(backbone))
    watch = Watch()
    fit(evolve(start=SavedAdapters(folders)), [batch], 1, watch)
    members = [member.weights for member in watch.populations[0]]
    assert same(members[0], weights[0]) and same(members[1], weights[1])
    assert distance(members[2], weights[0]) == pytest.approx(0.03, rel=1e-3), "the others are mutations, by turns"
    assert distance(members[3], weights[1]) == pytest.approx(0.03, rel=1e-3)

    other = Backbone(bases["gpt2"], LoraSettings(8, 16), LoraSettings(2, 4))
    for backbone, told in ((make_backbone("llama"), r"trained on the base '\S*gpt2"), (other, "has rank 4, and")):
        with pytest.raises(LoraGANError, match=told):
            SavedAdapters(folders)(backbone, [], 4)
    with pytest.raises(LoraGANError, match="holds no adapter"):
        SavedAdapters([str(tmp_path)])(other, [], 4)
    with pytest.raises(LoraGANError, match="do not fit into a population of 1"):
        SavedAdapters(folders)(other, [], 1)


# measures and settings


def test_distances_agree_with_differences(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone()
    own = read_weights(backbone)
    members = [GaussianMutation(0.01 * (i + 1))(own, own, 0, torch.Generator().manual_seed(i))[0] for i in range(3)]
    found = distances(members)
    for i, x in enumerate(members):
        for j, y in enumerate(members):
            assert float(found[i, j]) == pytest.approx(distance(x, y), rel=1e-4, abs=1e-7)
    assert diversity([Member(m) for m in members]) == pytest.approx(float(found.sum()) / 6)
    assert diversity([Member(own)]) == 0


def test_survival_by_hand() -> None:
    population = [Member({}, age=1), Member({}, "refined"), Member({}, "refined"), Member({}, "mutated")]
    assert survival(population, [1, 0]) == {"elite": 1.0, "refined": 0.5, "mutated": 0.0}


def test_a_reward_that_scores_by_chance_is_refused(evolve: Evolve, batch: PromptBatch) -> None:
    def dice(response: str, target: str) -> float:
        return random.random()

    with pytest.raises(LoraGANError, match="'dice' gives the same answers other scores"):
        fit(evolve(rewards=[FunctionReward(dice)]), [batch], 1)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"population": 0}, "population.* must be at least 1"),
        ({"population": 1}, "can only be refined"),
        ({"elites": 4}, "elites leave nobody"),
        ({"elites": 2, "refined": 3}, "more than the population of 4"),
        ({"crossover_rate": 2.0}, "crossover_rate"),
        ({"accumulate_rounds": 2}, "accumulate_rounds must be 1"),
        ({"evaluation": Sampling(num_beams=2)}, "beam search"),
        ({"evaluation_prompts": 0}, "evaluation_prompts"),
        ({"members_at_once": 0}, "members_at_once"),
        ({"refinement_rounds": 0}, "refinement_rounds"),
    ],
)
def test_settings_that_cannot_be(evolve: Evolve, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(LoraGANError, match=told):
        evolve(**changed)
