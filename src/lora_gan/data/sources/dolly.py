"""Dolly: instruction, context (may be empty), response, category."""

from __future__ import annotations

import re

from lora_gan.data.files import Row
from lora_gan.data.source import OnBad, RowSource, normal
from lora_gan.data.templates import fill
from lora_gan.types import Example

_CITATION = re.compile(r"\[(\d+|[a-z])\]")  # what is left of Wikipedia's footnotes in older copies


class Dolly(RowSource):
    """Dolly, or a file of your own in its format."""

    def __init__(
        self,
        path: str = "databricks/databricks-dolly-15k",
        template: str = "### Prompt:\n{instruction}\n{context}\n\n### Response:\n",
        template_without_context: str = "### Prompt:\n{instruction}\n\n### Response:\n",
        categories: list[str] | None = None,
        limit: int | None = None,
        on_bad_row: OnBad = "raise",
    ) -> None:
        """
        Args:
            path: A local file (json, jsonl, csv, parquet; also .gz) or else a data set on the hub.
            template: The prompt of a row that has a context. It ends where the answer begins.
            template_without_context: The prompt of a row that has none.
            categories: Use only these, such as [closed_qa, open_qa]; left out, all.
            limit: Use only the first so many usable rows.
            on_bad_row: What happens to a row that cannot be read: an error, or it is dropped and counted.
        """
        super().__init__(path, limit, on_bad_row)
        fill(template, instruction="", context="")
        fill(template_without_context, instruction="")
        self.template = template
        self.template_without_context = template_without_context
        self.categories = categories

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
