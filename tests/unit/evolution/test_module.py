"""Generations in a real trainer: special cases in which evolution is a simpler method, and invariants."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from lora_gan.advantages import MovingAverage
from lora_gan.backbone import DISCRIMINATOR, GENERATOR, Backbone, LoraSettings
from lora_gan.callbacks import MovingAverageBaseline
from lora_gan.checkpointing.adapters import save_adapter
from lora_gan.discriminator.replay import Replay
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
from lora_gan.evolution.population import Member, diversity, read_weights, survival, write_weights
from lora_gan.evolution.tasks import MemberModule, Task
from lora_gan.evolution.workers import Done, InProcess, Workers
from lora_gan.losses import ClippedPPO
from lora_gan.module import LoraGANModule
from lora_gan.optimization import WarmupCosine
from lora_gan.rewards import FunctionReward
from lora_gan.sampling import Sampling
from lora_gan.types import PromptBatch, Rollout
from tests.conftest import tiny
from tests.helpers.generations import distance, graded
from tests.helpers.settings import grouped
from tests.helpers.steps import fit

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
        return EvolutionModule(**grouped({**settings, **sizes, **changed}))

    return build


class PopulationRecorder(L.Callback):
    """Records the population at the start of each generation."""

    def __init__(self) -> None:
        self.populations: list[list[Member]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.populations.append(list(pl_module.population))


def same(x: Weights, y: Weights) -> bool:
    return all(torch.equal(x[name].a, y[name].a) and torch.equal(x[name].b, y[name].b) for name in x)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraSettings(4, 8, use_dora=True), r"DoRA is more: set generator\.lora\.use_dora: false"),
        (
            LoraSettings(4, 8, ["c_attn", "wte"]),
            r"no adapters on embeddings: take .*wte out of generator\.lora\.targets",
        ),
    ],
)
def test_adapters_that_are_more_than_products_are_refused_at_the_start(
    lora: LoraSettings, message: str, evolve: Evolve
) -> None:
    with pytest.raises(LoraGANError, match=message):
        evolve(generator_lora=lora)


# special cases


@pytest.mark.parametrize("all_parts", [False, True])
def test_a_population_of_one_is_the_plain_run(settings: dict[str, Any], batch: PromptBatch, all_parts: bool) -> None:
    """Bit for bit: weights of both roles, learning rates, and the metrics of every step."""
    changed: dict[str, Any] = {"generator_scheduler": lambda optimizer: StepLR(optimizer, 2, 0.5)}
    if all_parts:
        changed |= {
            "advantage": MovingAverage(),
            "policy_loss": ClippedPPO(num_iterations=2),
            "discriminator_updates": 1,
        }
        changed |= {"adversarial": 0.5}
    batches = [batch.of([0, 1]), batch.of([1, 2]), batch.of([2, 0])]
    torch.manual_seed(4)
    plain, _ = fit(LoraGANModule(**grouped({**settings, **changed})), batches, 5, MovingAverageBaseline())
    torch.manual_seed(4)
    alone = EvolutionModule(population=1, elites=0, refined=1, **grouped({**settings, **changed}))
    evolved, _ = fit(alone, batches, 5, MovingAverageBaseline())
    assert evolved.rates == plain.rates and len({tuple(rates) for rates in plain.rates}) > 1
    for mine, wanted in zip(evolved.weights, plain.weights, strict=True):
        assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    for mine, expected in zip(evolved.reports, plain.reports, strict=True):
        assert {name: mine[name] for name in expected} == expected


def test_refinement_steps_split_the_prompts(
    settings: dict[str, Any], batch: PromptBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[list[str]] = []
    sample_rollout = EvolutionModule.sample_rollout

    def recorded(module: EvolutionModule, prompts: PromptBatch) -> Rollout:
        sampled.append([example.prompt for example in prompts.examples])
        return sample_rollout(module, prompts)

    monkeypatch.setattr(EvolutionModule, "sample_rollout", recorded)
    module = EvolutionModule(population=2, elites=0, refined=2, refinement_steps=2, **grouped(settings))
    _, trainer = fit(module, [batch], 2)
    first, second, third = (example.prompt for example in batch.examples)
    assert sampled == [[first, second], [third]] * 4
    assert trainer.global_step == 2, "a generation counts as one step"


def test_the_best_fitness_never_falls_without_mutation(evolve: Evolve, batch: PromptBatch) -> None:
    module = evolve(mutation=GaussianMutation(0.0), crossover=MixUpdates(), evaluation=GREEDY, start=DistantMembers())
    recorder, _ = fit(module, [batch], 5)
    best = [report["fitness/best"] for report in recorder.reports]
    assert best == sorted(best)
    assert max(best) > recorder.reports[0]["fitness/worst"], "the first members should differ"


def test_the_best_fitness_never_falls_with_mutation(evolve: Evolve, batch: PromptBatch) -> None:
    """On one batch with greedy completions, fitness is a function of the weights; here it also improves."""
    recorder, _ = fit(evolve(population=8, evaluation=GREEDY), [batch], 12)
    best = [report["fitness/best"] for report in recorder.reports]
    assert best == sorted(best) and best[-1] > best[0]


class DistantMembers(SavedAdapters):
    """Members that differ a lot, without files."""

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
    recorded = PopulationRecorder()
    module = evolve(population=6, elites=2, refined=2, mutation=RankOneMutation(0.02), crossover_rate=0.5)
    recorder, _ = fit(module, [batch], 3, recorded)
    first, second = recorded.populations[1], recorded.populations[2]
    assert [member.origin for member in recorded.populations[0]] == ["start"] * 6
    assert [member.origin for member in first[2:4]] == ["refined"] * 2
    assert {member.origin for member in first[4:]} <= {"mutated", "crossed"}
    assert [member.age for member in first] == [1, 1, 0, 0, 0, 0]
    assert len({member.id for population in recorded.populations for member in population}) >= 6 + 2 * 4
    for population, before in ((first, recorded.populations[0]), (second, first)):
        known = {member.id for member in before}
        assert all(set(member.parents) <= known for member in population if not member.age)
        elite = population[0]
        assert same(elite.weights, next(m.weights for m in before if m.id == elite.id))
    assert same(read_weights(module.backbone), module.population[0].weights), "the backbone holds the best member"
    report = recorder.reports[2]
    assert report["fitness/worst"] <= report["fitness/mean"] <= report["fitness/best"]
    assert report["population/diversity"] > 0
    assert {"fitness/elites", "survival/refined", "survival/elite", "reward/total"} <= set(report)


def test_a_refined_member_keeps_its_own_optimizer(evolve: Evolve, batch: PromptBatch) -> None:
    recorded = PopulationRecorder()
    module = evolve(population=3, elites=0, refined=3)
    fit(module, [batch], 3, recorded)
    for generation, population in enumerate([*recorded.populations, module.population]):
        for member in population:
            state = dict(member.optimizer_state).get("optimizer", {"state": {}})["state"]
            assert {float(s["step"]) for s in state.values()} == ({float(generation)} if generation else set())
    moments = [
        next(iter(member.optimizer_state["optimizer"]["state"].values()))["exp_avg"] for member in module.population
    ]
    assert not torch.equal(moments[0], moments[1])


def test_refining_an_elite_does_not_change_the_elite(evolve: Evolve, batch: PromptBatch) -> None:
    module = evolve(population=2, elites=1, refined=1)
    recorded = PopulationRecorder()
    fit(module, [batch], 4, recorded)
    for population in recorded.populations[1:]:
        elite, refined = population
        assert distance(elite.weights, refined.weights) > 0
        steps = [
            {float(s["step"]) for s in dict(m.optimizer_state).get("optimizer", {"state": {}})["state"].values()}
            for m in (elite, refined)
        ]
        assert next(iter(steps[1])) == next(iter(steps[0]), 0) + 1 or elite.id not in refined.parents


def test_elites_are_evaluated_again_on_new_prompts(evolve: Evolve, batch: PromptBatch) -> None:
    recorded = PopulationRecorder()
    module = evolve(population=3, evaluation=GREEDY, mutation=GaussianMutation(0.0), start=DistantMembers())
    fit(module, [batch.of([0]), batch.of([1]), batch.of([2])], 3, recorded)
    scores = [population[0].fitness for population in (*recorded.populations[1:], module.population)]
    assert len(set(scores)) > 1


@pytest.mark.parametrize("refined", [0, 1])
def test_the_times_of_a_generation_are_its_own(
    refined: int, evolve: Evolve, batch: PromptBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that counts how often it is read, each generation takes as long as the one before."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(EvolutionModule, "clock", lambda module: float(next(ticks)))
    recorder, _ = fit(evolve(refined=refined), [batch], 3)
    first, *later = (output.seconds for output in recorder.outputs)
    assert {"evaluate", "breed", "refine"} <= set(first) and ("sample" in first) == bool(refined)
    assert all(one == first for one in later) and first["evaluate"] == 1


def test_refinement_trains_the_discriminator(evolve: Evolve, batch: PromptBatch) -> None:
    module = evolve(refined=1, discriminator_updates=1, adversarial=0.5)
    recorder, _ = fit(module, [batch], 2)
    assert "loss/discriminator" in recorder.reports[-1]


class ReversedOrder(Workers):
    """Runs the last task first."""

    def run(self, module: MemberModule, tasks: Sequence[Task[Done]]) -> list[Done]:
        return [task(module) for task in reversed(tasks)][::-1]


def test_the_order_of_tasks_does_not_matter(evolve: Evolve, batch: PromptBatch) -> None:
    """All refinements start from the same discriminator, each with its own random numbers."""
    found = []
    for workers in (InProcess(), ReversedOrder()):
        module = evolve(
            elites=1,
            refined=3,
            refinement_steps=2,
            members_at_once=3,
            workers=workers,
            advantage=MovingAverage(),
            discriminator_updates=1,
            adversarial=0.5,
            replay=Replay(4, 2),
            discriminator_scheduler=lambda o: StepLR(o, 1, 0.9),
        )
        recorder, _ = fit(module, [batch], 3, MovingAverageBaseline())
        found.append((module, recorder))
    (in_order, recorded), (reverse, recorded_reverse) = found
    assert recorded.reports == recorded_reverse.reports and "loss/discriminator" in recorded.reports[-1]
    assert recorded.rates == recorded_reverse.rates
    assert all(same(x.weights, y.weights) for x, y in zip(in_order.population, reverse.population, strict=True))
    for mine, wanted in zip(recorded.weights, recorded_reverse.weights, strict=True):
        assert all(torch.equal(mine[name], wanted[name]) for name in wanted)


def test_members_at_once_does_not_change_fitness(evolve: Evolve, batch: PromptBatch) -> None:
    together, _ = fit(evolve(evaluation=GREEDY), [batch], 3)
    in_pairs, _ = fit(evolve(evaluation=GREEDY, members_at_once=2), [batch], 3)
    assert [r["fitness/best"] for r in in_pairs.reports] == pytest.approx([r["fitness/best"] for r in together.reports])


# resume


def test_a_resumed_run_equals_an_uninterrupted_one(evolve: Evolve, batch: PromptBatch, tmp_path: Path) -> None:
    def module() -> EvolutionModule:
        return evolve(
            refined=1, mutation=GaussianMutation(0.02, anchor=0.1), generator_scheduler=lambda o: StepLR(o, 1, 0.9)
        )

    through = module()
    whole, _ = fit(through, [batch], 4, PopulationRecorder())
    _, trainer = fit(module(), [batch], 2, PopulationRecorder())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    torch.load(tmp_path / "two.ckpt", weights_only=True)
    resumed = module()
    rest, trainer = fit(resumed, [batch], 4, PopulationRecorder(), ckpt_path=str(tmp_path / "two.ckpt"))
    assert rest.reports == whole.reports[2:]
    assert [m.id for m in resumed.population] == [m.id for m in through.population]
    assert all(same(x.weights, y.weights) for x, y in zip(resumed.population, through.population, strict=True))
    assert trainer.global_step == 4


def test_unsuitable_checkpoints_are_refused(
    evolve: Evolve, settings: dict[str, Any], batch: PromptBatch, tmp_path: Path
) -> None:
    path = str(tmp_path / "one.ckpt")
    _, trainer = fit(evolve(), [batch], 1)
    trainer.save_checkpoint(path)
    with pytest.raises(LoraGANError, match="population: 4 in the checkpoint, 5 here"):
        fit(evolve(population=5), [batch], 2, ckpt_path=path)
    _, trainer = fit(LoraGANModule(**grouped(settings)), [batch], 1)
    trainer.save_checkpoint(path)
    with pytest.raises(LoraGANError, match="has no population; to start from its adapter"):
        fit(evolve(), [batch], 2, ckpt_path=path)


# starts


def test_a_supervised_start_branches_off_a_trunk(evolve: Evolve, batch: PromptBatch) -> None:
    module = evolve(start=SupervisedStart(trunk=6, branch=2, prompts=1))
    recorded = PopulationRecorder()
    fit(module, [batch.of([0, 1]), batch.of([2])], 1, recorded)
    members = [member.weights for member in recorded.populations[0]]
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
    recorded = PopulationRecorder()
    fit(evolve(start=SavedAdapters(folders)), [batch], 1, recorded)
    members = [member.weights for member in recorded.populations[0]]
    assert same(members[0], weights[0]) and same(members[1], weights[1])
    assert distance(members[2], weights[0]) == pytest.approx(0.03, rel=1e-3), "the others are mutations of each in turn"
    assert distance(members[3], weights[1]) == pytest.approx(0.03, rel=1e-3)

    other = Backbone(bases["gpt2"], LoraSettings(8, 16), LoraSettings(2, 4))
    for backbone, message in ((make_backbone("llama"), r"trained on the base '\S*gpt2"), (other, "has rank 4, but")):
        with pytest.raises(LoraGANError, match=message):
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


@pytest.mark.parametrize("schedule", [WarmupCosine, ReduceLROnPlateau])
def test_a_schedule_that_follows_the_run_is_refused(schedule: Any, evolve: Evolve, batch: PromptBatch) -> None:
    """Its steps are those of a member's refinements; with a length of its own it is taken."""
    for role in (GENERATOR, DISCRIMINATOR):
        with pytest.raises(LoraGANError, match=f"{role}.scheduler: .* would follow the run"):
            fit(evolve(refined=1, **{f"{role}_scheduler": schedule}), [batch], 1)


