"""What is done with single members of a population, here or by a worker elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from lora_gan.backbone import DISCRIMINATOR, GENERATOR, SNAPSHOT
from lora_gan.checkpoints import seed_by
from lora_gan.evolution.batched import sample_population
from lora_gan.evolution.lowrank import Weights
from lora_gan.evolution.population import REFINED, Member, read_weights, write_weights
from lora_gan.module import LoraGANModule
from lora_gan.sampling import Sampling
from lora_gan.types import Judgement, PromptBatch, Rollout, Scores

Done = TypeVar("Done", covariant=True)


@dataclass(frozen=True)
class Company:
    """All that a generator learns beside and that learns with it: discriminator, heads, knobs, replayed samples."""

    weights: Mapping[str, Tensor]
    learning: Mapping[str, Any]  # the discriminator's optimizer and schedule
    replay: Mapping[str, Any]


@dataclass(frozen=True)
class Tried:
    """A member's answers and what they are worth."""

    rollout: Rollout
    fitness: float


@dataclass(frozen=True)
class Refined:
    """A member after its refinement, and what its last round was like."""

    member: Member
    company: Company
    report: Mapping[str, Tensor]
    rollout: Rollout
    scores: Scores | None
    judgement: Judgement | None


class Errand(Protocol[Done]):
    """Something to be done with members; it needs nothing but a :class:`MemberModule` of the same settings."""

    def __call__(self, module: MemberModule) -> Done:
        """Do it; what the module keeps between two errands does not matter."""


@dataclass(frozen=True)
class TryOut:
    """Some members answer the same prompts with the same random numbers, in one decode."""

    members: Sequence[Weights]
    batch: PromptBatch
    answers: int  # of each member to each prompt
    how: Sampling
    uniform: Tensor  # (B·answers, T, tries) the random numbers

    def __call__(self, module: MemberModule) -> list[Tried]:
        prompts = self.batch.prompt_ids
        rollouts = sample_population(module.backbone, self.members, prompts, self.answers, self.how, self.uniform)
        return [Tried(rollout, module.fitness(rollout, self.batch)) for rollout in rollouts]


@dataclass(frozen=True)
class Refine:
    """A member plays some rounds of policy gradient with an optimizer of its own."""

    member: Member
    company: Company  # as it is at first
    rounds: Sequence[PromptBatch]
    batch_idx: int
    seed: tuple[int, ...]

    def __call__(self, module: MemberModule) -> Refined:
        module.keep_company(self.company)
        write_weights(module.backbone, self.member.weights)
        module.take_up(GENERATOR, self.member.learning)
        seed_by(self.seed)
        report: dict[str, Tensor] = {}
        with module.inside_a_generation():
            for batch in self.rounds:
                report |= module.play_round(batch, self.batch_idx)
        grown = Member(
            read_weights(module.backbone),
            REFINED,
            parents=(self.member.number,),
            line=self.member.line,
            learning=module.learning(GENERATOR),
        )
        return Refined(grown, module.company(), report, module.rollout, module.scores, module.judgement)


class MemberModule(LoraGANModule):
    """A :class:`LoraGANModule` whose generator is one member after the other."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.settings = settings  # by which another process can build the same
        self._inside = False

    def fitness(self, rollout: Rollout, batch: PromptBatch) -> float:
        """Mean reward of the answers, less what truncated ones cost."""
        total = self.score(rollout, batch, with_targets=False).total
        return float((total - self.truncated_penalty * rollout.truncated.float()).double().mean())

    def play_round(self, batch: PromptBatch, batch_idx: int) -> dict[str, Tensor]:
        """One round of :class:`LoraGANModule`."""
        return LoraGANModule.training_step(self, batch, batch_idx)

    # rounds inside a generation: seeded, counted and logged once

    @contextmanager
    def inside_a_generation(self) -> Iterator[None]:
        """The rounds played here neither seed nor count nor log: that is done for all of them together."""
        outside, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = outside

    def seed_round(self) -> None:
        if not self._inside:
            super().seed_round()

    def log_round(self, metrics: Mapping[str, Tensor]) -> None:
        if not self._inside:
            super().log_round(metrics)

    @contextmanager
    def _counted_round(self) -> Iterator[None]:
        if self._inside:
            yield
            return
        with super()._counted_round():
            yield

    # what belongs to a member, and what they share

    def learning(self, player: str) -> dict[str, Any]:
        """A copy of the states of a player's optimizer and of its schedule."""
        schedule = self.schedule_of(player)
        state = {} if schedule is None else schedule.state_dict()
        return deepcopy({"optimizer": self._optimizer(player).state_dict(), "schedule": state})

    def take_up(self, player: str, learning: Mapping[str, Any]) -> None:
        """Give a player's optimizer and schedule such states; fresh ones where there are none."""
        state = deepcopy(dict(learning)) or self._fresh(player)
        self._optimizer(player).load_state_dict(state["optimizer"])
        if (schedule := self.schedule_of(player)) is not None:
            schedule.load_state_dict(state["schedule"])

    def company(self) -> Company:
        """A copy of it."""
        kept = {name for name in self._kept() if f".{GENERATOR}." not in name}
        weights = {name: weight.detach().clone() for name, weight in self.state_dict().items() if name in kept}
        return Company(weights, self.learning(DISCRIMINATOR), self.discriminator.replay.state_dict())

    def keep_company(self, company: Company) -> None:
        """Play beside it from now on."""
        if any(f".{SNAPSHOT}." in name for name in company.weights) and not self.backbone.has_snapshot:
            self.backbone.add_snapshot()
        self.load_state_dict(company.weights, strict=False)
        self.take_up(DISCRIMINATOR, company.learning)
        self.discriminator.replay.load_state_dict(company.replay)

    def _optimizer(self, player: str) -> Optimizer:
        return self.trainer.optimizers[list(self.optimizer_factories).index(player)]

    def _fresh(self, player: str) -> dict[str, Any]:
        groups = self._optimizer(player).param_groups
        optimizer = self.optimizer_factories[player]([p for group in groups for p in group["params"]])
        make = self.scheduler_factories[player]
        return {"optimizer": optimizer.state_dict(), "schedule": {} if make is None else make(optimizer).state_dict()}
