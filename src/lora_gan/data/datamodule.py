"""One data module for every source: split, thin, tokenise, drop what does not fit, serve batches of prompts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from lora_gan.data.base import (
    TextDataModule,
    check_sizes,
    collate,
    describe_prompts,
    format_counts,
    silence_resume_advice,
)
from lora_gan.data.checks import checked
from lora_gan.data.fitting import LengthLimits
from lora_gan.data.sampler import BucketSampler, EpochPosition
from lora_gan.data.source import Source
from lora_gan.data.sources.builtin import BuiltinWorld
from lora_gan.data.sources.standard import StandardFormat
from lora_gan.data.splits import SMALLEST, SPLITS, SplitExamples, assign_splits, digest, few_answered, one_wording_each
from lora_gan.data.tokenizer import Encoded, encode
from lora_gan.errors import DataError, LoraGANError
from lora_gan.lightning_compat import share_of_process
from lora_gan.types import Example, PromptBatch

MORE_ROWS = (
    f"give more rows: with {SMALLEST} different prompts each split gets one, unless data.init_args.validation or "
    "data.init_args.test is 0"
)
EFFECTS = {  # of an empty split
    "train": ": fit ends with an error",
    "validation": ": validation is skipped",
    "test": ": fit ends without its test",
}
log = logging.getLogger("lora_gan")


@dataclass(frozen=True)
class Split:
    """What is served of one split, and how many examples were left out or repaired, by reason."""

    items: tuple[Encoded, ...]
    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)


class InstructionDataModule(TextDataModule):
    """Prompts with targets, references and negatives, from any source."""

    def __init__(
        self,
        source: Source | None = None,
        path: str | None = None,
        validation: float = 0.1,
        test: float = 0.2,
        max_validation: int | None = None,
        max_test: int | None = None,
        bucket_batches: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        answered: float = 1.0,
        **shared: Any,
    ) -> None:
        """
        Args:
            source: Where the examples come from; by default the built-in world, or StandardFormat where path is
                given.
            path: A local file or hub id that the source reads instead of its own.
            validation: Share of the groups held out for validation, where the source has no official split; at least
                one group, if there are three.
            test: Share of the groups held out for the test, in the same way.
            max_validation: Use only so many validation examples, drawn by hash.
            max_test: Use only so many test examples, drawn by hash.
            bucket_batches: Batches among which prompts are sorted by length, against padding; 1: none are.
            seed: Decides the split and the order of training.
            num_workers: Processes that prepare batches; 0 does it in the main process.
            answered: Share of the training groups that keep their answers; the others become prompts of which nothing
                is known, and the first are repeated so that they are half of the rows. To try how few answers do.
            shared: The settings of :class:`TextDataModule`.
        """
        super().__init__(**shared)
        check_sizes({"max_validation": max_validation, "max_test": max_test, "bucket_batches": bucket_batches})
        _check_fractions(validation, test)
        if not 0 <= answered <= 1:
            raise LoraGANError(f"answered must be a share from 0 to 1, got {answered}; set data.init_args.answered")
        if num_workers < 0:
            raise LoraGANError(f"num_workers must be at least 0, got {num_workers}; 0 uses the main process")
        if path is None:
            self.source = source or BuiltinWorld()
        else:
            self.source = (source or StandardFormat(path)).with_path(path)
        self.fractions = {"validation": validation, "test": test}
        self.largest = {"validation": max_validation, "test": max_test}
        self.bucket_batches = bucket_batches
        self.seed = seed
        self.num_workers = num_workers
        self.answered = answered
        self.splits: dict[str, Split] = {}
        self.fitted_to: LengthLimits | None = None
        self.trains = False  # whether this run has been set up to train
        self.trained = EpochPosition()
        self.trained_order: dict[str, int | str] = {}

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its completion together."""
        return self.limits.total

    def setup(self, stage: str | None = None) -> None:
        """Reads the source once, for all stages."""
        self.trains = self.trains or stage == "fit"
        if self.splits and self.fitted_to == self.limits:
            return
        self.read()
        log.info(self._summary())
        if not self.splits["test"].items and self.fractions["test"]:
            log.warning(self.without("test", EFFECTS["test"]))

    def read(self) -> None:
        """Reads the source and splits, tokenises and thins its examples.

        Raises:
            DataError: There is no usable row, or nothing fits into the limits.
        """
        examples = list(checked(self.source.rows(), self.source.name))
        if not examples:
            raise DataError(
                f"{self.origin} gives no usable row (dropped: {format_counts(self.source.dropped)}); fix the rows"
            )
        self.has_dialogues = all(example.messages for example in examples)
        self.fitted_to = self.limits
        placed = assign_splits(examples, self.fractions, self.seed)
        placed["train"] = few_answered(placed["train"], self.answered, self.seed)
        split = {name: self._fit(part) for name, part in placed.items()}
        held_out = {name: self._thin(name, split[name]) for name in SPLITS[1:]}
        self.splits = split | held_out
        if not any(split.items for split in self.splits.values()):
            raise self._nothing_fits(examples)

    def train_dataloader(self) -> DataLoader[Encoded]:
        """A new order each epoch, dealt out to the processes; what does not fill a step is left out."""
        items = self._items("train")
        sampler = self._sampler(items)
        if len(sampler) < self.batch_size:
            log.warning(
                "only %d training examples for data.init_args.batch_size=%d in each process: a step takes all of them",
                len(items),
                self.batch_size,
            )
        return DataLoader(
            cast(Dataset[Encoded], items),
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=len(sampler) >= self.batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
        )

    def on_after_batch_transfer(self, batch: PromptBatch, dataloader_idx: int) -> PromptBatch:
        """Notes the batch that training takes now; those that were only fetched do not count."""
        if self.trainer is not None and self.trainer.training:
            self.trained = self.trained.after_batch(self.trainer.current_epoch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where in which epoch training stands, and in which order."""
        return {"epoch": self.trained.epoch, "batches": self.trained.batches, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.trained = EpochPosition(state_dict["epoch"], state_dict["batches"])
        self.trained_order = state_dict["order"]
        silence_resume_advice()

    def _sampler(self, items: tuple[Encoded, ...]) -> BucketSampler:
        now, processes = self._order(), self._share["num_replicas"]
        changed = [name for name, value in self.trained_order.items() if value != now[name]]
        if changed:
            log.warning(
                "not as in the checkpoint: data.init_args.%s; the epoch starts again, so some prompts come twice",
                ", ".join(changed),
            )
            self.trained = EpochPosition()
        if len(items) < processes:
            raise DataError(
                f"{len(items)} training examples cannot be dealt out to {processes} processes; "
                "give more rows or lower trainer.devices"
            )
        batches = max(len(items) // (self.batch_size * processes), 1)
        start = self.trained if self.trained.batches < batches else EpochPosition(self.trained.epoch + 1)
        lengths = [len(item.prompt_ids) for item in items]
        return BucketSampler(lengths, self.seed, self.batch_size, self.bucket_batches, start, **self._share)

    @property
    def _share(self) -> dict[str, int]:
        """How many processes there are and which of them this is, as a sampler takes it."""
        return share_of_process(self.trainer)

    def _order(self) -> dict[str, int | str]:
        """What the order of training depends on, by the names of the settings."""
        items = self.splits["train"].items if self.splits else ()
        return {
            "seed": self.seed,
            "batch_size (times processes)": self.batch_size * self._share["num_replicas"],
            "bucket_batches": self.bucket_batches,
            "source (or path, or splits)": digest(*(item.example.prompt for item in items)),
        }

    def draw(self, count: int) -> PromptBatch:
        """Training examples by the random numbers of torch, none twice unless there are too few."""
        items = self.splits["train"].items
        order = [int(i) for _ in range(-(-count // len(items))) for i in torch.randperm(len(items))[:count]]
        return collate([items[i] for i in order[:count]])

    @property
    def bare_prompts(self) -> int:
        """How many training examples have no target."""
        return sum(not item.example.target.strip() for item in self.splits["train"].items)

    def val_dataloader(self) -> DataLoader[Encoded]:
        return self._eval_dataloader("validation")

    def test_dataloader(self) -> DataLoader[Encoded]:
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader[Encoded]:
        """The test prompts."""
        return self._eval_dataloader("test")

    def _eval_dataloader(self, name: str) -> DataLoader[Encoded]:
        return DataLoader(
            cast(Dataset[Encoded], self._items(name)),
            batch_size=self.eval_batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
        )

    def _items(self, name: str) -> tuple[Encoded, ...]:
        items = self.splits[name].items
        if not items and name == "validation":
            log.warning(self.without(name, EFFECTS[name]))
        elif not items and not (name == "test" and self.trains):
            note = f" ({self.source.note})" * bool(self.source.note)
            raise DataError(f"{self.origin} leaves {self.without(name)}{note}")
        return items

    def gaps(self) -> list[str]:
        """For each empty split that ``fit`` wants, what it says of that."""
        wanted = {"test": self.fractions["test"] > 0}
        empty = [name for name, split in self.splits.items() if not split.items and wanted.get(name, True)]
        return [self.without(name, EFFECTS[name]) for name in empty]

    def without(self, name: str, effect: str = "") -> str:
        """That a split is empty, the effect of that, and how to fill it."""
        dropped = +self.splits[name].dropped
        counts = f" (dropped: {format_counts(dropped)})" if dropped else ""
        return f"no {name} examples{counts}{effect}; {MORE_ROWS}"

    def _fit(self, placed: SplitExamples) -> Split:
        """Tokenises and leaves out what is too long: examples, or single negatives."""
        fitter = self.length_filter()
        items = tuple(fitter.fit(placed.examples))
        return Split(items, placed.dropped + fitter.dropped, fitter.repaired)

    def _thin(self, name: str, split: Split) -> Split:
        """A held-out split asks each item in one wording, and no more of them than its limit."""
        chosen = one_wording_each([item.example for item in split.items], self.seed)
        kept = sorted(chosen[: self.largest[name]])
        left_out = Counter(other_wording=len(split.items) - len(chosen), over_the_limit=len(chosen) - len(kept))
        return Split(tuple(split.items[i] for i in kept), split.dropped + left_out, split.repaired)

    def _nothing_fits(self, examples: Sequence[Example]) -> DataError:
        items = encode(self.tokenizer, examples)
        prompt = max(len(item.prompt_ids) for item in items)
        target = max(len(item.target_ids) for item in items)
        if not prompt:
            return DataError(f"every prompt of {self.origin} is empty, so there is nothing to complete; write prompts")
        return DataError(
            f"no example of {self.origin} fits: the longest prompt has {prompt} tokens "
            f"(max_prompt_tokens {self.max_prompt_tokens}), the longest target {target} "
            f"(max_target_tokens {self.max_target_tokens}), and together they may have {self.context}; "
            "raise these data.init_args, take a base with a longer context, or shorten the rows"
        )

    @property
    def origin(self) -> str:
        """The source and what it reads."""
        return f"{self.source.name} ({self.source.path})" if self.source.path else self.source.name

    def _summary(self) -> str:
        lines = [f"data: {self.origin}, rows dropped: {format_counts(self.source.dropped)}"]
        lines.append(f"  rows repaired: {format_counts(self.source.repaired)}")
        lines.append(f"  prompts: {describe_prompts(self)}")
        lines.append(f"  {'split':<12}{'kept':>8}{'groups':>8}  dropped")
        if self.answered < 1:
            train = [item.example for item in self.splits["train"].items]
            known = len({example.group for example in train if example.is_answered})
            lines.append(f"  answered: {known:,} groups of the training split keep their answers, and are repeated")
        for name, split in self.splits.items():
            groups = len({item.example.group for item in split.items})
            repaired = f" (repaired: {format_counts(split.repaired)})" * bool(+split.repaired)
            lines.append(f"  {name:<12}{len(split.items):>8,}{groups:>8,}  {format_counts(split.dropped)}{repaired}")
        if self.source.note:
            lines.append(f"  note: {self.source.note}")
        return "\n".join(lines)


def _check_fractions(validation: float, test: float) -> None:
    for name, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            raise LoraGANError(f"{name} must be a share from 0 to below 1, got {share}; set data.init_args.{name}")
    if validation + test >= 1:
        raise LoraGANError(
            f"validation {validation} and test {test} leave nothing to train on; make their sum less than 1"
        )
