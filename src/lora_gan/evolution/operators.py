"""Mutation and crossover of low-rank updates.

The operators act on the products ΔW = scale·B·A. :class:`FixedNoise` and :class:`ElementWise` act on A and B instead
and serve as baselines.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError
from lora_gan.evolution.lowrank import Factors, Singular, Weights, mix, moved_a, moved_b, norm, singular
from lora_gan.evolution.noise import normal, rank_one

# mutation


class Mutation(ABC):
    """Makes children from one parent by a small random change."""

    @abstractmethod
    def __call__(self, parent: Weights, start: Weights, generation: int, rng: torch.Generator) -> list[Weights]:
        """One or more children.

        Args:
            parent: Parent weights (not modified).
            start: Weights at the start of the parent's lineage.
            generation: Number of the generation, from 0.
            rng: Source of random numbers.
        """


class ScaledMutation(Mutation):
    """Base of mutations whose size is that of the change of ΔW, not of A and B.

    Args:
        rms: Root mean square of the change of each module's ΔW. Noise of 0.02 on A and B makes about 0.003; evolution
            strategies on language models use about 0.001 (arXiv 2509.24372). 0 does not mutate.
        decay: Factor of ``rms`` from one generation to the next.
        anchor: Weight of the start of the lineage in the ΔW of every child, in [0, 1]; 0 is none.
    """

    def __init__(self, rms: float = 0.001, decay: float = 1.0, anchor: float = 0.0) -> None:
        if not 0 <= rms < math.inf or not 0 < decay <= 1 or not 0 <= anchor <= 1:
            raise LoraGANError(
                f"need rms >= 0, decay in (0, 1] and anchor in [0, 1], got {rms}, {decay} and {anchor}; "
                "rms: 0 does not mutate"
            )
        self.rms = rms
        self.decay = decay
        self.anchor = anchor

    def __call__(self, parent: Weights, start: Weights, generation: int, rng: torch.Generator) -> list[Weights]:
        moved = {name: self.move(x, self.length(x, generation), rng) for name, x in parent.items()}
        children = [{name: x[i] for name, x in moved.items()} for i in range(len(next(iter(moved.values()))))]
        return [self._anchored(child, start) for child in children]

    def length(self, x: Factors, generation: int) -> float:
        """Frobenius norm of the change of ΔW in this generation."""
        return self.rms * self.decay**generation * math.sqrt(x.size)

    @abstractmethod
    def move(self, x: Factors, length: float, rng: torch.Generator) -> list[Factors]:
        """The module's update in each child; ΔW changes by ``length`` (Frobenius norm)."""

    def _anchored(self, child: Weights, start: Weights) -> Weights:
        if self.anchor == 0:
            return child
        return mix([child, start], [1 - self.anchor, self.anchor])


class GaussianMutation(ScaledMutation):
    """Gaussian noise on A or on B, chosen at random, scaled so that ΔW changes by exactly the target size."""

    def move(self, x: Factors, length: float, rng: torch.Generator) -> list[Factors]:
        return _shifted(x, length, [1.0], rng, lambda shape: normal(shape, x, rng))


class RankOneMutation(ScaledMutation):
    """Pairs of children with opposite changes of rank 1: ΔW ± σ·u·vᵀ (EGGROLL, arXiv 2511.16652).

    The direction lies in the span of A or of B, so the adapter's rank suffices.
    """

    def move(self, x: Factors, length: float, rng: torch.Generator) -> list[Factors]:
        return _shifted(x, length, [1.0, -1.0], rng, lambda shape: rank_one(shape, x, rng))


class SingularValueMutation(ScaledMutation):
    """Noise on the singular values of ΔW; the directions stay (ESSA, arXiv 2507.04453)."""

    def move(self, x: Factors, length: float, rng: torch.Generator) -> list[Factors]:
        if length == 0:
            return [x]
        found = singular(x)
        noise = normal(found.values.shape, x, rng).double()
        values = found.values + noise * length / noise.norm()
        return [Singular(found.u, values, found.vh).factors(x)]


class FixedNoise(Mutation):
    """Gaussian noise of the same size on all elements of A and B, regardless of its effect on their product.

    Args:
        scale: Standard deviation.
    """

    def __init__(self, scale: float = 0.02) -> None:
        self.scale = scale

    def __call__(self, parent: Weights, start: Weights, generation: int, rng: torch.Generator) -> list[Weights]:
        child = {}
        for name, x in parent.items():
            a, b = (w + self.scale * normal(w.shape, x, rng) for w in (x.a, x.b))
            child[name] = replace(x, a=a, b=b)
        return [child]


