"""Multi-LoRA batching: the completions of a whole population are sampled together.

The products with the frozen base, most of the work, are computed for the rows of all members together, so the base's
weights are read once for each token instead of once for each member. Each row then gets the update of its own member.
All members have the same prompts and the same random numbers: they differ by their weights alone. Those of rank-one
noise are small changes of a mean, and come beside the mean's product, which is that of a single model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_gan.backbone import Backbone
from lora_gan.errors import LoraGANError
from lora_gan.evolution.lowrank import Stacked, Weights
from lora_gan.evolution.noise import Perturbed
from lora_gan.evolution.population import lora_layers, member_loaded
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
        outer = left.shape[-1] == 1  # faster by elements than as matrices
        if self.place is None and to.dtype == left.dtype == right.dtype:
            grouped = to.view(self.members, -1, to.shape[-1])
            _ = grouped.addcmul_(left, right) if outer else grouped.baddbmm_(left, right)
            return
        rows = to.view(self.rows, -1, to.shape[-1])
        product = (left * right if outer else torch.bmm(left, right)).view(-1, *rows.shape[1:])
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
    members = population.stacked() if isinstance(population, Perturbed) else Stacked.of(population)
    updates = {
        layer: partial(_add, *_laid_out(members, name), mapping) for name, layer in lora_layers(backbone).items()
    }
    if members.mean is None:
        with patched_forward(updates, lambda layer: partial(_forward, layer.base_layer, updates[layer])):
            yield mapping
    else:  # the generator is the mean, in the way of the sampler, and its layers' results change
        with member_loaded(backbone, members.mean), backbone.generator(), _hooked(updates):
            yield mapping


def _laid_out(members: Stacked, name: str) -> tuple[Tensor, Tensor]:
    """A as (members, in, r) and scale·B as (members, r, out) of a module."""
    x = members.factors[name]
    return x.a.mT.contiguous(), (x.scale * x.b).mT.contiguous()


def _forward(base: nn.Module, update: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    return update(x, base(x))


def _add(a: Tensor, b: Tensor, mapping: RowMapping, x: Tensor, result: Tensor) -> Tensor:
    """Add each row's own update to ``result``; a (members, in, r), b (members, r, out)."""
    mapping.add(result, _times(mapping.group(x.to(a.dtype)), a), b)
    return result


@contextmanager
def _hooked(updates: Mapping[LoraLayer, Callable[[Tensor, Tensor], Tensor]]) -> Iterator[None]:
    """Call each layer's function with its input and its result."""
    with ExitStack() as stack:
        for layer, update in updates.items():
            hook = layer.register_forward_hook(lambda _, args, result, update=update: update(args[0], result))
            stack.callback(hook.remove)
        yield


def _times(rows: Tensor, a: Tensor) -> Tensor:
    """(members, m·t, in) times (members, in, r); a batch of products with one vector each is slow as matrices."""
    return torch.bmm(rows, a) if a.shape[-1] > 1 else torch.linalg.vecdot(rows, a.mT)[..., None]


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
