"""Parent selection: indices of members, fitter members more often."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError


def ranking(fitness: Tensor) -> list[int]:
    """Indices of all P members by descending fitness; ties keep their order."""
    order: list[int] = fitness.argsort(descending=True, stable=True).tolist()
    return order


class Selection(ABC):
    """Selects parents."""

    @abstractmethod
    def __call__(self, fitness: Tensor, count: int, rng: torch.Generator) -> list[int]:
        """``count`` indices of members, with repetition.

        Args:
            fitness: (P,) higher is better.
            count: Number of parents.
            rng: Source of random numbers.
        """


class Tournament(Selection):
    """Tournament selection: the fittest of a few members drawn at random (Goldberg and Deb 1991).

    Args:
        size: Number of members in a tournament; 1 is no selection.
    """

    def __init__(self, size: int = 3) -> None:
        if size < 1:
            raise LoraGANError(f"tournament size must be at least 1, got {size}")
        self.size = size

    def __call__(self, fitness: Tensor, count: int, rng: torch.Generator) -> list[int]:
        size = min(self.size, len(fitness))
        drawn = [torch.randperm(len(fitness), generator=rng)[:size] for _ in range(count)]
        return [int(competing[fitness[competing].argmax()]) for competing in drawn]


class Truncation(Selection):
    """Truncation selection: uniform among the fittest, as in (μ, λ) evolution strategies.

    Args:
        share: Share of the population that can be selected.
    """

    def __init__(self, share: float = 0.5) -> None:
        if not 0 < share <= 1:
            raise LoraGANError(f"share must be in (0, 1], got {share}")
        self.share = share

    def __call__(self, fitness: Tensor, count: int, rng: torch.Generator) -> list[int]:
        fittest = ranking(fitness)[: max(1, math.ceil(self.share * len(fitness)))]
        return [fittest[i] for i in torch.randint(len(fittest), (count,), generator=rng).tolist()]


class FitnessProportional(Selection):
    """Probability proportional to the fitness above the worst member's (Holland 1975); uniform if all are equal.

    Args:
        floor: Probability of the worst member divided by that of the best.
    """

    def __init__(self, floor: float = 0.1) -> None:
        if not 0 <= floor <= 1:
            raise LoraGANError(f"floor must be in [0, 1], got {floor}")
        self.floor = floor

    def __call__(self, fitness: Tensor, count: int, rng: torch.Generator) -> list[int]:
        chosen: list[int] = self.probabilities(fitness).multinomial(count, replacement=True, generator=rng).tolist()
        return chosen

    def probabilities(self, fitness: Tensor) -> Tensor:
        """(P,) probability of each member; the sum is 1."""
        above = fitness.double() - fitness.min()
        spread = above.max()
        weight = self.floor + (1 - self.floor) * above / spread if spread > 0 else torch.ones_like(above)
        return weight / weight.sum()
