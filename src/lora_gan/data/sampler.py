"""The order of training: seeded, by prompt length where wanted, for any number of processes, resumable in an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.utils.data import Dataset, DistributedSampler

from lora_gan.data.splits import digest


@dataclass(frozen=True)
class EpochPosition:
    """So many batches of an epoch have been trained on."""

    epoch: int = 0
    batches: int = 0

    def after_batch(self, epoch: int) -> EpochPosition:
        """The place when one more batch, of ``epoch``, is trained on."""
        return EpochPosition(epoch, self.batches + 1 if epoch == self.epoch else 1)


class BucketSampler(DistributedSampler[int]):
    """Each index once, in an order that (seed, epoch) decides. Lightning calls :meth:`set_epoch`.

    A step takes a batch in each process: together they go through the order of one process whose batches are as large
    as all of theirs, and what cannot be dealt out evenly is left out. Of each ``bucket_batches`` steps those of like
    length come into one step; what does not fill a step comes last. In the epoch of ``start`` the batches before it
    are left out; the length is that of a whole epoch, since Lightning adds the batches before.

    It is a DistributedSampler so that Lightning takes it as it is: any other is dealt out anew, from its beginning.

    Args:
        lengths: Tokens of each prompt.
        seed: Decides the order.
        batch_size: Indices in a batch.
        bucket_batches: Steps that are sorted together; 1 leaves all to chance.
        start: Where to begin.
        num_replicas: How many processes there are.
        rank: Which of them this is.
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
        self.round_size = batch_size * num_replicas
        self.bucket_batches = bucket_batches
        self.start = start or EpochPosition()
        self.epoch = self.start.epoch  # Lightning makes the first iterator before it sets the epoch

    def __iter__(self) -> Iterator[int]:
        skipped = self.start.batches * self.round_size if self.epoch == self.start.epoch else 0
        yield from self._order()[skipped + self.rank : self.total_size : self.num_replicas]

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(int(digest(self.seed, self.epoch)[:15], 16))
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        if self.bucket_batches == 1:
            return order
        whole = len(order) - len(order) % self.round_size
        size = self.round_size * self.bucket_batches
        alike = [
            index
            for start in range(0, whole, size)
            for index in sorted(order[start : min(start + size, whole)], key=self.lengths.__getitem__)
        ]
        steps = [alike[start : start + self.round_size] for start in range(0, whole, self.round_size)]
        shuffled = torch.randperm(len(steps), generator=generator).tolist()
        return [index for number in shuffled for index in steps[number]] + order[whole:]
