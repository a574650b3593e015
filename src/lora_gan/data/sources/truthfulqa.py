"""TruthfulQA: questions with correct and incorrect answers (Lin et al. 2022, arXiv 2109.07958)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from lora_gan.data.files import Row, is_hub_id, read_rows
from lora_gan.data.source import OnBad, RowSource, normal
from lora_gan.data.templates import fill
from lora_gan.errors import DataError
from lora_gan.types import Example, Negative

NO_COMMENT = "i have no comment"  # correct, but not for training: a model that always gives it scores as truthful

LISTS = ("correct_answers", "incorrect_answers")


class TruthfulQA(RowSource):
    """TruthfulQA as TruthfulQA.csv (with or without the column Best Incorrect Answer), mc_task.json, or from the hub.

    References are the correct answers, negatives the incorrect ones, each with the best first. It is an evaluation set:
    every row is in the test split unless ``allow_train`` is set.
    """

    def __init__(
        self,
        path: str = "truthfulqa/truthful_qa",
        template: str = "Q: {question}\nA:",
        allow_train: bool = False,
        limit: int | None = None,
        on_bad_row: OnBad = "raise",
    ) -> None:
        """
        Args:
            path: Local file (csv, json, jsonl, parquet; also .gz) or id of a data set on the Hugging Face Hub.
            template: Prompt; it ends where the completion begins.
            allow_train: Split the rows by question and also train on them; the scores are then not benchmark scores.
            limit: Number of usable rows to read, from the first; by default all.
            on_bad_row: "raise" makes a row that cannot be read an error; "drop" drops and counts it.

        Raises:
            LoraGANError: limit is below 1, or a template names an unknown field.
        """
        super().__init__(path, limit, on_bad_row)
        fill(template, question="")
        self.template = template
        self.allow_train = allow_train

    @property
    def note(self) -> str:
        if self.allow_train:
            return "TruthfulQA is in the training data: its scores in this run are not benchmark scores"
        return "TruthfulQA is held out for the test; to train on it, set allow_train: true on the source"

    @property
    def prompt_templates(self) -> tuple[str, ...]:
        return (self.template,)

    def read(self) -> Iterator[Row]:
        part = {"split": "validation", "config": "generation"} if is_hub_id(self.path) else {}
        for row in read_rows(self.path, bad=self.bad, **part):
            yield Row({_key(name): value for name, value in row.values.items()}, row.where)

    def example(self, row: Row) -> Example | None:
        question = row.text("question")
        correct, incorrect = self._answers(row)
        references = self._references(correct)
        right = {_plain(answer) for answer in correct}
        wrong = [answer for answer in _distinct(incorrect) if _plain(answer) not in right]
        self.repaired["correct_and_incorrect"] += len(_distinct(incorrect)) - len(wrong)
        if not question or not references:
            self.dropped["empty_question" if not question else "no_correct_answer"] += 1
            return None
        return self.make(
            self.template,
            {"question": question},
            target=references[0],
            references=tuple(references),
            negatives=tuple(Negative(answer, kind="incorrect") for answer in wrong),
            group=normal(question),
            split="" if self.allow_train else "test",
            meta={"category": row.text("category", default="")},
        )

    def _references(self, correct: list[str]) -> list[str]:
        answers = _distinct(correct)
        said = [answer for answer in answers if _plain(answer) != NO_COMMENT]
        return said if self.allow_train else said + [answer for answer in answers if answer not in said]

    def _answers(self, row: Row) -> tuple[list[str], list[str]]:
        """Correct and incorrect answers, the best of each first."""
        if "mc2_targets" in row.values:
            return self._choices(row)
        correct = [row.text("best_answer"), *self._listed(row, "correct_answers")]
        self.repaired["semicolon_at_the_end"] += any(map(_ends_empty, map(row.values.get, LISTS)))
        best_incorrect = row.text("best_incorrect_answer", default="")
        return correct, [best_incorrect] * bool(best_incorrect) + self._listed(row, "incorrect_answers")

    def _listed(self, row: Row, field: str) -> list[str]:
        """A list, or text in which semicolons separate the answers."""
        if not isinstance(row.values.get(field), str):
            return row.texts(field)
        pieces = row.text(field).split(";")
        return [piece.strip() for piece in pieces if piece.strip()]

    def _choices(self, row: Row) -> tuple[list[str], list[str]]:
        """Correct and incorrect answers of mc_task.json ({answer: 0 or 1}) or of the hub ({choices, labels})."""
        labelled = [pair for field in ("mc1_targets", "mc2_targets") for pair in _labelled(row, field)]
        return [text for text, label in labelled if label], [text for text, label in labelled if not label]


def _labelled(row: Row, field: str) -> list[tuple[str, int]]:
    targets = row.values.get(field)
    choices, labels = row.get(field, "choices"), row.get(field, "labels")
    pairs: list[tuple[object, object]] = []
    if isinstance(choices, list) and isinstance(labels, list) and len(choices) == len(labels):
        pairs = list(zip(choices, labels, strict=True))
    elif isinstance(targets, Mapping):
        pairs = list(targets.items())
    if not pairs or not all(isinstance(text, str) and label in (0, 1) for text, label in pairs):
        raise DataError(
            f"{row.where}: the field {field!r} is not {{answer: 0 or 1}} or two lists; fix or delete the row"
        )
    return [(row.clean(str(text)), int(label == 1)) for text, label in pairs]


def _ends_empty(listed: object) -> bool:
    return isinstance(listed, str) and listed.rstrip().endswith(";")


def _key(name: object) -> str:
    return str(name).strip().lower().replace(" ", "_")


def _plain(answer: str) -> str:
    return normal(answer).rstrip(".")


def _distinct(answers: Iterable[str]) -> list[str]:
    """The answers without empty ones and without repeats up to case, spacing and the final dot."""
    found: dict[str, str] = {}
    for answer in answers:
        if answer:
            found.setdefault(_plain(answer), answer)
    return list(found.values())
