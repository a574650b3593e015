"""Sampler of training examples: seeded, optionally by prompt length, distributed, resumable within an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.utils.data import Dataset, DistributedSampler

from lora_gan.data.splits import digest


@dataclass(frozen=True)
class EpochPosition:
    """Number of batches of an epoch that have been trained on."""

    epoch: int = 0
    batches: int = 0

    def after_batch(self, epoch: int) -> EpochPosition:
        """The position after one more batch of ``epoch``."""
        return EpochPosition(epoch, self.batches + 1 if epoch == self.epoch else 1)


class BucketSampler(DistributedSampler[int]):
    """Yields each index once, in an order given by seed and epoch. Lightning calls :meth:`set_epoch`.

    A step takes one batch in each process. Together, the processes follow the order of a single process with a batch of
    the same total size; indices that cannot be divided evenly are dropped. Within ``bucket_batches`` steps, prompts of
    similar length share a step; an incomplete step comes last. In the epoch of ``start``, the batches before it are
    skipped, but the length is that of a whole epoch, because Lightning counts the skipped batches, too.

    It is a DistributedSampler because Lightning replaces any other sampler, which would lose the position.

    Args:
        lengths: Number of tokens of each prompt.
        seed: Seed of the order.
        batch_size: Indices in a batch of one process.
        bucket_batches: Steps that are sorted by length together; 1 means a random order.
        start: Position to resume from.
        num_replicas: Number of processes.
        rank: Index of this process.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        seed: int,
        batch_size: int = 1,
        bucket_batches: int = 1,
        start: EpochPosition | None = None,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(cast(Dataset[int], lengths), num_replicas, rank, seed=seed, drop_last=True)
        self.lengths = lengths
        self.step_size = batch_size * num_replicas
        self.bucket_batches = bucket_batches
        self.start = start or EpochPosition()
        self.epoch = self.start.epoch  # Lightning makes the first iterator before it sets the epoch

    def __iter__(self) -> Iterator[int]:
        skipped = self.start.batches * self.step_size if self.epoch == self.start.epoch else 0
        yield from self._order()[skipped + self.rank : self.total_size : self.num_replicas]

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(int(digest(self.seed, self.epoch)[:15], 16))
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        if self.bucket_batches == 1:
            return order
        whole = len(order) - len(order) % self.step_size
        size = self.step_size * self.bucket_batches
        alike = [
            index
            for start in range(0, whole, size)
            for index in sorted(order[start : min(start + size, whole)], key=self.lengths.__getitem__)
        ]
        steps = [alike[start : start + self.step_size] for start in range(0, whole, self.step_size)]
        shuffled = torch.randperm(len(steps), generator=generator).tolist()
        return [index for number in shuffled for index in steps[number]] + order[whole:]
