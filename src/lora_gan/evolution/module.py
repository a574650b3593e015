"""Evolution of LoRA adapters as a LightningModule; ``training_step`` is one generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError
from lora_gan.evolution.breeding import Breeding
from lora_gan.evolution.evaluating import EvaluatingModule, fitness_metrics
from lora_gan.evolution.lowrank import Weights
from lora_gan.evolution.operators import Crossover, GaussianMutation, Mutation, SwapModules
from lora_gan.evolution.population import Member, diversity, fitness_of, survival, write_weights
from lora_gan.evolution.selection import Selection, Tournament, ranking
from lora_gan.lightning_compat import is_fitting
from lora_gan.step_callback import OUTPUT
from lora_gan.types import PromptBatch, StepOutput


class EvolutionModule(EvaluatingModule):
    """Genetic algorithm over the generator's LoRA weights, with policy gradients on the best of each generation.

    A generation is one training step. All members complete its prompts with the same random numbers; a member's fitness
    is its mean reward. The next generation consists of elites (the best, unchanged), of refined members (the best after
    some steps of :class:`LoraGANModule`, each with its own optimizer, whose state stays with the lineage), and of
    offspring. Refined weights go back into the population, as in CEM-RL (arXiv 1810.01222). Elites are evaluated again
    on the prompts of the next generation, so that a lucky evaluation does not last.

    The generator that is validated, saved and exported is the best evaluated member; without elites it is the refined
    best member. ``population: 1, elites: 0, refined: 1`` is the plain run of :class:`LoraGANModule`.

    Args:
        population: Number of members.
        elites: Number of best members that are kept unchanged.
        refined: Number of best members that are refined by policy gradients, in addition to the elites; 0 is evolution
            alone.
        refinement_steps: Steps of each refinement; the prompts of the generation are split among them.
        selection: Parent selection; by default tournaments of three.
        crossover: How a child of several parents is made; by default each module comes from one of the parents.
        crossover_rate: Probability that a child has several parents.
        mutation: How children are mutated; by default Gaussian noise that changes ΔW by 0.001.
        **settings: Those of the evaluation (start, evaluation, members_at_once, workers, …; mutations of the initial
            members fill the population), and those of LoraGANModule for fitness and refinement.

    Raises:
        LoraGANError: Settings are out of range or contradict each other.
    """

    def __init__(
        self,
        population: int = 8,
        elites: int = 2,
        refined: int = 2,
        refinement_steps: int = 1,
        selection: Selection | None = None,
        crossover: Crossover | None = None,
        crossover_rate: float = 0.5,
        mutation: Mutation | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.size = population
        self.elites = elites
        self.refined = refined
        self.refinement_steps = refinement_steps
        self.breeding = Breeding(
            selection or Tournament(), crossover or SwapModules(), mutation or GaussianMutation(), crossover_rate
        )
        self.population: list[Member] = []
        self.ranked: list[Member] = []  # members of the last generation, the fittest first; for callbacks
        self.starts: list[Weights] = []  # initial weights of each lineage
        self._ids = count()
        self._check_sizes()

    def _check_sizes(self) -> None:
        least = {"population": (self.size, 1), "elites": (self.elites, 0), "refined": (self.refined, 0)}
        least["refinement_steps"] = (self.refinement_steps, 1)
        for name, (value, bound) in least.items():
            if value < bound:
                raise LoraGANError(f"{name} must be at least {bound}, got {value}")
        if self.size == 1 and (self.elites, self.refined) != (0, 1):
            raise LoraGANError(
                f"population: 1 needs elites: 0 and refined: 1, got elites: {self.elites} and refined: {self.refined}; "
                "set these, or population to 2 or more"
            )
        if self.size > 1 and self.elites >= self.size:
            raise LoraGANError(
                f"elites must be smaller than population, got elites: {self.elites} and population: {self.size}"
            )
        if self.elites + self.refined > self.size:
            raise LoraGANError(
                f"elites: {self.elites} and refined: {self.refined} are more than the population of {self.size}: "
                "lower one of them, or raise population"
            )

    @property
    def refines(self) -> bool:
        return self.refined > 0

    # the generation

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, StepOutput]:
        """One generation: evaluate, select, cross over, mutate and refine."""
        self.begin_step(batch)
        with self.optimization.counted():
            with self._timed("evaluate"):
                evaluations = self.evaluated([member.weights for member in self.population], batch)
            members = [replace(m, fitness=one) for m, one in zip(self.population, evaluations.fitness, strict=True)]
            order = ranking(fitness_of(members))
            self.ranked = ranked = [members[i] for i in order]
            with self._timed("breed"):
                elites = [member.survived() for member in ranked[: self.elites]]
                children = self.breed(members)
            with self._timed("refine"):
                refined = self.refine(ranked[: self.refined], batch)
            improved = [one.member for one in refined]
            best = improved[0] if improved and not elites else ranked[0]
            write_weights(self.backbone, best.weights)
            self.population = [*elites, *(replace(m, id=next(self._ids)) for m in (*improved, *children))]
            self.generation += 1
            last = refined[0].output if refined else StepOutput({}, evaluations.rollout, None, None, {})
            self.log_step(last.metrics)
            metrics = self.population_metrics(members)
            self.log("fitness/best", metrics["fitness/best"], prog_bar=True, batch_size=1)
            self.log_dict({k: v for k, v in metrics.items() if k != "fitness/best"}, batch_size=1)
            return {OUTPUT: replace(last, metrics={**last.metrics, **metrics}, seconds=dict(self._seconds))}

    def breed(self, members: Sequence[Member]) -> list[Member]:
        """The offspring, which fill the places left by elites and refined members."""
        missing = self.size - self.elites - self.refined
        return self.breeding(members, self.starts, self.generation, missing, self._rng("breed", self.generation))

    def population_metrics(self, members: Sequence[Member]) -> dict[str, Tensor]:
        """Metrics of an evaluated population."""
        fitness = fitness_of(members)
        metrics = fitness_metrics(fitness)
        old = torch.tensor([member.age > 0 for member in members])
        if old.any():
            metrics["fitness/elites"] = fitness[old].mean().float()
        metrics["population/diversity"] = torch.tensor(diversity(members))
        if survivors := ranking(fitness)[: max(self.elites, self.refined)]:
            shares = survival(members, survivors)
            metrics |= {f"survival/{kind}": torch.tensor(share) for kind, share in shares.items()}
        return metrics

    # start and resume

    def on_train_start(self) -> None:
        """Make the initial members, or restore those of the checkpoint."""
        super().on_train_start()
        if self.resumed:
            self._restore(self.resumed)
        elif not self.population:
            self._make_population()

    def _make_population(self) -> None:
        batches = self.trainer.train_dataloader
        assert batches is not None
        found = self.start(self.backbone, batches, self.size)
        rng = self._rng("start")
        self.starts = [*found]
        while len(self.starts) < self.size:
            parent = found[len(self.starts) % len(found)]
            self.starts += self.breeding.mutation(parent, parent, 0, rng)
        self.starts = self.starts[: self.size]
        self.population = [Member(w, id=next(self._ids), lineage=i) for i, w in enumerate(self.starts)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the population with the state of the module."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["lora_gan"]["evolution"] = {
            "generation": self.generation,
            "members": [member.state() for member in self.population],
            "starts": [Member(weights).state() for weights in self.starts],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the population if training is resumed."""
        super().on_load_checkpoint(checkpoint)
        if not is_fitting(self):
            return
        found = checkpoint["lora_gan"].get("evolution")
        if found is None:
            raise LoraGANError(
                "the checkpoint has no population; to start from its adapter, set start: "
                "{class_path: lora_gan.evolution.SavedAdapters, init_args: {folders: [<run>/adapters/generator]}}"
            )
        if len(found["members"]) != self.size:
            raise LoraGANError(
                f"population: {len(found['members'])} in the checkpoint, {self.size} here; set population to that of "
                "the checkpoint"
            )
        self.resumed = found

    def _restore(self, state: dict[str, Any]) -> None:
        self.generation = state["generation"]
        self.population = [Member.restored(member, self.device) for member in state["members"]]
        self.starts = [Member.restored(member, self.device).weights for member in state["starts"]]
        self._ids = count(max(member.id for member in self.population) + 1)
        self.resumed = {}
