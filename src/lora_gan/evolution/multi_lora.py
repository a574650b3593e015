"""Multi-LoRA batching: the completions of a whole population are sampled together.

The products with the frozen base, most of the work, are computed for the rows of all members together, so the base's
weights are read once for each token instead of once for each member. Each row then gets the update of its own member.
All members have the same prompts and the same random numbers: they differ by their weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_gan.backbone import Backbone
from lora_gan.errors import LoraGANError
from lora_gan.evolution.lowrank import Weights
from lora_gan.evolution.population import lora_layers
from lora_gan.lightning_compat import patched_forward
from lora_gan.sampling import Sampling, prepare, sample
from lora_gan.types import Rollout


class RowMapping:
    """Row-to-adapter mapping: the member of each row of the model's batch.

    Args:
        members: Size of the population.
        prompts: Prompts of each member; rows are ordered by member.
    """

    def __init__(self, members: int, prompts: int) -> None:
        self.members = members
        self.prompts = prompts
        self.rows = 0
        self.source: Tensor | None = None  # (members·m,) row at each place; None: equally many rows for all
        self.place: Tensor | None = None  # (n,) place of each row

    def __call__(self, prompt: Tensor) -> None:
        """Set the mapping of n rows from the prompt of each, (n,) ascending."""
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
        """(n·t, in) or (n, t, in) → (members, m·t, in); members with fewer rows get padding."""
        rows = x.reshape(self.rows, -1, x.shape[-1])
        grouped = rows if self.source is None else rows[self.source]
        return grouped.reshape(self.members, -1, x.shape[-1])

    def add(self, to: Tensor, left: Tensor, right: Tensor) -> None:
        """Add the product of ``left`` (members, m·t, r) and ``right`` (members, r, out) to the rows of ``to``."""
        if self.place is None and to.dtype == left.dtype == right.dtype:
            to.view(self.members, -1, to.shape[-1]).baddbmm_(left, right)
            return
        rows = to.view(self.rows, -1, to.shape[-1])
        product = torch.bmm(left, right).view(-1, *rows.shape[1:])
        rows += product if self.place is None else product[self.place]


@contextmanager
def multi_lora(backbone: Backbone, population: Sequence[Weights], prompts: int) -> Iterator[RowMapping]:
    """Apply to each row the update of its member, in any mode of the backbone; for inference only.

    Args:
        backbone: Its own adapters are not modified.
        population: The members' weights.
        prompts: Prompts of each member.
    """
    mapping = RowMapping(len(population), prompts)
    layers = lora_layers(backbone)
    names = {layer: name for name, layer in layers.items()}

    def update(layer: LoraLayer) -> Callable[[Tensor], Tensor]:
        name = names[layer]
        a = torch.stack([weights[name].a.T for weights in population])
        b = torch.stack([weights[name].scale * weights[name].b.T for weights in population])
        return partial(_forward, layer.base_layer, a, b, mapping)

    with patched_forward(layers.values(), update):
        yield mapping


def _forward(base: nn.Module, a: Tensor, b: Tensor, mapping: RowMapping, x: Tensor) -> Tensor:
    """The base's product plus each row's own update; a (members, in, r), b (members, r, out)."""
    result: Tensor = base(x)
    mapping.add(result, torch.bmm(mapping.group(x.to(a.dtype)), a), b)
    return result


def sample_population(
    backbone: Backbone, population: Sequence[Weights], prompts: Sequence[Tensor], k: int, how: Sampling, uniform: Tensor
) -> list[Rollout]:
    """The rollouts of all members: k completions for each of B prompts.

    Args:
        backbone: The frozen base with the generator's layers.
        population: The members' weights.
        prompts: B token tensors (P,).
        k: Completions for each prompt.
        how: Temperature, length limit and so on; no beam search.
        uniform: (B·k, T, tries) random numbers that decide the tokens, the same for all members.

    Raises:
        LoraGANError: ``how`` asks for beam search.
    """
    if how.num_beams > 1:
        raise LoraGANError(f"a population cannot use beam search, got num_beams {how.num_beams}: set num_beams to 1")
    prepare(backbone)
    repeated = list(prompts) * len(population)
    with multi_lora(backbone, population, len(prompts)) as mapping:
        rollout = sample(backbone, repeated, k, how, uniform.repeat(len(population), 1, 1), mapping)
    b = len(prompts)
    return [rollout.of(range(i * b, (i + 1) * b)) for i in range(len(population))]
