"""Members of a population: the generator's adapter, where it comes from, and what it has learned with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor

from lora_gan.backbone import GENERATOR, Backbone
from lora_gan.errors import LoraGANError
from lora_gan.evolution.lowrank import Factors, Weights, distances

START, MUTATED, CROSSED, REFINED = "start", "mutated", "crossed", "refined"  # how members come into being


@dataclass(frozen=True)
class Member:
    """One of the population."""

    weights: Weights
    born: str = START
    number: int = 0  # unique in a run
    parents: tuple[int, ...] = ()  # their numbers
    line: int = 0  # the member of the first generation whom it comes from
    age: int = 0  # generations that it has survived
    fitness: float = 0.0  # of the last evaluation
    learning: Mapping[str, Any] = field(default_factory=dict)  # state of optimizer and schedule; empty: fresh

    def survived(self) -> Member:
        """The same, a generation older."""
        return replace(self, age=self.age + 1)

    def state(self) -> dict[str, Any]:
        """As a checkpoint may hold it."""
        weights = {name: {"a": x.a, "b": x.b, "scale": x.scale} for name, x in self.weights.items()}
        plain = {name: getattr(self, name) for name in ("born", "number", "line", "age", "fitness")}
        return {**plain, "weights": weights, "parents": list(self.parents), "learning": dict(self.learning)}

    @classmethod
    def restored(cls, state: Mapping[str, Any], device: torch.device) -> Member:
        """The inverse of :meth:`state`."""
        weights = {
            name: Factors(x["a"].to(device), x["b"].to(device), x["scale"]) for name, x in state["weights"].items()
        }
        return cls(**{**state, "weights": weights, "parents": tuple(state["parents"])})


def fitness_of(population: Sequence[Member]) -> Tensor:
    """(P,)"""
    return torch.tensor([member.fitness for member in population], dtype=torch.float64)


def diversity(population: Sequence[Member]) -> float:
    """Mean distance of two members, root mean square of ΔW − ΔW′; 0 for a single one."""
    pairs = len(population) * (len(population) - 1)
    return float(distances([member.weights for member in population]).sum()) / max(pairs, 1)


def survival(population: Sequence[Member], survivors: Sequence[int]) -> dict[str, float]:
    """Share of the youngest members that survive, by how they came into being, and of the older ones ("elite")."""
    kind = ["elite" if member.age else member.born for member in population]
    alive = set(survivors)
    return {
        name: sum(i in alive for i, k in enumerate(kind) if k == name) / kind.count(name) for name in sorted(set(kind))
    }


# the backbone's generator


def lora_layers(backbone: Backbone) -> dict[str, LoraLayer]:
    """The layers with an adapter of the generator, by their name in PEFT's files."""
    return {
        name: layer
        for name, layer in backbone.lm.named_modules()
        if isinstance(layer, LoraLayer) and GENERATOR in layer.lora_A
    }


def read_weights(backbone: Backbone) -> Weights:
    """A copy of the generator."""
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
    """Make the generator this member."""
    for name, layer in lora_layers(backbone).items():
        layer.lora_A[GENERATOR].weight.copy_(weights[name].a)
        layer.lora_B[GENERATOR].weight.copy_(weights[name].b)


# adapters on disk


def load_weights(folder: str, backbone: Backbone) -> Weights:
    """The adapter in ``folder`` (PEFT's format) as a member.

    Raises:
        LoraGANError: There is none, or it has another base, rank, alpha or other modules than the generator here.
    """
    path = Path(folder)
    if not (path / "adapter_config.json").is_file() or not (path / "adapter_model.safetensors").is_file():
        raise LoraGANError(
            f"no adapter in {folder}: a folder with adapter_config.json and adapter_model.safetensors is wanted, such "
            "as adapters/generator of a run"
        )
    _check_config(folder, json.loads((path / "adapter_config.json").read_text(encoding="utf-8")), backbone)
    tensors = load_file(path / "adapter_model.safetensors")
    mine = read_weights(backbone)
    shapes = {f"{name}.lora_{side}.weight": getattr(x, side.lower()).shape for name, x in mine.items() for side in "AB"}
    wrong = sorted(set(shapes) ^ set(tensors)) or [name for name in shapes if tensors[name].shape != shapes[name]]
    if wrong:
        raise LoraGANError(
            f"the adapter in {folder} does not belong to this model: {len(wrong)} of its tensors are missing, too many "
            f"or of another shape, {wrong[0]} for one; give it the same base and generator_lora.targets"
        )
    return {
        name: replace(x, a=tensors[f"{name}.lora_A.weight"].to(x.a), b=tensors[f"{name}.lora_B.weight"].to(x.b))
        for name, x in mine.items()
    }


def _check_config(folder: str, config: Mapping[str, Any], backbone: Backbone) -> None:
    """Bases are compared by the last part of their name: the same model may lie in another place."""
    base = str(backbone.lm.peft_config[GENERATOR].base_model_name_or_path)
    told = str(config.get("base_model_name_or_path"))
    mine = asdict(backbone.generator_lora)
    wanted = {"base": Path(base).name, "rank": mine["rank"], "alpha": mine["alpha"], "use_rslora": False}
    there = {"base": Path(told).name, "rank": config.get("r"), "alpha": config.get("lora_alpha")}
    there["use_rslora"] = config.get("use_rslora", False)
    differing = [f"{key} {there[key]} there, {value} here" for key, value in wanted.items() if there[key] != value]
    if differing:
        raise LoraGANError(
            f"the adapter in {folder} does not fit: {', '.join(differing)}; set model.init_args.base and "
            "generator_lora to its own, or leave it out"
        )
