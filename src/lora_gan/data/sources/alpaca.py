"""Alpaca data and files in its format: instruction, input (may be empty or absent), output."""

from __future__ import annotations

import re

from lora_gan.data.files import Row
from lora_gan.data.source import OnBad, RowSource, normal
from lora_gan.data.templates import default_template, fill
from lora_gan.types import Example

_NO_INPUT = re.compile(r"[<`\s]*(no\s*input|n/a|none)[>`.\s]*", re.IGNORECASE)
_NO_OUTPUT = re.compile(r"[<`\s]*no\s*output\b", re.IGNORECASE)
_URL = re.compile(r"<?(https?://|www\.)\S+", re.IGNORECASE)
_PICTURE = re.compile(r"[<\[(].{0,20}\b(picture|image|photo)\b.{0,20}\battached\b.{0,20}[>\])]", re.IGNORECASE)
_NEXT_ROW = re.compile(r"^\s*(##\s*$|\d+\.\s*Instruction:)", re.MULTILINE)  # a Markdown heading has text after its #


class Alpaca(RowSource):
    """Alpaca (Taori et al. 2023) or a file in its format; ``output`` is the target."""

    def __init__(
        self,
        path: str = "yahma/alpaca-cleaned",
        template: str = default_template("{instruction}\n{input}"),
        template_without_input: str = default_template("{instruction}"),
        limit: int | None = None,
        on_bad_row: OnBad = "raise",
    ) -> None:
        """
        Args:
            path: Local file (json, jsonl, csv, tsv, parquet; also .gz) or id of a data set on the Hugging Face Hub.
            template: Prompt of a row with an input; it ends where the completion begins.
            template_without_input: Prompt of a row without input.
            limit: Number of usable rows to read, from the first; by default all.
            on_bad_row: "raise" makes a row that cannot be read an error; "drop" drops and counts it.

        Raises:
            LoraGANError: limit is below 1, or a template names an unknown field.
        """
        super().__init__(path, limit, on_bad_row)
        fill(template, instruction="", input="")
        fill(template_without_input, instruction="")
        self.template = template
        self.template_without_input = template_without_input

    @property
    def prompt_templates(self) -> tuple[str, ...]:
        return self.template, self.template_without_input

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
        """``text`` without a second row that was merged into it."""
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
