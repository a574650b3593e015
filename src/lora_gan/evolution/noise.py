"""Random numbers of the evolution, and members made of a mean and noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from lora_gan.data.splits import digest
from lora_gan.evolution.lowrank import Factors, Stacked, Weights

MEAN = -1  # the mean's place beside the members


def seeded(seed: int, *purpose: object) -> torch.Generator:
    """Random numbers that depend on the seed and the purpose alone, so a resumed run draws the same."""
    return torch.Generator().manual_seed(int(digest(seed, *purpose)[:15], 16))


def normal(shape: torch.Size, like: Factors, rng: torch.Generator) -> Tensor:
    """Normal noise, drawn on the CPU so that all devices get the same."""
    return torch.randn(shape, generator=rng).to(like.a)


def rank_one(shape: torch.Size, like: Factors, rng: torch.Generator) -> Tensor:
    """The outer product of two normal vectors."""
    return torch.outer(normal(shape[:1], like, rng), normal(shape[1:], like, rng))


class Noise(ABC):
    """Directions ε with E[ε εᵀ] = 1, in which the mean is moved."""

    @abstractmethod
    def __call__(self, mean: Weights, rng: torch.Generator) -> Weights:
        """The noise of each module's A and B."""

    def changes(self, mean: Weights, rngs: Sequence[torch.Generator]) -> Weights | None:
        """For N generators the changes of ΔW by :meth:`__call__`, A (N, 1, in) and B (N, out, 1).

        None, if they are not of rank 1.
        """
        return None


class FullNoise(Noise):
    """Independent normal noise on every element of A and B."""

    def __call__(self, mean: Weights, rng: torch.Generator) -> Weights:
        return {name: replace(x, a=normal(x.a.shape, x, rng), b=normal(x.b.shape, x, rng)) for name, x in mean.items()}


class RankOneNoise(Noise):
    """Noise of rank 1 on A or on B, so that each module's ΔW changes by rank 1 (EGGROLL, arXiv 2511.16652).

    One of both is chosen at random, with √2 times the noise; B while it is 0, since A then has no effect. The members
    of a generation are evaluated as changes of rank 1 beside the mean's product, so hundreds of them are cheap.
    """

    def __call__(self, mean: Weights, rng: torch.Generator) -> Weights:
        found = {}
        for name, (on_a, left, right) in self._vectors(mean, [rng]).items():
            x = mean[name]
            moved, still = (x.a, x.b) if on_a else (x.b, x.a)
            noise, none = torch.outer(left[0, : len(moved)], right[0, : moved.shape[1]]), torch.zeros_like(still)
            found[name] = replace(x, a=noise, b=none) if on_a else replace(x, a=none, b=noise)
        return found

    def changes(self, mean: Weights, rngs: Sequence[torch.Generator]) -> Weights:
        found = {}
        for name, (on_a, left, right) in self._vectors(mean, rngs).items():
            x = mean[name]
            b = torch.where(on_a[:, None], left[:, : x.rank] @ x.b.T, left[:, : len(x.b)])
            a = torch.where(on_a[:, None], right[:, : x.a.shape[1]], right[:, : x.rank] @ x.a)
            found[name] = replace(x, a=a[:, None], b=b[:, :, None])
        return found

    def _vectors(self, mean: Weights, rngs: Sequence[torch.Generator]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """For each module whether the noise is on A, (N,), and the vectors whose outer product it is.

        The vectors, (N, max(r, out)) and (N, max(in, r)), begin with the numbers of those of A, r and in, or of B, out
        and r.
        """
        sizes = [size for x in mean.values() for size in (max(x.rank, len(x.b)), max(x.a.shape[1], x.rank))]
        drawn = [(torch.rand(len(mean), generator=rng) < 0.5, torch.randn(sum(sizes), generator=rng)) for rng in rngs]
        coins, numbers = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        vectors, found = iter(torch.split(numbers, sizes, dim=1)), {}
        for i, (name, x) in enumerate(mean.items()):
            free = bool(x.b.any())
            left, right = (next(vectors).to(x.a) for _ in range(2))
            found[name] = coins[:, i].to(x.a.device) & free, (math.sqrt(2) if free else 1.0) * left, right
        return found


@dataclass(frozen=True)
class Perturbed(Sequence[Weights]):
    """The members of a generation, each made when it is asked for.

    Member 2p is mean + σ·ε_p, 2p + 1 is mean − σ·ε_p, and −1 is the mean itself.
    """

    mean: Weights
    noise: Noise
    sigma: float
    seed: int
    generation: int
    members: range

    def __len__(self) -> int:
        return len(self.members)

    @overload
    def __getitem__(self, index: int) -> Weights: ...
    @overload
    def __getitem__(self, index: slice) -> Perturbed: ...
    def __getitem__(self, index: int | slice) -> Weights | Perturbed:
        if isinstance(index, slice):
            return replace(self, members=self.members[index])
        member = self.members[index]
        if member == MEAN:
            return self.mean
        return shifted(self.mean, self.direction(member // 2), self._size(member))

    def direction(self, pair: int) -> Weights:
        """ε of a pair, from (seed, generation, pair)."""
        return self.noise(self.mean, self._rng(pair))

    def stacked(self) -> Stacked:
        """All members side by side; those of rank-one noise as changes of the mean."""
        of_members = torch.tensor([max(member // 2, 0) for member in self.members])
        pairs, place = torch.unique(of_members, return_inverse=True)
        changes = self.noise.changes(self.mean, [self._rng(pair) for pair in pairs.tolist()])
        if changes is None:
            return Stacked.of(list(self))
        size = torch.tensor([self._size(member) for member in self.members])
        return Stacked(
            {name: replace(x, a=x.a[place], b=x.b[place] * size.to(x.b)[:, None, None]) for name, x in changes.items()},
            self.mean,
        )

    def _size(self, member: int) -> float:
        return 0.0 if member == MEAN else -self.sigma if member % 2 else self.sigma

    def _rng(self, pair: int) -> torch.Generator:
        return seeded(self.seed, "noise", self.generation, pair)


def shifted(x: Weights, direction: Weights, by: float) -> Weights:
    """A and B of each module moved by ``by`` times the direction's."""
    return {name: replace(f, a=f.a + by * direction[name].a, b=f.b + by * direction[name].b) for name, f in x.items()}
