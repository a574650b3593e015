"""From the members of one generation to the new ones of the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError
from lora_gan.evolution.lowrank import Weights
from lora_gan.evolution.operators import Crossover, Mutation
from lora_gan.evolution.population import CROSSED, MUTATED, Member, fitness_of
from lora_gan.evolution.selection import Selection


@dataclass(frozen=True)
class Breeding:
    """Some children have several parents, the others one; all are mutated."""

    selection: Selection
    crossover: Crossover
    mutation: Mutation
    crossover_rate: float  # chance that a child has several parents

    def __post_init__(self) -> None:
        if not 0 <= self.crossover_rate <= 1:
            raise LoraGANError(f"crossover_rate must be in [0, 1], got {self.crossover_rate}")

    def __call__(
        self, population: Sequence[Member], starts: Sequence[Weights], generation: int, count: int, rng: torch.Generator
    ) -> list[Member]:
        """``count`` new members, not yet numbered.

        Args:
            population: The evaluated members.
            starts: Where each line began.
            generation: Number of the generation.
            count: How many are wanted.
            rng: Source of chance.
        """
        children: list[Member] = []
        fitness = fitness_of(population)
        while len(children) < count:
            crossed = bool(torch.rand(1, generator=rng) < self.crossover_rate)
            chosen = self._parents(fitness, self.crossover.parents if crossed else 1, rng)
            parents = [population[i] for i in chosen]
            weights = self.crossover([p.weights for p in parents], rng) if crossed else parents[0].weights
            born, numbers, line = CROSSED if crossed else MUTATED, tuple(p.number for p in parents), parents[0].line
            moved = self.mutation(weights, starts[line], generation, rng)
            children += [Member(child, born, parents=numbers, line=line) for child in moved]
        return children[:count]

    def _parents(self, fitness: Tensor, count: int, rng: torch.Generator) -> list[int]:
        """Different members, as far as there are enough."""
        pool, chosen = list(range(len(fitness))), []
        for _ in range(count):
            chosen.append(pool[self.selection(fitness[pool], 1, rng)[0]])
            if len(pool) > 1:
                pool.remove(chosen[-1])
        return chosen