class FromStart(Mutation):
    """Mutates the start of the lineage instead of the parent: random search around the first members.

    Args:
        mutation: Mutation to apply to the start.
    """

    def __init__(self, mutation: Mutation) -> None:
        self.mutation = mutation

    def __call__(self, parent: Weights, start: Weights, generation: int, rng: torch.Generator) -> list[Weights]:
        return self.mutation(start, start, generation, rng)


def _shifted(
    x: Factors,
    length: float,
    signs: Sequence[float],
    rng: torch.Generator,
    direction: Callable[[torch.Size], Tensor],
) -> list[Factors]:
    """Shift A or B at random, so that ΔW changes by ``length``; A only if B is not 0, so that it has an effect."""
    if length == 0:
        return [x for _ in signs]
    on_a = bool(torch.rand(1, generator=rng) < 0.5) and bool(x.b.any())
    noise = direction(x.a.shape if on_a else x.b.shape)
    effect = norm(replace(x, a=noise) if on_a else replace(x, b=noise))
    move = moved_a if on_a else moved_b
    return [move(x, sign * length / effect * noise) for sign in signs]


# crossover


class Crossover(ABC):
    """Makes a child from several parents."""

    parents = 2

    @abstractmethod
    def __call__(self, parents: Sequence[Weights], rng: torch.Generator) -> Weights:
        """The child; the parents are not modified."""


class SwapModules(Crossover):
    """Takes each module's (A, B) from one of the parents, so every product B·A is that of a parent.

    Args:
        share: Probability that a module comes from the first parent.
    """

    def __init__(self, share: float = 0.5) -> None:
        if not 0 <= share <= 1:
            raise LoraGANError(f"share must be in [0, 1], got {share}")
        self.share = share

    def __call__(self, parents: Sequence[Weights], rng: torch.Generator) -> Weights:
        first, second = parents
        from_first = (torch.rand(len(first), generator=rng) < self.share).tolist()
        return {name: (first if mine else second)[name] for name, mine in zip(first, from_first, strict=True)}


class _Merge(Crossover):
    """A weighted sum of the parents' ΔW, factored by singular values.

    The sum of two adapters of rank r has rank up to 2r; its r largest components are kept.
    """

    def __init__(self, most_lost: float = 1.0) -> None:
        if not 0 <= most_lost <= 1:
            raise LoraGANError(f"most_lost must be in [0, 1], got {most_lost}; 1 allows any loss")
        self.most_lost = most_lost

    def merged(self, parents: Sequence[Weights], coefficients: Sequence[float]) -> Weights:
        return mix(parents, coefficients, self.most_lost)


class MixUpdates(_Merge):
    """A random mixture of the parents' ΔW: w·ΔW₁ + (1 − w)·ΔW₂ with w uniform in [0, 1).

    Args:
        most_lost: Largest share of a module's norm that may be lost because the rank is too small; more is an error,
            1 allows any.
    """

    def __call__(self, parents: Sequence[Weights], rng: torch.Generator) -> Weights:
        w = float(torch.rand(1, generator=rng))
        return self.merged(parents, [w, 1 - w])


class MergeCoefficients(_Merge):
    """Σ cᵢ·ΔWᵢ of several members, cᵢ uniform in ±bound, as LoRAHub composes adapters (arXiv 2307.13269).

    Args:
        bound: Largest absolute coefficient.
        parents: Number of parents.
        most_lost: As in :class:`MixUpdates`.
    """

    def __init__(self, bound: float = 1.5, parents: int = 2, most_lost: float = 1.0) -> None:
        super().__init__(most_lost)
        if not 0 < bound < math.inf or parents < 2:
            raise LoraGANError(f"need bound > 0 and at least 2 parents, got {bound} and {parents}")
        self.bound = bound
        self.parents = parents

    def __call__(self, parents: Sequence[Weights], rng: torch.Generator) -> Weights:
        drawn = (2 * torch.rand(len(parents), generator=rng) - 1) * self.bound
        return self.merged(parents, drawn.tolist())


class ElementWise(Crossover):
    """Takes each element of A and of B from either parent; the products B·A are those of neither."""

    def __call__(self, parents: Sequence[Weights], rng: torch.Generator) -> Weights:
        first, second = parents
        child = {}
        for name, x in first.items():
            a, b = (_either(w, v, rng) for w, v in ((x.a, second[name].a), (x.b, second[name].b)))
            child[name] = replace(x, a=a, b=b)
        return child


def _either(x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
    return torch.where((torch.rand(x.shape, generator=rng) < 0.5).to(x.device), x, y)
