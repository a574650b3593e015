"""Low-rank algebra: sums, products and norms of ΔW = scale·B·A without forming ΔW.

An adapter acts through the product, and many pairs (A, B) have the same product. So members are compared, mixed and
mutated by their products. r is the rank, R the rank of a sum before it is reduced to r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError


@dataclass(frozen=True)
class Factors:
    """LoRA factors of one module: its update is ΔW = scale·B·A."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scale: float  # alpha / r

    @property
    def delta(self) -> Tensor:
        """(out, in) the full update."""
        return self.scale * self.b @ self.a

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def size(self) -> int:
        """Number of elements of ΔW."""
        return self.b.shape[0] * self.a.shape[1]


Weights = Mapping[str, Factors]  # the factors of a member by module


@dataclass(frozen=True)
class Stacked:
    """P members side by side."""

    factors: Weights  # A (P, r, in) and B (P, out, r)
    mean: Weights | None = None  # what their updates are added to

    @classmethod
    def of(cls, members: Sequence[Weights]) -> Stacked:
        """Members of equal shapes."""
        first = members[0]
        a, b = ({n: torch.stack([getattr(m[n], which) for m in members]) for n in first} for which in ("a", "b"))
        return cls({name: replace(x, a=a[name], b=b[name]) for name, x in first.items()})


@dataclass(frozen=True)
class Singular:
    """ΔW = u·diag(values)·vh."""

    u: Tensor  # (out, R)
    values: Tensor  # (R,) descending
    vh: Tensor  # (R, in)

    def factors(self, like: Factors) -> Factors:
        """The largest ``like.rank`` components as (A, B), the best approximation of that rank (Eckart, Young 1936).

        A has orthonormal rows and B has the size, as at LoRA's initialisation: a component of size 0 still learns.
        """
        r = like.rank
        b = self.u[:, :r] * self.values[:r] / like.scale
        return padded(Factors(self.vh[:r], b, like.scale), like)


def padded(x: Factors, like: Factors) -> Factors:
    """The same ΔW with the rank, the scale and the type of ``like``, whose rank is not smaller.

    The further rows of A are those of ``like`` and those of B are 0, as at LoRA's initialisation: they can still learn.
    """
    b = torch.nn.functional.pad(x.b * (x.scale / like.scale), (0, like.rank - x.rank))
    a = torch.cat([x.a.to(like.a), like.a[x.rank :]])
    return Factors(a.contiguous(), b.to(like.b).contiguous(), like.scale)


def inner(x: Factors, y: Factors) -> Tensor:
    """⟨ΔW_x, ΔW_y⟩ = tr((B_xᵀB_y)(A_yA_xᵀ)), a scalar in float64."""
    left, right = x.b.double().T @ y.b.double(), x.a.double() @ y.a.double().T
    return x.scale * y.scale * (left * right).sum()


def norm(x: Factors) -> Tensor:
    """Frobenius norm of ΔW, a scalar in float64."""
    return inner(x, x).clamp(min=0).sqrt()


def total(updates: Sequence[Factors], coefficients: Sequence[float]) -> Factors:
    """Σ cᵢ·ΔWᵢ exactly; its rank is the sum of the ranks."""
    scale = updates[0].scale
    b = [c * x.scale / scale * x.b for x, c in zip(updates, coefficients, strict=True)]
    return Factors(torch.cat([x.a for x in updates]), torch.cat(b, 1), scale)


def singular(x: Factors) -> Singular:
    """Singular values and vectors of ΔW by two QR decompositions, in float64."""
    return singulars({"": x})[""]


def singulars(weights: Weights) -> dict[str, Singular]:
    """:func:`singular` of each module; those of one shape are decomposed together, as a GPU needs as long for one."""
    by_shape: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, x in weights.items():
        by_shape.setdefault((x.a.shape, x.b.shape), []).append(name)
    found: dict[str, Singular] = {}
    for names in by_shape.values():
        found.update(zip(names, _decomposed([weights[name] for name in names]), strict=True))
    return {name: found[name] for name in weights}


def _decomposed(alike: Sequence[Factors]) -> list[Singular]:
    left = torch.linalg.qr(torch.stack([x.b for x in alike]).double())
    right = torch.linalg.qr(torch.stack([x.a for x in alike]).double().mT)
    scales = left.R.new_tensor([x.scale for x in alike])[:, None, None]
    core = torch.linalg.svd(scales * left.R @ right.R.mT)
    return [Singular(*parts) for parts in zip(left.Q @ core.U, core.S, core.Vh @ right.Q.mT, strict=True)]


def mix(updates: Sequence[Weights], coefficients: Sequence[float], most_lost: float = 1.0) -> Weights:
    """Σ cᵢ·ΔWᵢ of each module with the rank of the first: exact if that rank suffices, else the best approximation.

    Raises:
        LoraGANError: More than the share ``most_lost`` of a module's norm would be lost.
    """
    first = updates[0]
    found = singulars({name: total([x[name] for x in updates], coefficients) for name in first})
    if most_lost < 1:
        _check_lost(found, first, most_lost)
    return {name: found[name].factors(x) for name, x in first.items()}


def lost(whole: Singular, rank: int) -> Tensor:
    """Share of the norm of ΔW that its largest ``rank`` components lack, a scalar."""
    squares = whole.values.square()
    return (squares[rank:].sum() / squares.sum().clamp(min=1e-300)).sqrt()


def _check_lost(found: Mapping[str, Singular], like: Weights, most: float) -> None:
    shares = torch.stack([lost(found[name], x.rank) for name, x in like.items()]).tolist()
    for (name, x), share in zip(like.items(), shares, strict=True):
        if share > most + 1e-6:
            raise LoraGANError(
                f"the sum of the updates needs more rank than the {x.rank} of the adapters: {share:.0%} of the norm of "
                f"{name} would be lost; raise generator.lora.rank or most_lost"
            )


def moved_b(x: Factors, by: Tensor) -> Factors:
    """B + ``by`` (out, r): ΔW changes by exactly scale·by·A."""
    return replace(x, b=x.b + by)


def moved_a(x: Factors, by: Tensor) -> Factors:
    """A + ``by`` (r, in): ΔW changes by exactly scale·B·by."""
    return replace(x, a=x.a + by)


def distances(population: Sequence[Weights]) -> Tensor:
    """(P, P) root mean square of ΔW_i − ΔW_j for all pairs, by ‖x − y‖² = ‖x‖² + ‖y‖² − 2⟨x, y⟩."""
    p = len(population)
    gram = torch.zeros(p, p, dtype=torch.float64)
    for name in population[0]:
        parts = [member[name] for member in population]
        a = torch.cat([x.a for x in parts]).double()  # (P·r, in)
        b = torch.cat([x.scale * x.b for x in parts], 1).double()  # (out, P·r)
        gram += ((a @ a.T) * (b.T @ b)).view(p, parts[0].rank, p, -1).sum((1, 3)).cpu()
    squares = gram.diag()[:, None] + gram.diag() - 2 * gram
    return (squares.clamp(min=0) / sum(x.size for x in population[0].values())).sqrt()
