"""Dolly data and files in its format: instruction, context (may be empty), response, category."""

from __future__ import annotations

import re

from lora_gan.data.files import Row
from lora_gan.data.source import OnBad, RowSource, normal
from lora_gan.data.templates import default_template, fill
from lora_gan.types import Example

_CITATION = re.compile(r"\[(\d+|[a-z])\]")  # remains of Wikipedia footnotes in older copies


class Dolly(RowSource):
    """Dolly (Conover et al. 2023) or a file in its format; ``response`` is the target."""

    def __init__(
        self,
        path: str = "databricks/databricks-dolly-15k",
        template: str = default_template("{instruction}\n{context}"),
        template_without_context: str = default_template("{instruction}"),
        categories: list[str] | None = None,
        limit: int | None = None,
        on_bad_row: OnBad = "raise",
    ) -> None:
        """
        Args:
            path: Local file (json, jsonl, csv, tsv, parquet; also .gz) or id of a data set on the Hugging Face Hub.
            template: Prompt of a row with a context; it ends where the completion begins.
            template_without_context: Prompt of a row without context.
            categories: Categories to use, such as [closed_qa, open_qa]; by default all.
            limit: Number of usable rows to read, from the first; by default all.
            on_bad_row: "raise" makes a row that cannot be read an error; "drop" drops and counts it.

        Raises:
            LoraGANError: limit is below 1, or a template names an unknown field.
        """
        super().__init__(path, limit, on_bad_row)
        fill(template, instruction="", context="")
        fill(template_without_context, instruction="")
        self.template = template
        self.template_without_context = template_without_context
        self.categories = categories

    @property
    def prompt_templates(self) -> tuple[str, ...]:
        return self.template, self.template_without_context

    def example(self, row: Row) -> Example | None:
        instruction, response = row.text("instruction"), row.text("response")
        cited = row.text("context", default="")
        context = _CITATION.sub("", cited).strip()
        category = row.text("category", default="")
        reason = self._fault(instruction, context, response, category)
        if reason:
            self.dropped[reason] += 1
            return None
        self.repaired["citation"] += context != cited
        return self.make(
            self.template if context else self.template_without_context,
            {"instruction": instruction, "context": context},
            cuttable=("context",),
            target=response,
            references=(response,),
            group=normal(instruction),
            meta={"category": category},
        )

    def _fault(self, instruction: str, context: str, response: str, category: str) -> str:
        if self.categories is not None and category not in self.categories:
            return "other_category"
        if not instruction:
            return "empty_instruction"
        if not response:
            return "empty_response"
        return "response_is_context" if normal(response) == normal(context) else ""
