"""Members of a population: adapter weights of a generator, origin, fitness and optimizer state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor

from lora_gan.backbone import GENERATOR, Backbone
from lora_gan.errors import LoraGANError
from lora_gan.evolution.lowrank import Factors, Weights, distances

START, MUTATED, CROSSED, REFINED = "start", "mutated", "crossed", "refined"  # origins of members


@dataclass(frozen=True)
class Member:
    """A member of the population."""

    weights: Weights
    origin: str = START
    id: int = 0  # unique in a run
    parents: tuple[int, ...] = ()  # their ids
    lineage: int = 0  # index of its ancestor in the first generation
    age: int = 0  # generations that it has survived
    fitness: float = 0.0  # of the last evaluation
    optimizer_state: Mapping[str, Any] = field(default_factory=dict)  # state of optimizer and schedule; empty: fresh

    @property
    def kind(self) -> str:
        """The origin, or "elite" if the member has survived a generation."""
        return "elite" if self.age else self.origin

    def survived(self) -> Member:
        """The same member, a generation older."""
        return replace(self, age=self.age + 1)

    def state(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        plain = {name: getattr(self, name) for name in ("origin", "id", "lineage", "age", "fitness")}
        return {
            **plain,
            "weights": weights_state(self.weights),
            "parents": list(self.parents),
            "optimizer_state": dict(self.optimizer_state),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], device: torch.device) -> Member:
        """The inverse of :meth:`state`."""
        weights = weights_from(state["weights"], device)
        return cls(**{**state, "weights": weights, "parents": tuple(state["parents"])})


def weights_state(weights: Weights) -> dict[str, dict[str, Any]]:
    """Plain values and tensors, for a checkpoint."""
    return {name: {"a": x.a, "b": x.b, "scale": x.scale} for name, x in weights.items()}


def weights_from(state: Mapping[str, Mapping[str, Any]], device: torch.device) -> Weights:
    """The inverse of :func:`weights_state`."""
    return {name: Factors(x["a"].to(device), x["b"].to(device), x["scale"]) for name, x in state.items()}


def fitness_of(population: Sequence[Member]) -> Tensor:
    """(P,) fitness of each member."""
    return torch.tensor([member.fitness for member in population], dtype=torch.float64)


def diversity(population: Sequence[Member]) -> float:
    """Mean distance between two members, the root mean square of ΔW − ΔW′; 0 for a single member."""
    pairs = len(population) * (len(population) - 1)
    return float(distances([member.weights for member in population]).sum()) / max(pairs, 1)


def survival(population: Sequence[Member], survivors: Sequence[int]) -> dict[str, float]:
    """Share of members that survive, by origin; members of earlier generations count as "elite"."""
    kind = [member.kind for member in population]
    alive = set(survivors)
    return {
        name: sum(i in alive for i, k in enumerate(kind) if k == name) / kind.count(name) for name in sorted(set(kind))
    }


def positions(population: Sequence[Member]) -> Tensor:
    """(P, 2) positions in a plane, by classical scaling of the distances of ΔW (Torgerson 1952)."""
    squares = distances([member.weights for member in population]).square()
    centred = squares - squares.mean(0) - squares.mean(1, keepdim=True) + squares.mean()
    values, vectors = torch.linalg.eigh(-centred / 2)
    places = vectors.flip(1) * values.flip(0).clamp(min=0).sqrt()
    return torch.nn.functional.pad(places, (0, 1))[:, :2]


# the backbone's generator


def lora_layers(backbone: Backbone) -> dict[str, LoraLayer]:
    """The layers with an adapter of the generator, by their name in PEFT's files.

    Raises:
        LoraGANError: An adapter is more than a product B·A, which is all that members consist of.
    """
    layers = {name: layer for name, layer in backbone.lm.named_modules() if isinstance(layer, LoraLayer)}
    if backbone.generator_lora.use_dora:
        raise LoraGANError("evolution mutates products B·A, and DoRA is more: set generator.lora.use_dora: false")
    for name, layer in layers.items():
        if GENERATOR in layer.lora_embedding_A:
            raise LoraGANError(f"evolution has no adapters on embeddings: take {name} out of generator.lora.targets")
        if GENERATOR in layer.lora_A and isinstance(layer, ParamWrapper):
            raise LoraGANError(
                f"evolution has no adapters on experts or their router, which are more than a product: got {name}; set "
                "generator.lora.targets to linear layers, such as [q_proj, v_proj]"
            )
    return {name: layer for name, layer in layers.items() if GENERATOR in layer.lora_A}


def read_weights(backbone: Backbone) -> Weights:
    """A copy of the generator's LoRA weights."""
    return {
        name: Factors(
            layer.lora_A[GENERATOR].weight.detach().clone(),
            layer.lora_B[GENERATOR].weight.detach().clone(),
            float(layer.scaling[GENERATOR]),
        )
        for name, layer in lora_layers(backbone).items()
    }


@torch.no_grad()
def write_weights(backbone: Backbone, weights: Weights) -> None:
    """Copy a member's weights into the generator."""
    for name, layer in lora_layers(backbone).items():
        layer.lora_A[GENERATOR].weight.copy_(weights[name].a)
        layer.lora_B[GENERATOR].weight.copy_(weights[name].b)


@contextmanager
def member_loaded(backbone: Backbone, weights: Weights) -> Iterator[None]:
    """Load a member into the generator; on exit, restore the generator's own weights."""
    own = read_weights(backbone)
    write_weights(backbone, weights)
    try:
        yield
    finally:
        write_weights(backbone, own)
