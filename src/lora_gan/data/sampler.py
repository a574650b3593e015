"""The order of training: seeded, by prompt length where wanted, and resumable inside an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from lora_gan.data.splits import digest


@dataclass(frozen=True)
class Place:
    """So many batches of an epoch have been trained on."""

    epoch: int = 0
    batches: int = 0

    def after_batch(self, epoch: int) -> Place:
        """The place when one more batch, of ``epoch``, is trained on."""
        return Place(epoch, self.batches + 1 if epoch == self.epoch else 1)


class BucketSampler(Sampler[int]):
    """Each index once, in an order that (seed, epoch) decides. Lightning calls :meth:`set_epoch`.

    Of each ``bucket_batches`` batches those of like length come into one batch; what does not fill a batch comes last.
    In the epoch of ``start`` the batches before it are left out.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        seed: int,
        batch_size: int = 1,
        bucket_batches: int = 1,
        start: Place | None = None,
    ) -> None:
        self.lengths = lengths
        self.seed = seed
        self.batch_size = batch_size
        self.bucket_batches = bucket_batches
        self.start = start or Place()
        self.epoch = self.start.epoch  # Lightning makes the first iterator before it sets the epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Of a whole epoch, also where it is begun in the middle: Lightning adds the batches before."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        skipped = self.start.batches * self.batch_size if self.epoch == self.start.epoch else 0
        yield from self._order()[skipped:]

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed(int(digest(self.seed, self.epoch)[:15], 16))
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        if self.bucket_batches == 1:
            return order
        whole = len(order) - len(order) % self.batch_size
        size = self.batch_size * self.bucket_batches
        alike = [
            index
            for start in range(0, whole, size)
            for index in sorted(order[start : min(start + size, whole)], key=self.lengths.__getitem__)
        ]
        batches = [alike[start : start + self.batch_size] for start in range(0, whole, self.batch_size)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [index for number in shuffled for index in batches[number]] + order[whole:]
