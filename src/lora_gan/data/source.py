"""Sources of examples: the interface between a data set and the data module."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from inspect import signature
from itertools import islice
from typing import Any, Literal

from lora_gan.data.files import Row, read_rows
from lora_gan.data.templates import default_template, fields_of, prompt, user_message
from lora_gan.errors import DataError, LoraGANError
from lora_gan.types import Example

log = logging.getLogger("lora_gan")

OnBad = Literal["raise", "drop"]


class Source(ABC):
    """One data set as examples. A subclass writes :meth:`rows`; its constructor arguments are its settings.

    ``dropped`` and ``repaired`` count, by reason, the raw rows that the last run of :meth:`rows` left out or repaired.
    """

    path: str | None = None  # the file or hub id it reads; None where it reads none

    def __init__(self, on_bad_row: OnBad = "raise") -> None:
        self.on_bad_row = on_bad_row
        self.dropped: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()

    @property
    def name(self) -> str:
        """What logs and ``Example.source`` call it."""
        return type(self).__name__.lower()

    @property
    def note(self) -> str:
        """A limitation of this data that a reader of the results must know; empty where there is none."""
        return ""

    def probes(self) -> Sequence[tuple[str, str]]:
        """Beginnings of statements of its world, and how they go on, to measure what training forgets; often none."""
        return ()

    @property
    def prompt_templates(self) -> tuple[str, ...]:
        """The templates of its prompts, each with its own fields; inference writes prompts with them, too."""
        return (default_template("{prompt}"),)

    @property
    def turn_templates(self) -> Mapping[str, str] | None:
        """The templates of a turn, with {text}, by role; None where prompts are single questions."""
        return None

    @property
    def system(self) -> str | None:
        """The system message of all its dialogues; None where they have none, or each its own."""
        return None

    @abstractmethod
    def rows(self) -> Iterable[Example]:
        """All usable examples, in the order of the data set."""

    def make(self, template: str, fields: Mapping[str, str], cuttable: Collection[str] = (), **known: Any) -> Example:
        """An example whose prompt is ``template`` with its ``fields`` filled in; ``known`` is the rest of it."""
        made = prompt(template, cuttable, **fields)
        dialogue = (user_message(self.said(template), fields, cuttable),)
        return Example(
            made.text,
            cuttable=made.cuttable,
            literal=made.literal,
            messages=dialogue,
            source=self.name,
            **known,
        )

    def said(self, template: str) -> str:
        """The template of what the user says in a chat: an own one, or only the fields of the default of the class."""
        if template not in _defaults(type(self)):
            return template
        return "\n\n".join(f"{{{name}}}" for name in fields_of(template))

    def forget_counts(self) -> None:
        """Count from 0 again."""
        self.dropped.clear()
        self.repaired.clear()

    def bad(self, error: DataError) -> None:
        """Drop and count a row that cannot be used, or raise its error, as ``on_bad_row`` says."""
        if self.on_bad_row == "raise":
            raise error
        if not self.dropped["bad_row"]:
            log.warning("the first bad row, dropped because of on_bad_row: drop: %s", error)
        self.dropped["bad_row"] += 1

    def with_path(self, path: str) -> Source:
        """The same settings, reading ``path``."""
        if self.path is None:
            raise DataError(
                f"the source {self.name} reads no file, so data.init_args.path={path} has no effect; "
                "leave out data.init_args.source, or set it to one that does, such as lora_gan.data.OwnFile"
            )
        other = copy.deepcopy(self)
        other.path = path
        return other


class RowSource(Source):
    """A data set whose rows are examples of their own. A subclass writes :meth:`example`."""

    path: str

    def __init__(self, path: str, limit: int | None = None, on_bad_row: OnBad = "raise") -> None:
        super().__init__(on_bad_row)
        if limit is not None and limit < 1:
            raise LoraGANError(f"limit must be at least 1, got {limit}; leave it out to use every row")
        self.path = path
        self.limit = limit

    @abstractmethod
    def example(self, row: Row) -> Example | None:
        """``row`` as an example; None where it is left out, which :attr:`dropped` counts."""

    def rows(self) -> Iterable[Example]:
        self.forget_counts()
        return islice(self._usable(), self.limit)

    def read(self) -> Iterator[Row]:
        """The raw rows."""
        return read_rows(self.path, bad=self.bad)

    def examples(self, row: Row) -> Sequence[Example]:
        """What ``row`` gives: an example or none; several where a row holds several."""
        example = self.example(row)
        return () if example is None else (example,)

    def accept(self, row: Row) -> Sequence[Example]:
        """:meth:`examples`, or what :attr:`on_bad_row` says where the row has a fault."""
        try:
            examples = self.examples(row)
        except DataError as error:
            self.bad(error)
            return ()
        self.repaired.update(row.repaired)
        return examples

    def _usable(self) -> Iterator[Example]:
        for row in self.read():
            yield from self.accept(row)


@cache
def _defaults(source: type[Source]) -> list[Any]:
    return [parameter.default for parameter in signature(source).parameters.values()]


def normal(text: str) -> str:
    """``text`` without case and spacing, to find what is the same."""
    return " ".join(text.casefold().split())
