"""Who has children: indices of members, the fitter the more often."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError


def ranking(fitness: Tensor) -> list[int]:
    """All P members, the fittest first; of equals the earlier."""
    order: list[int] = fitness.argsort(descending=True, stable=True).tolist()
    return order


class Selection(ABC):
    """Chooses parents."""

    @abstractmethod
    def __call__(self, fitness: Tensor, count: int, rng: torch.Generator) -> list[int]:
        """``count`` indices of members, with repetition.

        Args:
            fitness: (P,) higher is better.
            count: How many parents are wanted.
            rng: Source of chance.
        """


class Tournament(Selection):
    """The fittest of a few drawn at random (Goldberg and Deb 1991).

    Args:
        size: How many compete; 1 is no selection.
    """

    def __init__(self, size: int = 3) -> None:
        if size < 1:
            raise LoraGANError(f"a tournament needs a size of at least 1, got {size}")
        self.size = size

    def __call__(self, fitness: Tensor, count: int, rng: torch.Generator) -> list[int]:
        size = min(self.size, len(fitness))
        drawn = [torch.randperm(len(fitness), generator=rng)[:size] for _ in range(count)]
        return [int(competing[fitness[competing].argmax()]) for competing in drawn]


class Truncation(Selection):
    """Any of the fittest, with equal chance (evolution strategies' (μ, λ)).

    Args:
        share: Of the population that has children.
    """

    def __init__(self, share: float = 0.5) -> None:
        if not 0 < share <= 1:
            raise LoraGANError(f"share must be in (0, 1], got {share}")
        self.share = share

    def __call__(self, fitness: Tensor, count: int, rng: torch.Generator) -> list[int]:
        fittest = ranking(fitness)[: max(1, math.ceil(self.share * len(fitness)))]
        return [fittest[i] for i in torch.randint(len(fittest), (count,), generator=rng).tolist()]


class FitnessProportional(Selection):
    """With a chance in proportion to the fitness above the worst member's (Holland 1975); equal members alike.

    Args:
        floor: Chance of the worst over that of the best.
    """

    def __init__(self, floor: float = 0.1) -> None:
        if not 0 <= floor <= 1:
            raise LoraGANError(f"floor must be in [0, 1], got {floor}")
        self.floor = floor

    def __call__(self, fitness: Tensor, count: int, rng: torch.Generator) -> list[int]:
        chosen: list[int] = self.chances(fitness).multinomial(count, replacement=True, generator=rng).tolist()
        return chosen

    def chances(self, fitness: Tensor) -> Tensor:
        """(P,) with the sum 1."""
        above = fitness.double() - fitness.min()
        spread = above.max()
        weight = self.floor + (1 - self.floor) * above / spread if spread > 0 else torch.ones_like(above)
        return weight / weight.sum()
