"""Tasks on members of a population, which this process or a worker runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from torch import Tensor

from lora_gan.backbone import DISCRIMINATOR, GENERATOR, SNAPSHOT, adapter_of
from lora_gan.checkpointing.state import seed_by
from lora_gan.evolution.lowrank import Weights
from lora_gan.evolution.multi_lora import sample_population
from lora_gan.evolution.population import REFINED, Member, read_weights, write_weights
from lora_gan.module import LoraGANModule
from lora_gan.sampling import Sampling
from lora_gan.types import PromptBatch, Rollout, StepOutput

Done = TypeVar("Done", covariant=True)


@dataclass(frozen=True)
class SharedState:
    """State shared by all members: discriminator with its optimizer, heads, coefficients, replayed samples."""

    weights: Mapping[str, Tensor]
    optimizer_state: Mapping[str, Any]  # the discriminator's optimizer and schedule
    replay: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluations:
    """The fitness of P members, and the completions of the fittest; those of the others need not travel."""

    fitness: tuple[float, ...]  # P
    rollout: Rollout  # of the fittest; of equal ones the first

    @classmethod
    def joined(cls, parts: Sequence[Evaluations]) -> Evaluations:
        """Those of the members of all parts, in order."""
        best = max(parts, key=lambda part: max(part.fitness))
        return cls(tuple(one for part in parts for one in part.fitness), best.rollout)


@dataclass(frozen=True)
class Refinement:
    """A refined member, the shared state after its steps if the task returns it, and the output of the last step."""

    member: Member
    shared_state: SharedState | None
    output: StepOutput  # of the last step, with the metrics of all steps; later steps overwrite


class Task(Protocol[Done]):
    """Work on members; needs nothing but a :class:`MemberModule` of the same settings."""

    def __call__(self, module: MemberModule) -> Done:
        """Run the task; the result does not depend on earlier tasks of the module."""


@dataclass(frozen=True)
class EvaluateTask:
    """Evaluate some members on the same prompts with the same random numbers, in one decode."""

    members: Sequence[Weights]
    batch: PromptBatch
    num_generations: int  # completions of each prompt by each member
    how: Sampling
    uniform: Tensor  # (B·num_generations, T, tries) random numbers

    def __call__(self, module: MemberModule) -> Evaluations:
        prompts, k = self.batch.prompt_ids, self.num_generations
        rollouts = sample_population(module.backbone, self.members, prompts, k, self.how, self.uniform)
        return Evaluations.joined([Evaluations((module.fitness(one, self.batch),), one) for one in rollouts])


@dataclass(frozen=True)
class RefineTask:
    """Train a member for some policy-gradient steps with its own optimizer."""

    member: Member
    shared_state: SharedState  # at the start
    steps: Sequence[PromptBatch]
    seed: tuple[int, ...]
    returns_shared_state: bool  # only that of the best member is used

    def __call__(self, module: MemberModule) -> Refinement:
        module.load_shared_state(self.shared_state)
        write_weights(module.backbone, self.member.weights)
        module.load_optimizer_state(GENERATOR, self.member.optimizer_state)
        seed_by(self.seed)
        outputs = [module.run_step(batch) for batch in self.steps]
        metrics = {name: value for output in outputs for name, value in output.metrics.items()}
        refined = Member(
            read_weights(module.backbone),
            REFINED,
            parents=(self.member.id,),
            lineage=self.member.lineage,
            optimizer_state=module.optimizer_state(GENERATOR),
        )
        shared_state = module.shared_state() if self.returns_shared_state else None
        return Refinement(refined, shared_state, replace(outputs[-1], metrics=metrics))


class MemberModule(LoraGANModule):
    """A :class:`LoraGANModule` whose generator holds one member at a time."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.settings = settings  # for building the same module in another process

    def fitness(self, rollout: Rollout, batch: PromptBatch) -> float:
        """Mean reward of the completions after ``truncated_penalty``."""
        total = self.score(rollout, batch, with_targets=False).total
        return float((total - self.truncated_penalty * rollout.truncated.float()).double().mean())

    # state of a member and shared state

    def optimizer_state(self, role: str) -> dict[str, Any]:
        """A copy of the state of a role's optimizer and schedule, and the number of its updates."""
        optimizer, scheduler = self.optimization.optimizer(role), self.optimization.scheduler(role)
        schedule = {} if scheduler is None else scheduler.state_dict()
        updates = self.optimization.updates[role]
        return deepcopy({"optimizer": optimizer.state_dict(), "scheduler": schedule, "updates": updates})

    def load_optimizer_state(self, role: str, state: Mapping[str, Any]) -> None:
        """Load what :meth:`optimizer_state` returned; an empty state resets optimizer and schedule."""
        state = deepcopy(dict(state)) or self._fresh(role)
        self.optimization.updates[role] = state["updates"]
        self.optimization.optimizer(role).load_state_dict(state["optimizer"])
        if (scheduler := self.optimization.scheduler(role)) is not None:
            scheduler.load_state_dict(state["scheduler"])

    def shared_state(self) -> SharedState:
        """A copy of the state shared by all members."""
        kept = {name for name in self._kept() if adapter_of(name) != GENERATOR}
        weights = {name: weight.detach().clone() for name, weight in self.state_dict().items() if name in kept}
        return SharedState(weights, self.optimizer_state(DISCRIMINATOR), self.discriminator.replay.state_dict())

    def load_shared_state(self, shared_state: SharedState) -> None:
        """Load the shared state."""
        if any(adapter_of(name) == SNAPSHOT for name in shared_state.weights) and not self.backbone.has_snapshot:
            self.backbone.add_snapshot()
        self.load_state_dict(shared_state.weights, strict=False)
        self.load_optimizer_state(DISCRIMINATOR, shared_state.optimizer_state)
        self.discriminator.replay.load_state_dict(shared_state.replay)

    def _fresh(self, role: str) -> dict[str, Any]:
        groups = self.optimization.optimizer(role).param_groups
        settings = self.optimization.roles[role]
        optimizer = settings.optimizer([p for group in groups for p in group["params"]])
        schedule = {} if settings.scheduler is None else settings.scheduler(optimizer).state_dict()
        return {"optimizer": optimizer.state_dict(), "scheduler": schedule, "updates": 0}
