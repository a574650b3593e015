"""A population in one decode against loading each member's weights and calling ``generate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lora_gan.backbone import Backbone
from lora_gan.evolution.lowrank import Stacked, Weights
from lora_gan.evolution.multi_lora import sample_population
from lora_gan.evolution.noise import Perturbed, RankOneNoise
from lora_gan.evolution.population import read_weights, write_weights
from lora_gan.sampling import Sampling, draw_uniform, sample
from lora_gan.types import Rollout

from .setting import LORA, Size, generated, left_padded, make_items
from .timing import Comparison, compare

MEMBERS, PROMPTS = 8, 16
GROWTH = (8, 64, 256)


class PopulationSides:
    """One frozen model, its members and its prompts; on both sides each member completes each prompt once."""

    def __init__(self, size: Size, folder: Path, members: int = MEMBERS, prompts: int = PROMPTS) -> None:
        self.backbone = Backbone(str(folder), LORA, LORA)
        self.how = Sampling(max_new_tokens=size.completion_tokens)
        items = make_items(size, self.backbone.tokenizer)
        self.prompts = [torch.tensor(items[i % len(items)].prompt_ids) for i in range(prompts)]
        self.members = [self._member() for _ in range(members)]
        self.padded, self.real = left_padded(self.prompts)

    def _member(self) -> Weights:
        for name, parameter in self.backbone.lm.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        return read_weights(self.backbone)

    @property
    def perturbed(self) -> Perturbed:
        """As many members, made of a mean and noise of rank 1."""
        return Perturbed(self.members[0], RankOneNoise(), 0.02, 0, 0, range(len(self.members)))

    def together(self, members: Sequence[Weights] | None = None) -> list[Rollout]:
        """All members in one decode, with their log-probabilities; the making of noise is counted."""
        uniform = draw_uniform(len(self.prompts), self.how, self.backbone.device)
        return sample_population(self.backbone, members or self.members, self.prompts, 1, self.how, uniform)

    @torch.no_grad()
    def one_by_one(self) -> list[Tensor]:
        """Each member by transformers, without log-probabilities."""
        completions = []
        for weights in self.members:
            write_weights(self.backbone, weights)
            with self.backbone.generator():
                completions.append(generated(self.backbone, self.padded, self.real, self.how.max_new_tokens))
        return completions

    def one_model(self) -> Rollout:
        """The generator alone, with as many rows as all members have."""
        rows = self.prompts * len(self.members)
        with self.backbone.generator():
            return sample(self.backbone, rows, 1, self.how, draw_uniform(len(rows), self.how, self.backbone.device))


def compare_population(size: Size, folder: Path, repeats: int) -> Iterator[Comparison]:
    """8 members × 16 prompts, against each member by itself; and as many rows of more and more members, against one."""
    sides = PopulationSides(size, folder)
    what = f"{MEMBERS} members × {PROMPTS} prompts"
    yield compare(size.name, what, "`generate` for each member", sides.together, sides.one_by_one, 2.5, repeats)
    for members in GROWTH:
        sides = PopulationSides(size, folder, members, max(1, MEMBERS * PROMPTS // members))
        for kind, members_of in {"A and B": sides.members, "rank-one noise": sides.perturbed}.items():
            what = f"{members} members × {len(sides.prompts)} prompts, {kind}, {megabytes(members_of):.2f} MB each"
            decode = partial(sides.together, members_of)
            yield compare(size.name, what, "one model, equal rows", decode, sides.one_model, 0.8, repeats)


def megabytes(members: Sequence[Weights]) -> float:
    """What a member takes in a decode."""
    stacked = members.stacked() if isinstance(members, Perturbed) else Stacked.of(members)
    return sum(w.nbytes for x in stacked.factors.values() for w in (x.a, x.b)) / len(members) / 1e6
