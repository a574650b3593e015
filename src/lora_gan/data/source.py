"""The seam between a data set and the data module."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable

from lora_gan.errors import DataError
from lora_gan.types import Example


class Source(ABC):
    """One data set as examples. A subclass writes :meth:`rows`; its constructor arguments are its settings.

    Two keys of ``Example.meta`` mean something to the data module:

    - ``split`` ("train", "validation" or "test"): the official split, which wins over the hash of the group;
    - ``item``: examples that share it ask the same thing in other words; evaluation keeps one of them.

    ``dropped`` and ``repaired`` count, by reason, the raw rows that the last run of :meth:`rows` left out or mended.
    """

    path: str | None = None  # the file or hub id it reads; None where it reads none

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()

    @property
    def name(self) -> str:
        """What logs and ``Example.source`` call it."""
        return type(self).__name__.lower()

    @abstractmethod
    def rows(self) -> Iterable[Example]:
        """All usable examples, in the order of the data set."""

    def with_path(self, path: str) -> Source:
        """The same settings, reading ``path``."""
        if self.path is None:
            raise DataError(
                f"the source {self.name} reads no file, so data.init_args.path={path} means nothing to it; "
                "set data.init_args.source to one that does, such as lora_gan.data.Alpaca"
            )
        other = copy.deepcopy(self)
        other.path = path
        return other


def fill(template: str, **fields: str) -> str:
    """``template`` with its ``{field}`` places filled; the filled-in text may hold braces."""
    try:
        return template.format_map(fields)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        known = ", ".join(f"{{{field}}}" for field in fields)
        raise DataError(
            f"the template {template!r} cannot be filled: {error!r}; it may name {known}, a literal brace is doubled"
        ) from error
