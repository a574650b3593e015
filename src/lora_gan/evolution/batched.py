"""A whole population answers in one decode.

The frozen base's products, most of the work, are computed once for the rows of all members, whose weights are read once
a step instead of once for each member; each row then gets its own member's A and B. All members have the same prompts
and the same random numbers, so that they differ by their weights alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lora_gan.backbone import Backbone
from lora_gan.errors import LoraGANError
from lora_gan.evolution.lowrank import Weights
from lora_gan.evolution.population import lora_layers
from lora_gan.sampling import Sampling, sample
from lora_gan.types import Rollout


class Seating:
    """Which member each row of the model's batch belongs to.

    Args:
        members: Size of the population.
        prompts: Prompts of each member; the rows come member by member.
    """

    def __init__(self, members: int, prompts: int) -> None:
        self.members = members
        self.prompts = prompts
        self.rows = 0
        self.source: Tensor | None = None  # (members·m,) row at each place, where members have unequally many rows
        self.place: Tensor | None = None  # (n,) place of each row

    def __call__(self, prompt: Tensor) -> None:
        """Seat n rows, given the prompt of each (n,), in order."""
        member = prompt // self.prompts
        count = torch.bincount(member, minlength=self.members)
        self.rows, most = len(member), int(count.max())
        if self.rows == most * self.members:
            self.source = self.place = None
            return
        row = torch.arange(self.rows, device=prompt.device)
        self.place = row - (count.cumsum(0) - count)[member] + member * most
        self.source = torch.zeros(self.members * most, dtype=torch.long, device=prompt.device)
        self.source[self.place] = row

    def group(self, x: Tensor) -> Tensor:
        """(n·t, in) or (n, t, in) → (members, m·t, in); a member with fewer rows gets some that nobody looks at."""
        rows = x.reshape(self.rows, -1, x.shape[-1])
        seated = rows if self.source is None else rows[self.source]
        return seated.reshape(self.members, -1, x.shape[-1])

    def add(self, to: Tensor, left: Tensor, right: Tensor) -> None:
        """Add the product of ``left`` (members, m·t, r) and ``right`` (members, r, out) to the rows of ``to``."""
        if self.place is None and to.dtype == left.dtype == right.dtype:
            to.view(self.members, -1, to.shape[-1]).baddbmm_(left, right)
            return
        rows = to.view(self.rows, -1, to.shape[-1])
        product = torch.bmm(left, right).view(-1, *rows.shape[1:])
        rows += product if self.place is None else product[self.place]


@contextmanager
def populated(backbone: Backbone, population: Sequence[Weights], prompts: int) -> Iterator[Seating]:
    """Let the generator's layers give each row its member's update, whatever the active mode; for inference.

    Args:
        backbone: Its own adapters stay as they are.
        population: The members' weights.
        prompts: Prompts of each member.
    """
    seating = Seating(len(population), prompts)
    layers = lora_layers(backbone)
    for name, layer in layers.items():
        a = torch.stack([weights[name].a.T for weights in population])
        b = torch.stack([weights[name].scale * weights[name].b.T for weights in population])
        layer.forward = partial(_answer, layer.base_layer, a, b, seating)
    try:
        yield seating
    finally:
        for layer in layers.values():
            del layer.forward


def _answer(base: nn.Module, a: Tensor, b: Tensor, seating: Seating, x: Tensor) -> Tensor:
    """The base's product and each row's own update; a (members, in, r), b (members, r, out)."""
    result: Tensor = base(x)
    seating.add(result, torch.bmm(seating.group(x.to(a.dtype)), a), b)
    return result


def sample_population(
    backbone: Backbone, population: Sequence[Weights], prompts: Sequence[Tensor], k: int, how: Sampling, uniform: Tensor
) -> list[Rollout]:
    """Every member's k answers to each of B prompts.

    Args:
        backbone: The frozen base with the generator's layers.
        population: The members' weights.
        prompts: B token tensors (P,).
        k: Answers for each prompt.
        how: Temperature, length limit and so on; no beam search.
        uniform: (B·k, T, tries) numbers that decide the tokens, the same for all members.
    """
    if how.num_beams > 1:
        raise LoraGANError("a population cannot answer by beam search: set sampling.num_beams to 1")
    everyone = list(prompts) * len(population)
    with populated(backbone, population, len(prompts)) as seat:
        rollout = sample(backbone, everyone, k, how, uniform.repeat(len(population), 1, 1), seat)
    b = len(prompts)
    return [rollout.of(range(i * b, (i + 1) * b)) for i in range(len(population))]
