"""A file of your own: you name its fields and write the template."""

from __future__ import annotations

from string import Formatter

from lora_gan.data.files import Row
from lora_gan.data.source import OnBad, RowSource, normal
from lora_gan.errors import DataError
from lora_gan.types import Example, Negative


class OwnFile(RowSource):
    """Any file of rows: the template names the fields of the prompt, further arguments those of the answers."""

    def __init__(
        self,
        path: str,
        template: str = "### Prompt:\n{prompt}\n\n### Response:\n",
        target: str | None = "response",
        references: str | None = None,
        negatives: str | None = None,
        group: str | None = None,
        split: str | None = None,
        cuttable: list[str] | None = None,
        limit: int | None = None,
        on_bad_row: OnBad = "raise",
    ) -> None:
        """
        Args:
            path: A local file (json, jsonl, csv, parquet; also .gz) or else a data set on the hub.
            template: The prompt, with {field} for each field of the row. It ends where the answer begins.
            target: The field with the wanted answer; null where the file holds prompts only.
            references: A field with a list of further good answers.
            negatives: A field with a list of wrong answers.
            group: A field; rows that share it stay in one split. Left out, it is the prompt.
            split: A field with train, validation or test.
            cuttable: Fields that lose their beginning where a prompt is too long; left out, all but the first.
            limit: Use only the first so many usable rows.
            on_bad_row: What happens to a row that cannot be read: an error, or it is dropped and counted.
        """
        super().__init__(path, limit, on_bad_row)
        self.template = template
        self.fields = _fields(template)
        self.target = target
        self.references = references
        self.negatives = negatives
        self.group = group
        self.split = split
        self.cuttable = self.fields[1:] if cuttable is None else cuttable
        unknown = sorted(set(self.cuttable) - set(self.fields))
        if unknown:
            raise DataError(f"cuttable names {', '.join(unknown)}, but the template has {', '.join(self.fields)} only")

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
        return self.make(
            self.template,
            fields,
            self.cuttable,
            target=target,
            references=tuple(good),
            negatives=tuple(Negative(text, kind="given") for text in wrong),
            group=row.text(self.group) if self.group else normal(" ".join(fields.values())),
            meta={"split": row.text(self.split)} if self.split else {},
        )


def _fields(template: str) -> list[str]:
    """The names in ``template``, each once."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise DataError(f"the template {template!r} cannot be read: {error}; a literal brace is doubled") from error
    if not names or not all(name.isidentifier() for name in names):
        raise DataError(
            f"the template {template!r} must name its fields, such as {{prompt}}; a literal brace is doubled"
        )
    return list(dict.fromkeys(names))
