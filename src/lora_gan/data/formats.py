"""Formats of rows: which fields the rows of a data set have, and which source reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

STANDARD = "lora_gan.data.StandardFormat"


@dataclass(frozen=True)
class Format:
    """Rows with these fields, and perhaps others."""

    name: str
    fields: tuple[str, ...]
    source: str = STANDARD

    def fits(self, fields: Iterable[str]) -> bool:
        return set(self.fields) <= set(fields)


ALPACA = Format("alpaca", ("instruction", "output"))
ANSWERS = Format("answers", ("prompt", "answer"))
TESTS = Format("tests", ("prompt", "tests"))
WITHOUT_TARGET = (ANSWERS, TESTS)
RATED = (Format("preferences", ("prompt", "chosen", "rejected")), Format("completions", ("prompt", "completion")))
# the first that fits counts: rows of preferences may repeat the chosen dialogue as messages
FORMATS = (
    RATED[0],
    Format("preferences", ("chosen", "rejected")),
    Format("messages", ("messages",)),
    Format("conversations", ("conversations",)),
    Format("conversations", ("conversation",)),
    RATED[1],
    Format("completions", ("prompt", "response")),
    ALPACA,
    Format("dolly", ("instruction", "context", "response"), "lora_gan.data.Dolly"),
    Format("oasst", ("message_id", "parent_id", "text", "role"), "lora_gan.data.OASST"),
    Format("oasst", ("message_tree_id", "prompt"), "lora_gan.data.OASST"),
    Format("arc", ("question", "answerKey"), "lora_gan.data.ARC"),
    Format("truthfulqa", ("Question", "Best Answer"), "lora_gan.data.TruthfulQA"),
    Format("truthfulqa", ("question", "best_answer"), "lora_gan.data.TruthfulQA"),
    Format("truthfulqa", ("question", "mc1_targets"), "lora_gan.data.TruthfulQA"),
    Format("twon", ("post", "reply"), "lora_gan.data.TWON"),
)


def format_of(values: Mapping[str, object]) -> Format | None:
    """The format of a row, by its fields that are not null, else by their names; None where none fits."""
    given = [name for name, value in values.items() if value is not None]
    fitting = (known for fields in (given, values) for known in FORMATS if known.fits(fields))
    return next(fitting, next((known for known in WITHOUT_TARGET if known.fits(values)), None))


def advice(values: Mapping[str, object]) -> str:
    """How to read a row that lacks a field."""
    known = format_of(values)
    if known is None:
        return "add or rename it"
    named = ", ".join(known.fields)
    return f"add or rename it, or set data.init_args.source to {known.source}, which reads rows of {named}"
