"""ARC: school science questions with three to five choices (Clark et al. 2018, arXiv 1803.05457)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Literal

from lora_gan.data.files import Row, is_hub_id, read_rows, strings
from lora_gan.data.source import OnBad, RowSource, normal
from lora_gan.data.splits import SPLITS
from lora_gan.data.templates import fill
from lora_gan.errors import DataError
from lora_gan.types import Example, Negative

_NEEDS_CHOICES = re.compile(r"\b(all|none|both|neither|two) of (the above|the below|these)\b|^(both|neither)\b", re.I)


@dataclass(frozen=True)
class Question:
    """A question and its choices."""

    text: str
    choices: tuple[str, ...]
    gold: int  # index of the correct choice


class ARC(RowSource):
    """ARC as rows of the hub, in AI2's nested format, or as {query, choices, gold}; labels are A-E or 1-5.

    The wrong choices are the negatives. The official splits (of the hub, or given as files) are kept.
    """

    def __init__(
        self,
        path: str = "allenai/ai2_arc",
        validation_path: str | None = None,
        test_path: str | None = None,
        config: str = "ARC-Challenge",
        mode: Literal["open", "mcq"] = "open",
        answer: Literal["both", "letter", "text"] = "both",
        template: str = "Question: {question}\nAnswer:",
        mcq_template: str = "Question: {question}\n{choices}\nAnswer:",
        limit: int | None = None,
        on_bad_row: OnBad = "raise",
    ) -> None:
        """
        Args:
            path: Local file (json, jsonl, csv, tsv, parquet; also .gz) or id of a data set on the Hugging Face Hub.
            validation_path: Local file with the official validation split.
            test_path: Local file with the official test split.
            config: Configuration of the data set on the hub: ARC-Challenge or ARC-Easy.
            mode: "open" asks without the choices and drops questions that need them; "mcq" lists them as A., B., ….
            answer: Completion in mcq mode: "B. iron" (both), "B" (letter) or "iron" (text).
            template: Prompt in open mode; it ends where the completion begins.
            mcq_template: Prompt in mcq mode.
            limit: Number of usable rows to read, from the first; by default all.
            on_bad_row: "raise" makes a row that cannot be read an error; "drop" drops and counts it.

        Raises:
            LoraGANError: limit is below 1, or a template names an unknown field.
        """
        super().__init__(path, limit, on_bad_row)
        fill(template, question="")
        fill(mcq_template, question="", choices="")
        self.held_out = {"validation": validation_path, "test": test_path}
        self.config = config
        self.mode = mode
        self.answer = answer
        self.template = template
        self.mcq_template = mcq_template

    @property
    def prompt_templates(self) -> tuple[str, ...]:
        return (self.mcq_template if self.mode == "mcq" else self.template,)

    def read(self) -> Iterator[Row]:
        for path, split in self._parts():
            part = {"split": split, "config": self.config} if is_hub_id(path) else {}
            for row in read_rows(path, bad=self.bad, **part):
                yield replace(row, split=split)

    def _parts(self) -> list[tuple[str, str]]:
        """Each file or hub id with its official split, "" if it has none."""
        if is_hub_id(self.path):
            return [(self.path, split) for split in SPLITS]
        given = [(path, split) for split, path in self.held_out.items() if path]
        return [(self.path, "train" if given else ""), *given]

    def example(self, row: Row) -> Example | None:
        question = _question(row)
        if not question.text:
            self.dropped["empty_question"] += 1
            return None
        if self.mode == "open" and any(map(_NEEDS_CHOICES.search, question.choices)):
            self.dropped["needs_its_choices"] += 1
            return None
        choices = [self._format_choice(number, text) for number, text in enumerate(question.choices)]
        lines = "\n".join(f"{ascii_uppercase[i]}. {text}" for i, text in enumerate(question.choices))
        fields = {"question": question.text} | ({"choices": lines} if self.mode == "mcq" else {})
        return self.make(
            self.mcq_template if self.mode == "mcq" else self.template,
            fields,
            target=choices[question.gold],
            references=(choices[question.gold],),
            negatives=tuple(Negative(choices[i], kind="wrong_choice") for i in self._wrong(question)),
            group=normal(question.text),
            split=row.split,
            meta={"id": str(row.values.get("id", ""))},
        )

    def _format_choice(self, number: int, text: str) -> str:
        if self.mode == "open" or self.answer == "text":
            return text
        letter = ascii_uppercase[number]
        return letter if self.answer == "letter" else f"{letter}. {text}"

    def _wrong(self, question: Question) -> list[int]:
        """Indices of the wrong choices, without repeated texts."""
        first = {question.choices[question.gold]: question.gold}
        for i, text in enumerate(question.choices):
            first.setdefault(text, i)  # case-sensitive: Bb and bb are two genotypes
        self.repaired["repeated_choice"] += len(question.choices) - len(first)
        return sorted(i for i in first.values() if i != question.gold)


def _question(row: Row) -> Question:
    """The question of a row in any of the three formats."""
    asked, key = row.values.get("question"), row.values.get("answerKey")
    texts, labels = row.get("choices", "text"), row.get("choices", "label")
    if isinstance(asked, Mapping):
        listed = asked.get("choices")
        choices = [c for c in listed if isinstance(c, Mapping)] if isinstance(listed, list) else []
        asked, texts, labels = asked.get("stem"), [c.get("text") for c in choices], [c.get("label") for c in choices]
    elif "query" in row.values:
        asked, texts, key = row.values["query"], row.values.get("choices"), str(row.values.get("gold"))
        labels = [str(i) for i in range(len(texts))] if isinstance(texts, list) else None
    elif asked is None:
        row.text("question")  # says which fields there are
    return _checked(row, asked, strings(texts, "choices", row), strings(labels, "labels", row), key)


def _checked(row: Row, asked: object, texts: list[str], labels: list[str], key: object) -> Question:
    if not isinstance(asked, str):
        raise DataError(f"{row.where}: the field 'question' is missing or not text; fix or delete the row")
    if len(texts) != len(labels) or not 2 <= len(texts) <= len(ascii_uppercase) or not all(texts):
        raise DataError(
            f"{row.where}: got {len(texts)} choices with {len(labels)} labels, needs 2 to 26 choices "
            "that are not empty, with a label each; fix or delete the row"
        )
    if labels.count(str(key)) != 1:
        raise DataError(
            f"{row.where}: the answerKey {key!r} is not one of the labels {', '.join(labels)}; fix or delete the row"
        )
    return Question(row.clean(asked), tuple(texts), labels.index(str(key)))
