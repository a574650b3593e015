"""Evaluation and refinement of members, which the genetic algorithm and the evolution strategy share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lora_gan.backbone import GENERATOR
from lora_gan.errors import LoraGANError
from lora_gan.evolution.lowrank import Weights
from lora_gan.evolution.noise import seeded
from lora_gan.evolution.population import Member, lora_layers
from lora_gan.evolution.start import AsItIs, Start
from lora_gan.evolution.tasks import EvaluateTask, Evaluations, MemberModule, Refinement, RefineTask
from lora_gan.evolution.workers import CloseWorkers, InProcess, Workers
from lora_gan.sampling import Sampling, draw_uniform, sample
from lora_gan.types import EvalOutput, PromptBatch, Rollout


def fitness_metrics(fitness: Tensor) -> dict[str, Tensor]:
    """Metrics of the fitness (P,) of a generation's members."""
    values = {"best": fitness.max(), "mean": fitness.mean(), "worst": fitness.min()}
    return {f"fitness/{name}": value.float() for name, value in values.items()}


class EvaluatingModule(MemberModule):
    """Base of modules that compare members by their mean reward.

    Args:
        start: The initial members; by default the generator as it is.
        evaluation: Sampling of the completions for fitness; by default as in training.
        evaluation_num_generations: Completions for each prompt in the evaluation of a member.
        evaluation_prompts: Number of the generation's prompts in an evaluation; by default all.
        members_at_once: Members decoded together; by default all.
        workers: Where evaluation and refinement run; by default in this process.
        evolution_seed: Seed of the random numbers of the evolution and of the evaluation.
        **settings: Settings of LoraGANModule, such as rewards and losses, for fitness and refinement.
    """

    refinement_steps: int
    schedules_follow_refinements = True  # whether a role's schedule counts the steps of refinements

    def __init__(
        self,
        start: Start | None = None,
        evaluation: Sampling | None = None,
        evaluation_num_generations: int = 1,
        evaluation_prompts: int | None = None,
        members_at_once: int | None = None,
        workers: Workers | None = None,
        evolution_seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.start = start or AsItIs()
        self.evaluation = evaluation or self.sampling
        self.evaluation_num_generations = evaluation_num_generations
        self.evaluation_prompts = evaluation_prompts
        self.members_at_once = members_at_once
        self.workers = workers or InProcess()
        self.evolution_seed = evolution_seed
        self.generation = 0
        self.resumed: dict[str, Any] = {}
        self._check_evaluation()
        lora_layers(self.backbone)  # refuses adapters that cannot evolve

    def _check_evaluation(self) -> None:
        for name in ("evaluation_num_generations", "evaluation_prompts", "members_at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LoraGANError(f"{name} must be at least 1, got {value}")
        if asking := [reward.name for reward in self.rewards if reward.asks_policy]:
            raise LoraGANError(
                f"the reward {asking[0]!r} asks the policy how likely a text is, and in evolution the completions come "
                "from many members: leave it out"
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

    def evaluated(self, members: Sequence[Weights], batch: PromptBatch) -> Evaluations:
        """Evaluate members on the same prompts with the same random numbers; fitness is the mean reward."""
        batch = batch.of(range(len(batch))[: self.evaluation_prompts])
        k, how = self.evaluation_num_generations, self.evaluation
        uniform = draw_uniform(len(batch) * k, how, self.device, self._rng("evaluate", self.generation))
        at_once = self.members_at_once or len(members)
        parts = [members[i : i + at_once] for i in range(0, len(members), at_once)]
        done = self.workers.run(self, [EvaluateTask(part, batch, k, how, uniform) for part in parts])
        evaluations = Evaluations.joined(done)
        if self.generation == 0:
            self._check_rewards(batch, evaluations.rollout)
        return evaluations

    def refine(self, members: Sequence[Member], batch: PromptBatch) -> list[Refinement]:
        """Refine the members by some policy-gradient steps.

        All refinements start from the same shared state; the one of the best member is kept.
        """
        parts = torch.arange(len(batch)).tensor_split(min(self.refinement_steps, len(batch)))
        steps = [batch.of(part.tolist()) for part in parts]
        shared_state = self.shared_state()
        tasks = [
            RefineTask(member, shared_state, steps, self.step_seed + ((place,) if place else ()), place == 0)
            for place, member in enumerate(members)
        ]
        refined = self.workers.run(self, tasks)
        if refined:
            assert refined[0].shared_state is not None
            self.load_shared_state(refined[0].shared_state)
            self.load_optimizer_state(GENERATOR, refined[0].member.optimizer_state)
        return refined

    def _rng(self, *purpose: object) -> torch.Generator:
        return seeded(self.evolution_seed, *purpose)

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
        """Validate the generator with greedy completions and, for ``fitness/held_out``, as in an evaluation."""
        rng = self._rng("validate", batch_idx)
        uniform = draw_uniform(len(batch) * self.evaluation_num_generations, self.evaluation, self.device, rng)
        with self.backbone.generator():
            rollout = sample(self.backbone, batch.prompt_ids, self.evaluation_num_generations, self.evaluation, uniform)
        self.log("fitness/held_out", self.fitness(rollout, batch), batch_size=len(batch))
        return super().validation_step(batch, batch_idx)

    def configure_callbacks(self) -> list[L.Callback]:
        """Close the workers when the run ends."""
        closing = [CloseWorkers(self.workers)] if self.trainer.state.fn == TrainerFn.FITTING else []
        return [*super().configure_callbacks(), *closing]

    @property
    def refines(self) -> bool:
        """Whether a generation trains by gradients."""
        return self.refinement_steps > 0

    def of_search(self) -> dict[str, Any]:
        """What a search must share with one that goes on from it."""
        return {"evolution_seed": self.evolution_seed}

    def check_search(self, there: Mapping[str, Any]) -> None:
        """Refuse to go on from a checkpoint of a search with other settings."""
        if there != self.of_search():
            found, wanted = (", ".join(f"{k} {v}" for k, v in x.items()) for x in (self.of_search(), there))
            raise LoraGANError(
                f"the search of the checkpoint has {wanted}, here it is {found}; set those of the checkpoint"
            )

    def on_fit_start(self) -> None:
        untrained = self.discriminator.settings.adapter is None and not self.refines
        if self.coefficients.adversarial > 0 and untrained:
            raise LoraGANError(
                "coefficients.adversarial makes the discriminator's score part of the fitness, and nothing trains it "
                "here: set it to 0, discriminator.adapter to a trained one, or refine members by gradients"
            )
        if self.trainer.world_size > 1:
            raise LoraGANError(
                f"evolution needs a single device, got {self.trainer.world_size} processes: set trainer.devices: 1"
            )
        for role in self.optimization.roles:
            scheduler = self.optimization.scheduler(role)
            if not self.schedules_follow_refinements:
                break
            if isinstance(scheduler, ReduceLROnPlateau) or getattr(scheduler, "total_steps", 1) is None:
                raise LoraGANError(
                    f"{role}.scheduler: {type(scheduler).__name__} would follow the run, but schedules count the steps "
                    "of a member's refinements; use one with a length of its own, such as "
                    "lora_gan.optimization.WarmupCosine with total_steps"
                )
