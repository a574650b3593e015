"""Alpaca and every file in its format: instruction, input (may be empty or absent), output."""

from __future__ import annotations

import re

from lora_gan.data.files import Row
from lora_gan.data.source import OnBad, RowSource, normal
from lora_gan.data.templates import fill
from lora_gan.types import Example

_NO_INPUT = re.compile(r"[<`\s]*(no\s*input|n/a|none)[>`.\s]*", re.IGNORECASE)
_NO_OUTPUT = re.compile(r"[<`\s]*no\s*output\b", re.IGNORECASE)
_URL = re.compile(r"<?(https?://|www\.)\S+", re.IGNORECASE)
_PICTURE = re.compile(r"[<\[(].{0,20}\b(picture|image|photo)\b.{0,20}\battached\b.{0,20}[>\])]", re.IGNORECASE)
_NEXT_ROW = re.compile(r"^\s*(##\s*$|\d+\.\s*Instruction:)", re.MULTILINE)  # a Markdown heading has text after its #


class Alpaca(RowSource):
    """Alpaca, or a file of your own in its format."""

    def __init__(
        self,
        path: str = "yahma/alpaca-cleaned",
        template: str = "### Prompt:\n{instruction}\n{input}\n\n### Response:\n",
        template_without_input: str = "### Prompt:\n{instruction}\n\n### Response:\n",
        limit: int | None = None,
        on_bad_row: OnBad = "raise",
    ) -> None:
        """
        Args:
            path: A local file (json, jsonl, csv, parquet; also .gz) or else a data set on the hub.
            template: The prompt of a row that has an input. It ends where the answer begins.
            template_without_input: The prompt of a row that has none.
            limit: Use only the first so many usable rows.
            on_bad_row: What happens to a row that cannot be read: an error, or it is dropped and counted.
        """
        super().__init__(path, limit, on_bad_row)
        fill(template, instruction="", input="")
        fill(template_without_input, instruction="")
        self.template = template
        self.template_without_input = template_without_input

    def example(self, row: Row) -> Example | None:
        instruction = row.text("instruction")
        context = self._context(row.text("input", default=""))
        output = self._output(row.text("output"))
        reason = _fault(instruction, context, output)
        if reason:
            self.dropped[reason] += 1
            return None
        return self.make(
            self.template if context else self.template_without_input,
            {"instruction": instruction, "input": context},
            cuttable=("input",),
            target=output,
            references=(output,),
            group=f"{normal(instruction)}\n{normal(context)}",
        )

    def _context(self, text: str) -> str:
        if _NO_INPUT.fullmatch(text):
            self.repaired["no_input"] += 1
            return ""
        return text

    def _output(self, text: str) -> str:
        """``text`` up to where a second row was merged into it."""
        merged = _NEXT_ROW.search(text)
        if merged:
            self.repaired["merged_row_cut"] += 1
            return text[: merged.start()].strip()
        return text


def _fault(instruction: str, context: str, output: str) -> str:
    if not instruction:
        return "empty_instruction"
    if not output:
        return "empty_output"
    if _NO_OUTPUT.match(output):
        return "no_output"
    if _URL.fullmatch(context):
        return "url_input"
    if _PICTURE.fullmatch(context):
        return "picture_input"
    return ""
