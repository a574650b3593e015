"""Breeding: selection, crossover and mutation make the offspring of a generation."""

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
    """Makes children from one or several parents; all children are mutated.

    Raises:
        LoraGANError: crossover_rate is outside [0, 1].
    """

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
        """``count`` new members, without an id yet.

        Args:
            population: The evaluated members.
            starts: Weights at the start of each lineage.
            generation: Number of the generation.
            count: Number of children.
            rng: Source of random numbers.
        """
        children: list[Member] = []
        fitness = fitness_of(population)
        while len(children) < count:
            crossed = bool(torch.rand(1, generator=rng) < self.crossover_rate)
            chosen = self._parents(fitness, self.crossover.parents if crossed else 1, rng)
            parents = [population[i] for i in chosen]
            weights = self.crossover([p.weights for p in parents], rng) if crossed else parents[0].weights
            origin, ids, lineage = CROSSED if crossed else MUTATED, tuple(p.id for p in parents), parents[0].lineage
            moved = self.mutation(weights, starts[lineage], generation, rng)
            children += [Member(child, origin, parents=ids, lineage=lineage) for child in moved]
        return children[:count]

    def _parents(self, fitness: Tensor, count: int, rng: torch.Generator) -> list[int]:
        """Indices of parents, distinct while the population is large enough."""
        pool, chosen = list(range(len(fitness))), []
        for _ in range(count):
            chosen.append(pool[self.selection(fitness[pool], 1, rng)[0]])
            if len(pool) > 1:
                pool.remove(chosen[-1])
        return chosen
