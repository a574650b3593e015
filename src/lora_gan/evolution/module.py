"""Evolution of LoRA adapters as a LightningModule; ``training_step`` is one generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lora_gan.backbone import GENERATOR
from lora_gan.data.splits import digest
from lora_gan.errors import LoraGANError
from lora_gan.evolution.breeding import Breeding
from lora_gan.evolution.lowrank import Weights
from lora_gan.evolution.operators import Crossover, GaussianMutation, Mutation, SwapModules
from lora_gan.evolution.population import Member, diversity, fitness_of, lora_layers, survival, write_weights
from lora_gan.evolution.selection import Selection, Tournament, ranking
from lora_gan.evolution.start import AsItIs, Start
from lora_gan.evolution.tasks import EvaluateTask, Evaluation, MemberModule, Refinement, RefineTask
from lora_gan.evolution.workers import CloseWorkers, InProcess, Workers
from lora_gan.lightning_compat import is_fitting
from lora_gan.sampling import Sampling, draw_uniform, sample
from lora_gan.step_callback import OUTPUT
from lora_gan.types import EvalOutput, PromptBatch, Rollout, StepOutput, require_prompts


class EvolutionModule(MemberModule):
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
        start: The initial members; by default the generator as it is, and mutations of it.
        selection: Parent selection; by default tournaments of three.
        crossover: How a child of several parents is made; by default each module comes from one of the parents.
        crossover_rate: Probability that a child has several parents.
        mutation: How children are mutated; by default Gaussian noise that changes ΔW by 0.001.
        evaluation: Sampling of the completions for fitness; by default as in training.
        evaluation_num_generations: Completions for each prompt in the evaluation of a member.
        evaluation_prompts: Number of the generation's prompts in an evaluation; by default all.
        members_at_once: Members decoded together; by default all.
        workers: Where evaluation and refinement run; by default in this process.
        evolution_seed: Seed of selection, crossover, mutation and the random numbers of the evaluation.
        **settings: Settings of LoraGANModule, such as rewards and losses, for fitness and refinement.

    Raises:
        LoraGANError: Settings are out of range or contradict each other.
    """

    def __init__(
        self,
        population: int = 8,
        elites: int = 2,
        refined: int = 2,
        refinement_steps: int = 1,
        start: Start | None = None,
        selection: Selection | None = None,
        crossover: Crossover | None = None,
        crossover_rate: float = 0.5,
        mutation: Mutation | None = None,
        evaluation: Sampling | None = None,
        evaluation_num_generations: int = 1,
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
        self.refinement_steps = refinement_steps
        self.start = start or AsItIs()
        self.breeding = Breeding(
            selection or Tournament(), crossover or SwapModules(), mutation or GaussianMutation(), crossover_rate
        )
        self.evaluation = evaluation or self.sampling
        self.evaluation_num_generations = evaluation_num_generations
        self.evaluation_prompts = evaluation_prompts
        self.members_at_once = members_at_once
        self.workers = workers or InProcess()
        self.evolution_seed = evolution_seed
        self.population: list[Member] = []
        self.ranked: list[Member] = []  # members of the last generation, the fittest first; for callbacks
        self.starts: list[Weights] = []  # initial weights of each lineage
        self.generation = 0
        self.resumed: dict[str, Any] = {}
        self._ids = count()
        self._check_sizes()
        lora_layers(self.backbone)  # refuses adapters that cannot evolve

    def _check_sizes(self) -> None:
        least = {"population": (self.size, 1), "elites": (self.elites, 0), "refined": (self.refined, 0)}
        least |= {name: (getattr(self, name), 1) for name in ("refinement_steps", "evaluation_num_generations")}
        for name in ("evaluation_prompts", "members_at_once"):
            given = getattr(self, name)
            least[name] = (1 if given is None else given, 1)
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
        if left_out := [reward.name for reward in self.rewards if reward.may_skip]:
            raise LoraGANError(
                f"fitness is a mean reward over all prompts, and the reward {left_out[0]!r} may leave some out: set "
                "its on_failure: error"
            )
        if self.evaluation.num_beams > 1:
            raise LoraGANError(
                "fitness cannot be measured by beam search, got num_beams: "
                f"{self.evaluation.num_beams}; set evaluation: {{num_beams: 1}}"
            )

    # the generation

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, StepOutput]:
        """One generation: evaluate, select, cross over, mutate and refine."""
        require_prompts(batch)
        self.seed_step()
        with self.optimization.counted():
            with self._timed("evaluate"):
                evaluations = self.evaluate(batch)
            members = [replace(m, fitness=one.fitness) for m, one in zip(self.population, evaluations, strict=True)]
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
            last = refined[0].output if refined else StepOutput({}, evaluations[order[0]].rollout, None, None, {})
            self.log_step(last.metrics)
            metrics = self.population_metrics(members)
            self.log("fitness/best", metrics["fitness/best"], prog_bar=True, batch_size=1)
            self.log_dict({k: v for k, v in metrics.items() if k != "fitness/best"}, batch_size=1)
            return {OUTPUT: replace(last, metrics={**last.metrics, **metrics}, seconds=dict(self._seconds))}

    def evaluate(self, batch: PromptBatch) -> list[Evaluation]:
        """Evaluate all members on the same prompts with the same random numbers; fitness is the mean reward."""
        batch = batch.of(range(len(batch))[: self.evaluation_prompts])
        k, how = self.evaluation_num_generations, self.evaluation
        uniform = draw_uniform(len(batch) * k, how, self.device, self._rng("evaluate", self.generation))
        at_once = self.members_at_once or self.size
        weights = [member.weights for member in self.population]
        parts = [weights[i : i + at_once] for i in range(0, self.size, at_once)]
        done = self.workers.run(self, [EvaluateTask(part, batch, k, how, uniform) for part in parts])
        evaluations = [one for part in done for one in part]
        if self.generation == 0:
            self._check_rewards(batch, evaluations[0].rollout)
        return evaluations

    def breed(self, members: Sequence[Member]) -> list[Member]:
        """The offspring, which fill the places left by elites and refined members."""
        missing = self.size - self.elites - self.refined
        return self.breeding(members, self.starts, self.generation, missing, self._rng("breed", self.generation))

    def refine(self, members: Sequence[Member], batch: PromptBatch) -> list[Refinement]:
        """Refine the members by some policy-gradient steps.

        All refinements start from the same shared state; the one of the best member is kept.
        """
        parts = torch.arange(len(batch)).tensor_split(min(self.refinement_steps, len(batch)))
        steps = [batch.of(part.tolist()) for part in parts]
        shared_state = self.shared_state()
        tasks = [
            RefineTask(member, shared_state, steps, self.step_seed + ((place,) if place else ()))
            for place, member in enumerate(members)
        ]
        refined = self.workers.run(self, tasks)
        if refined:
            self.load_shared_state(refined[0].shared_state)
            self.load_optimizer_state(GENERATOR, refined[0].member.optimizer_state)
        return refined

    def population_metrics(self, members: Sequence[Member]) -> dict[str, Tensor]:
        """Metrics of an evaluated population."""
        fitness = fitness_of(members)
        values = {"best": fitness.max(), "mean": fitness.mean(), "worst": fitness.min()}
        old = torch.tensor([member.age > 0 for member in members])
        if old.any():
            values["elites"] = fitness[old].mean()
        metrics = {f"fitness/{name}": value.float() for name, value in values.items()}
        metrics["population/diversity"] = torch.tensor(diversity(members))
        if survivors := ranking(fitness)[: max(self.elites, self.refined)]:
            shares = survival(members, survivors)
            metrics |= {f"survival/{kind}": torch.tensor(share) for kind, share in shares.items()}
        return metrics

    def _rng(self, *purpose: object) -> torch.Generator:
        """Random numbers that depend on the seed and the purpose alone, so a resumed run draws the same."""
        return torch.Generator().manual_seed(int(digest(self.evolution_seed, *purpose)[:15], 16))

    def _check_rewards(self, batch: PromptBatch, rollout: Rollout) -> None:
        """Refuse random rewards: they would make selection random, because fitness compares members by them."""
        first, second = (self.score(rollout, batch, with_targets=False).parts for _ in range(2))
        for name, part in first.items():
            if not torch.allclose(part, second[name], atol=1e-4):
                raise LoraGANError(
                    f"reward {name!r} scored the same completions differently the second time; fitness needs "
                    "deterministic rewards: give it a fixed seed or remove it"
                )

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, EvalOutput]:
        """Validate the best member with greedy completions and, for ``fitness/held_out``, as in an evaluation."""
        rng = self._rng("validate", batch_idx)
        uniform = draw_uniform(len(batch) * self.evaluation_num_generations, self.evaluation, self.device, rng)
        with self.backbone.generator():
            rollout = sample(self.backbone, batch.prompt_ids, self.evaluation_num_generations, self.evaluation, uniform)
        self.log("fitness/held_out", self.fitness(rollout, batch), batch_size=len(batch))
        return super().validation_step(batch, batch_idx)

    # start and resume

    def configure_callbacks(self) -> list[L.Callback]:
        """Close the workers when the run ends."""
        closing = [CloseWorkers(self.workers)] if self.trainer.state.fn == TrainerFn.FITTING else []
        return [*super().configure_callbacks(), *closing]

    def on_fit_start(self) -> None:
        if self.trainer.world_size > 1:
            raise LoraGANError(
                f"evolution needs a single device, got {self.trainer.world_size} processes: set trainer.devices: 1"
            )
        for role in self.optimization.roles:
            scheduler = self.optimization.scheduler(role)
            if isinstance(scheduler, ReduceLROnPlateau) or getattr(scheduler, "total_steps", 1) is None:
                raise LoraGANError(
                    f"{role}.scheduler: {type(scheduler).__name__} would follow the run, but schedules count the steps "
                    "of a member's refinements; use one with a length of its own, such as "
                    "lora_gan.optimization.WarmupCosine with total_steps"
                )

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
