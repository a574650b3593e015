"""Own files with any fields, which the settings name."""

from __future__ import annotations

from string import Formatter

from lora_gan.data.files import Row
from lora_gan.data.source import OnBad, RowSource, normal
from lora_gan.data.templates import default_template
from lora_gan.errors import DataError
from lora_gan.types import Example, Negative


class OwnFile(RowSource):
    """Any file of rows: the template names the fields of the prompt, other arguments those of the completions."""

    def __init__(
        self,
        path: str,
        template: str = default_template("{prompt}"),
        target: str | None = "response",
        references: str | None = None,
        negatives: str | None = None,
        group: str | None = None,
        split: str | None = None,
        cuttable: list[str] | None = None,
        limit: int | None = None,
        on_bad_row: OnBad = "raise",
        answer: str | None = None,
        tests: str | None = None,
    ) -> None:
        """
        Args:
            path: Local file (json, jsonl, csv, tsv, parquet; also .gz) or id of a data set on the Hugging Face Hub.
            template: Prompt with {field} for each field of the row; it ends where the completion begins.
            target: Field with the target; null if the file has prompts only.
            references: Field with a list of further correct completions, or with one.
            negatives: Field with a list of wrong completions, or with one.
            group: Field whose value defines the group; a group stays in one split. By default the prompt.
            split: Field with the official split: train, validation or test.
            cuttable: Fields whose beginning is cut if a prompt is too long; by default all but the first.
            limit: Number of usable rows to read, from the first; by default all.
            on_bad_row: "raise" makes a row that cannot be read an error; "drop" drops and counts it.
            answer: Field with the final answer, a text or a number, or with a list of all that are accepted.
            tests: Field with the tests of the code that is asked for: Python statements, a text or a list of them.

        Raises:
            LoraGANError: limit is below 1, the template cannot be read, or cuttable names a field that it lacks.
        """
        super().__init__(path, limit, on_bad_row)
        self.template = template
        self.fields = _fields(template)
        self.target = target
        self.references = references
        self.negatives = negatives
        self.answer = answer
        self.tests = tests
        self.group = group
        self.split = split
        self.cuttable = self.fields[1:] if cuttable is None else cuttable
        unknown = sorted(set(self.cuttable) - set(self.fields))
        if unknown:
            raise DataError(
                f"cuttable names {', '.join(unknown)}, but the template has {', '.join(self.fields)} only; "
                "name fields of the template"
            )

    @property
    def prompt_templates(self) -> tuple[str, ...]:
        return (self.template,)

    def example(self, row: Row) -> Example | None:
        fields = {name: row.text(name) for name in self.fields}
        target = row.text(self.target) if self.target else ""
        if not any(fields.values()) or (self.target and not target):
            self.dropped["empty_target" if any(fields.values()) else "empty_prompt"] += 1
            return None
        references = row.texts(self.references) if self.references else []
        negatives = row.texts(self.negatives) if self.negatives else []
        good = dict.fromkeys(filter(None, [target, *references]))
        wrong = [text for text in dict.fromkeys(negatives) if text and text not in good]
        self.dropped["negative_same_as_target"] += any(text in good for text in negatives)
        return self.make(
            self.template,
            fields,
            self.cuttable,
            target=target,
            references=tuple(good),
            negatives=tuple(Negative(text, kind="given") for text in wrong),
            answers=row.answers(self.answer) if self.answer else (),
            tests=row.tests(self.tests) if self.tests else (),
            group=row.text(self.group) if self.group else normal(" ".join(fields.values())),
            split=row.text(self.split) if self.split else "",
        )


def _fields(template: str) -> list[str]:
    """The field names in ``template``, without repeats."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise DataError(f"the template {template!r} cannot be read: {error}; double literal braces") from error
    if not names or not all(name.isidentifier() for name in names):
        raise DataError(f"the template {template!r} must name its fields, such as {{prompt}}; double literal braces")
    return list(dict.fromkeys(names))
