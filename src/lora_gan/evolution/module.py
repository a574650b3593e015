"""EvolutionModule: one generation, readable from top to bottom in ``training_step``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lora_gan.backbone import GENERATOR
from lora_gan.data.splits import digest
from lora_gan.errors import LoraGANError
from lora_gan.evolution.breeding import Breeding
from lora_gan.evolution.lowrank import Weights
from lora_gan.evolution.members import MemberModule, Refine, Refined, TryOut
from lora_gan.evolution.operators import Crossover, GaussianMutation, Mutation, SwapModules
from lora_gan.evolution.population import (
    Member,
    diversity,
    fitness_of,
    survival,
    write_weights,
)
from lora_gan.evolution.selection import Selection, Tournament, ranking
from lora_gan.evolution.start import AsItIs, Start
from lora_gan.evolution.workers import EndOfWork, Here, Workers
from lora_gan.sampling import Sampling, draw_uniform, sample
from lora_gan.types import Answered, PromptBatch, Rollout


class EvolutionModule(MemberModule):
    """A genetic algorithm over the generator's LoRA, with policy gradients on the best of each generation.

    A generation is one step of training. All members answer its prompts with the same random numbers, and the mean
    reward is their fitness. The next generation consists of elites (the best, as they are), of refined members (the
    best after some rounds of :class:`LoraGANModule`, with an optimizer of their own whose state stays with the line),
    and of offspring. Refined weights go back into the population, as in CEM-RL (arXiv 1810.01222). Elites compete again
    on the prompts of the next generation, so that luck does not last.

    The generator that is validated, saved and exported is the best that was evaluated; without elites it is what
    refinement made of it. ``population: 1, elites: 0, refined: 1`` is the plain run of :class:`LoraGANModule`.

    Args:
        population: Members.
        elites: The best so many go on as they are.
        refined: The best so many go on refined by policy gradients, beside the elites; 0 is evolution alone.
        refinement_rounds: Rounds of each refinement; the prompts of the generation are dealt out to them.
        start: The first members; by default the generator as it is, and mutations of it.
        selection: Who has children; by default tournaments of three.
        crossover: How a child of several parents is made; by default whole modules of either.
        crossover_rate: Chance that a child has several parents.
        mutation: How all children differ; by default Gaussian noise that moves ΔW by 0.001.
        evaluation: How answers are drawn for the fitness; by default as in training.
        evaluation_answers: Answers of each member to each prompt by which its fitness is measured.
        evaluation_prompts: Fitness is measured on so many prompts of the generation; by default on all.
        members_at_once: Members that answer in one decode; by default all.
        workers: Who evaluates and refines; by default this process.
        evolution_seed: Decides selection, crossover, mutation and the random numbers of the evaluation.
        **settings: Those of LoraGANModule: rewards, losses and so on, for fitness and refinement.
    """

    def __init__(
        self,
        population: int = 8,
        elites: int = 2,
        refined: int = 2,
        refinement_rounds: int = 1,
        start: Start | None = None,
        selection: Selection | None = None,
        crossover: Crossover | None = None,
        crossover_rate: float = 0.5,
        mutation: Mutation | None = None,
        evaluation: Sampling | None = None,
        evaluation_answers: int = 1,
        evaluation_prompts: int | None = None,
        members_at_once: int | None = None,
        workers: Workers | None = None,
        evolution_seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.size = population
        self.elites = elites
        self.refined = refined
        self.refinement_rounds = refinement_rounds
        self.start = start or AsItIs()
        self.breeding = Breeding(
            selection or Tournament(), crossover or SwapModules(), mutation or GaussianMutation(), crossover_rate
        )
        self.evaluation = evaluation or self.sampling
        self.evaluation_answers = evaluation_answers
        self.evaluation_prompts = evaluation_prompts
        self.members_at_once = members_at_once
        self.workers = workers or Here()
        self.evolution_seed = evolution_seed
        self.population: list[Member] = []
        self.ranked: list[Member] = []  # those of the last generation, the fittest first; for callbacks
        self.starts: list[Weights] = []
        self.generation = 0
        self.resumed: dict[str, Any] = {}
        self._numbers = count()
        self._check_sizes()

    def _check_sizes(self) -> None:
        least = {"population": (self.size, 1), "elites": (self.elites, 0), "refined": (self.refined, 0)}
        least |= {name: (getattr(self, name), 1) for name in ("refinement_rounds", "evaluation_answers")}
        for name in ("evaluation_prompts", "members_at_once"):
            given = getattr(self, name)
            least[name] = (1 if given is None else given, 1)
        for name, (value, bound) in least.items():
            if value < bound:
                raise LoraGANError(f"{name} must be at least {bound}, got {value}")
        if self.size == 1 and (self.elites, self.refined) != (0, 1):
            raise LoraGANError(
                "a population of 1 can only be refined: set elites: 0 and refined: 1, or population to 2 or more"
            )
        if self.size > 1 and self.elites >= self.size:
            raise LoraGANError(
                f"{self.elites} elites leave nobody to evolve in a population of {self.size}: lower them"
            )
        if self.elites + self.refined > self.size:
            raise LoraGANError(
                f"{self.elites} elites and {self.refined} refined members are more than the population of {self.size}"
            )
        if self.accumulate_rounds > 1:
            raise LoraGANError("accumulate_rounds must be 1 here: a refined member keeps the steps of its own rounds")
        if self.evaluation.num_beams > 1:
            raise LoraGANError("fitness cannot be measured by beam search: give evaluation: {num_beams: 1, …}")

    # the generation

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Tensor]:
        """One generation: evaluate, select, cross and mutate, refine."""
        self.seed_round()
        with self._counted_round():
            with self._timed("evaluate"):
                members = self.evaluate(batch)
            metrics = self.census(members)
            self.ranked = ranked = [members[i] for i in ranking(fitness_of(members))]
            with self._timed("breed"):
                elites = [member.survived() for member in ranked[: self.elites]]
                children = self.breed(members)
            with self._timed("refine"):
                refined = self.refine(ranked[: self.refined], batch, batch_idx)
            grown = [one.member for one in refined]
            best = grown[0] if grown and not elites else ranked[0]
            write_weights(self.backbone, best.weights)
            self.population = [*elites, *(replace(m, number=next(self._numbers)) for m in (*grown, *children))]
            self.generation += 1
            if refined:
                self.log_round(refined[0].report)
            self.log("fitness/best", metrics["fitness/best"], prog_bar=True, batch_size=1)
            self.log_dict({k: v for k, v in metrics.items() if k != "fitness/best"}, batch_size=1)
            return {**(refined[0].report if refined else {}), **metrics}

    def evaluate(self, batch: PromptBatch) -> list[Member]:
        """Every member answers the same prompts with the same random numbers; fitness is its mean reward."""
        batch = batch.of(range(len(batch))[: self.evaluation_prompts])
        k, how = self.evaluation_answers, self.evaluation
        uniform = draw_uniform(len(batch) * k, how, self.device, self._rng("evaluate", self.generation))
        at_once = self.members_at_once or self.size
        weights = [member.weights for member in self.population]
        parts = [weights[i : i + at_once] for i in range(0, self.size, at_once)]
        done = self.workers.run(self, [TryOut(part, batch, k, how, uniform) for part in parts])
        tried = [one for part in done for one in part]
        if self.generation == 0:
            self._check_rewards(batch, tried[0].rollout)
        evaluated = [replace(m, fitness=one.fitness) for m, one in zip(self.population, tried, strict=True)]
        self.rollout = tried[ranking(fitness_of(evaluated))[0]].rollout
        return evaluated

    def breed(self, members: Sequence[Member]) -> list[Member]:
        """The offspring that fill the places which elites and refined members leave."""
        wanted = self.size - self.elites - self.refined
        return self.breeding(members, self.starts, self.generation, wanted, self._rng("breed", self.generation))

    def refine(self, members: Sequence[Member], batch: PromptBatch, batch_idx: int) -> list[Refined]:
        """The members after some rounds of policy gradient, each beside the same company; that of the first goes on."""
        if self.knobs.policy_weight:
            self._check_baseline()
        parts = torch.arange(len(batch)).tensor_split(min(self.refinement_rounds, len(batch)))
        rounds = [batch.of(part.tolist()) for part in parts]
        company = self.company()
        errands = [
            Refine(member, company, rounds, batch_idx, self.round_seed + ((place,) if place else ()))
            for place, member in enumerate(members)
        ]
        refined = self.workers.run(self, errands)
        if refined:
            first = refined[0]
            self.keep_company(first.company)
            self.take_up(GENERATOR, first.member.learning)
            self.rollout, self.scores, self.judgement = first.rollout, first.scores, first.judgement
        return refined

    def census(self, members: Sequence[Member]) -> dict[str, Tensor]:
        """What is worth logging about an evaluated population."""
        fitness = fitness_of(members)
        told = {"best": fitness.max(), "mean": fitness.mean(), "worst": fitness.min()}
        old = torch.tensor([member.age > 0 for member in members])
        if old.any():
            told["elites"] = fitness[old].mean()
        metrics = {f"fitness/{name}": value.float() for name, value in told.items()}
        metrics["population/diversity"] = torch.tensor(diversity(members))
        if survivors := ranking(fitness)[: max(self.elites, self.refined)]:
            shares = survival(members, survivors)
            metrics |= {f"survival/{kind}": torch.tensor(share) for kind, share in shares.items()}
        return metrics

    def _rng(self, *purpose: object) -> torch.Generator:
        """Chance that depends on the seed and the purpose alone, so that a resumed run has the same."""
        return torch.Generator().manual_seed(int(digest(self.evolution_seed, *purpose)[:15], 16))

    def _check_rewards(self, batch: PromptBatch, rollout: Rollout) -> None:
        """Members are compared by the same answers' scores: a reward that scores by chance would choose by chance."""
        first, second = (self.score(rollout, batch, with_targets=False).parts for _ in range(2))
        for name, part in first.items():
            if not torch.allclose(part, second[name], atol=1e-4):
                raise LoraGANError(
                    f"reward {name!r} gives the same answers other scores when it is asked again; fitness needs "
                    "deterministic rewards: fix its seed or leave it out"
                )

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Answered]:
        """The best member answers greedily and, for ``fitness/held_out``, as in an evaluation."""
        rng = self._rng("validate", batch_idx)
        uniform = draw_uniform(len(batch) * self.evaluation_answers, self.evaluation, self.device, rng)
        with self.backbone.generator():
            rollout = sample(self.backbone, batch.prompt_ids, self.evaluation_answers, self.evaluation, uniform)
        self.log("fitness/held_out", self.fitness(rollout, batch), batch_size=len(batch))
        return super().validation_step(batch, batch_idx)

    # beginning and resuming

    def configure_callbacks(self) -> list[L.Callback]:
        """When the run ends, its workers do."""
        return [EndOfWork(self.workers)] if self.trainer.state.fn == TrainerFn.FITTING else []

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.world_size > 1:
            raise LoraGANError("evolution runs on one device: set trainer.devices: 1")

    def on_train_start(self) -> None:
        """Make the first members, or those of the checkpoint."""
        super().on_train_start()
        if self.resumed:
            self._restore(self.resumed)
        elif not self.population:
            self._begin()

    def _begin(self) -> None:
        batches = self.trainer.train_dataloader
        assert batches is not None
        found = self.start(self.backbone, batches, self.size)
        rng = self._rng("start")
        self.starts = [*found]
        while len(self.starts) < self.size:
            parent = found[len(self.starts) % len(found)]
            self.starts += self.breeding.mutation(parent, parent, 0, rng)
        self.starts = self.starts[: self.size]
        self.population = [Member(w, number=next(self._numbers), line=i) for i, w in enumerate(self.starts)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The population beside what the module keeps."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["lora_gan"]["evolution"] = {
            "generation": self.generation,
            "members": [member.state() for member in self.population],
            "starts": [Member(weights).state() for weights in self.starts],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the population up again where training goes on."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        found = checkpoint["lora_gan"].get("evolution")
        if found is None:
            raise LoraGANError(
                "the checkpoint holds no population; begin with its adapter: start: {class_path: "
                "lora_gan.evolution.SavedAdapters, init_args: {folders: [<run>/adapters/generator]}}"
            )
        if len(found["members"]) != self.size:
            raise LoraGANError(f"population: {len(found['members'])} in the checkpoint, {self.size} here")
        self.resumed = found

    def _restore(self, state: dict[str, Any]) -> None:
        self.generation = state["generation"]
        self.population = [Member.restored(member, self.device) for member in state["members"]]
        self.starts = [Member.restored(member, self.device).weights for member in state["starts"]]
        self._numbers = count(max(member.number for member in self.population) + 1)
        self.resumed = {}
