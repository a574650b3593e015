"""Online learning: prompts and targets from a file that grows, or from stdin, without end."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset, IterableDataset

from lora_gan.data.base import TextDataModule, collate, format_counts, silence_resume_advice
from lora_gan.data.checks import check, checked
from lora_gan.data.files import line_row
from lora_gan.data.fitting import LengthFilter
from lora_gan.data.source import RowSource
from lora_gan.data.sources.standard import StandardFormat
from lora_gan.data.tail import Line, Position, Tail
from lora_gan.data.tokenizer import Encoded
from lora_gan.errors import DataError, LoraGANError
from lora_gan.types import Example, PromptBatch

log = logging.getLogger("lora_gan")


class StreamDataModule(TextDataModule):
    """Trains on rows as they arrive, each once and in their order; holds a batch of them at a time.

    A checkpoint knows which row was trained on last, so a resumed run continues with the next one. Lightning
    fetches one batch ahead: a batch is trained on when the next one has arrived or the stream has ended.
    """

    source: RowSource

    def __init__(
        self,
        path: str,
        source: RowSource | None = None,
        validation_path: str | None = None,
        validation_rows: int = 0,
        poll_seconds: float = 1.0,
        stop_after_seconds: float | None = None,
        **shared: Any,
    ) -> None:
        """
        Args:
            path: A .jsonl file that may grow while it is read, a named pipe, or "-" for stdin.
            source: How a row becomes an example (its own path is not read); by default StandardFormat,
                which takes the format of the first row.
            validation_path: A file to validate on, in the format of the stream; it is read whole.
            validation_rows: Keep the first so many usable rows of the stream for validation instead.
            poll_seconds: Time between two looks at a file that has not grown.
            stop_after_seconds: Training ends when nothing has arrived for so long; by default it waits forever.
            shared: The settings of :class:`TextDataModule`.
        """
        super().__init__(**shared)
        if not poll_seconds > 0:
            raise LoraGANError(f"poll_seconds must be > 0, got {poll_seconds}; set data.init_args.poll_seconds")
        if stop_after_seconds is not None and not stop_after_seconds >= 0:
            raise LoraGANError(f"stop_after_seconds must be >= 0, got {stop_after_seconds}; leave it out to wait")
        if validation_rows < 0 or (validation_rows and validation_path):
            raise LoraGANError(
                f"validation_rows must be >= 0, and 0 where validation_path is given, got {validation_rows}; "
                "give one of the two"
            )
        if isinstance(source, StandardFormat) and source.every_turn:
            raise LoraGANError("a stream makes one example of each row; set every_turn of its source to false")
        self.path = path
        self.source = source or StandardFormat(path)
        self.validation_path = validation_path
        self.validation_rows = validation_rows
        self.poll_seconds = poll_seconds
        self.stop_after_seconds = stop_after_seconds
        self.validation: tuple[Encoded, ...] = ()
        self.trained = Position()
        self.rows_trained = 0
        self.fetched = Position()
        self.ended = False

    @cached_property
    def tail(self) -> Tail:
        return Tail(self.path, self.poll_seconds, self.stop_after_seconds)

    @cached_property
    def fitter(self) -> LengthFilter:
        return self.length_filter()

    def setup(self, stage: str | None = None) -> None:
        """Takes the rows of validation, once.

        Raises:
            DataError: There is no row to validate on or, in ``fit``, the stream ended before one to train on.
        """
        if self.validation:
            return
        if self.validation_path:
            examples = list(checked(self.source.with_path(self.validation_path).rows(), self.source.name))
            self.validation = tuple(self.fitter.fit(examples))
        elif self.validation_rows:
            self.validation = tuple(islice(self.rows(), self.validation_rows))
        if (self.validation_path or self.validation_rows) and not self.validation:
            raise DataError(f"{self.validation_path or self.path} gives no row to validate on; give more rows")
        if self.validation_rows:
            if stage == "fit" and len(self.validation) < self.validation_rows:
                raise self._nothing_to_train_on()
            self.trained = _position(self.validation[-1].example)

    def train_dataloader(self) -> DataLoader[Encoded]:
        """The stream from behind the last row that was trained on."""
        if self.trainer is not None and self.trainer.world_size > 1:
            raise LoraGANError("a stream feeds one device only; set trainer.devices: 1")
        self.tail.seek(self.trained)
        self.fetched, self.ended = self.trained, False
        return DataLoader(_Stream(self), batch_size=self.batch_size, collate_fn=collate)

    def val_dataloader(self) -> DataLoader[Encoded]:
        items = cast(Dataset[Encoded], self.validation)
        return DataLoader(items, batch_size=self.eval_batch_size, collate_fn=collate)

    @property
    def dropped(self) -> Counter[str]:
        """How many rows this run left out, by reason."""
        return self.source.dropped + self.fitter.dropped

    def rows(self) -> Iterator[Encoded]:
        """Usable rows as they arrive; each example holds where it ends in the stream."""
        for line in self.tail.lines():
            for item in self._items(line):
                self.fetched = _position(item.example)
                yield item

    def training_rows(self) -> Iterator[Encoded]:
        """Every row; at the end of the stream training ends, too."""
        yield from self.rows()
        repaired = format_counts(self.source.repaired + self.fitter.repaired)
        log.info(
            "the stream %s has ended; rows dropped: %s; repaired: %s", self.path, format_counts(self.dropped), repaired
        )
        if not self.rows_trained and self.fetched == self.trained:
            if self.validation_rows:
                raise self._nothing_to_train_on()
            log.warning(str(self._nothing_to_train_on()))  # nothing new has arrived
        self.ended = True
        self._stop_at_the_end()

    def on_after_batch_transfer(self, batch: PromptBatch, dataloader_idx: int) -> PromptBatch:
        """Notes the batch that training takes now; those that were only fetched do not count."""
        if self.trainer is not None and self.trainer.training:
            self.trained = _position(batch.examples[-1])
            self.rows_trained += len(batch)
            self._stop_at_the_end()
        return batch

    def state_dict(self) -> dict[str, Any]:
        place = {"offset": self.trained.offset, "lines": self.trained.lines}
        return {"path": self.path, **place, "rows_trained": self.rows_trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.trained = Position(state_dict["offset"], state_dict["lines"])
        if state_dict["path"] != self.path:
            log.warning(
                "data.init_args.path was %s and is %s: taken for the same stream, which continues after line %d",
                state_dict["path"],
                self.path,
                self.trained.lines,
            )
        self.rows_trained = state_dict["rows_trained"]
        silence_resume_advice()

    def teardown(self, stage: str) -> None:
        """Close the file; the next run opens it again."""
        if "tail" in self.__dict__ and self.tail.seekable:
            self.tail.close()
            del self.tail

    def _nothing_to_train_on(self) -> DataError:
        usable = len(self.validation) if self.validation_rows else 0
        taken = f", and validation_rows: {self.validation_rows} takes them all for validation" * bool(usable)
        lower = f"lower data.init_args.validation_rows below {usable}, or " * bool(usable)
        return DataError(
            f"the stream {self.path} ended after {usable} usable rows (dropped: {format_counts(self.dropped)}){taken}, "
            f"so there is nothing to train on; {lower}give more rows"
        )

    def _stop_at_the_end(self) -> None:
        if self.ended and self.trained == self.fetched and self.trainer is not None:
            self.trainer.should_stop = True

    def _items(self, line: Line) -> Iterator[Encoded]:
        """What the line holds: an item, or nothing."""
        where = f"{'stdin' if self.path == '-' else self.path}, line {line.number}"
        if not line.content.strip():
            return
        try:
            row = line_row(_decoded(line, where), where)
            example = self.source.example(row)
            self.source.repaired.update(row.repaired)
        except DataError as error:
            if line.whole:
                self.source.bad(error)
            else:
                log.warning("%s has no line break and cannot be read; the next run reads it", where)
            return
        if example is not None:
            check(example, where)
            yield from self.fitter.fit([replace(example, stream_end=(line.end, line.number))])


class _Stream(IterableDataset[Encoded]):
    def __init__(self, data: StreamDataModule) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Encoded]:
        return self.data.training_rows()


def _position(example: Example) -> Position:
    assert example.stream_end is not None
    return Position(*example.stream_end)


def _decoded(line: Line, where: str) -> str:
    try:
        return line.content.strip().decode("utf-8-sig" if line.number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not valid UTF-8; write the stream as UTF-8") from error