def test_a_member_is_refined_in_micro_batches(evolve: Evolve, batch: PromptBatch) -> None:
    """With a schedule of its own length, a prompt at a time: the numbers are those of the whole batch."""
    settings: dict[str, Any] = {"refined": 1, "generator_scheduler": lambda o: WarmupCosine(o, total_steps=9)}
    whole, parts = (fit(evolve(**settings, micro_batch_size=size), [batch], 2)[0] for size in (None, 1))
    assert whole.rates == parts.rates
    assert parts.reports[0]["loss/generator"] == pytest.approx(whole.reports[0]["loss/generator"], abs=1e-5)


def test_a_random_reward_is_refused(evolve: Evolve, batch: PromptBatch) -> None:
    def dice(response: str, target: str) -> float:
        return random.random()

    with pytest.raises(LoraGANError, match="'dice' scored the same completions differently"):
        fit(evolve(rewards=[FunctionReward(dice)]), [batch], 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"population": 0}, "population.* must be at least 1"),
        ({"population": 1}, "population: 1 needs elites: 0 and refined: 1"),
        ({"elites": 4}, "elites must be smaller than population"),
        ({"elites": 2, "refined": 3}, "more than the population of 4"),
        ({"crossover_rate": 2.0}, "crossover_rate"),
        ({"evaluation": Sampling(num_beams=2)}, "beam search"),
        ({"evaluation_prompts": 0}, "evaluation_prompts"),
        ({"members_at_once": 0}, "members_at_once"),
        ({"refinement_steps": 0}, "refinement_steps"),
    ],
)
def test_invalid_settings(evolve: Evolve, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraGANError, match=message):
        evolve(**changed)
