"""TWON: social media posts with replies, or topics with posts, in two named columns."""

from __future__ import annotations

import html
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from lora_gan.data.files import Row
from lora_gan.data.source import OnBad, RowSource, normal
from lora_gan.data.templates import default_template, fill
from lora_gan.types import Example, Message

_MENTION = re.compile(r"(?<![\w@])@\w+")
_LEADING_MENTIONS = re.compile(r"^(\s*\.?@\w+)+\s*")
_LINK = re.compile(r"\b(https?://|www\.)\S+", re.IGNORECASE)
_REPOST = re.compile(r"^RT\b")
_REFUSAL = re.compile(r"\b(can't|cannot|can’t|unable to) (assist|help|fulfill|comply)\b|\bas an ai\b", re.IGNORECASE)


class TWON(RowSource):
    """Thread → reply, or topic → post. Rows with the same thread or topic are one group and share their references.

    Mentions and links are masked and HTML entities are decoded. Reposts, topics that are refusals of a language model,
    and very short targets are dropped.
    """

    def __init__(
        self,
        path: str,
        instruction: str = "You are a social media user. Reply to the following post.",
        data_label: str = "post",
        target_label: str = "reply",
        template: str = "{instruction}\n\n" + default_template("{data}"),
        shortest_target: int = 6,
        limit: int | None = None,
        on_bad_row: OnBad = "raise",
    ) -> None:
        """
        Args:
            path: Local file (json, jsonl, csv, tsv, parquet; also .gz) or id of a data set on the Hugging Face Hub.
            instruction: Instruction of every row; in chat format, the system message.
            data_label: Column with the post or topic.
            target_label: Column with the target: the reply or the post.
            template: Prompt; it ends where the completion begins.
            shortest_target: Smallest length of a target in characters; shorter ones are dropped.
            limit: Number of usable rows to read, from the first; by default all.
            on_bad_row: "raise" makes a row that cannot be read an error; "drop" drops and counts it.

        Raises:
            LoraGANError: limit is below 1, or a template names an unknown field.
        """
        super().__init__(path, limit, on_bad_row)
        fill(template, instruction="", data="")
        self.instruction = instruction
        self.data_label = data_label
        self.target_label = target_label
        self.template = template
        self.shortest_target = shortest_target

    @property
    def prompt_templates(self) -> tuple[str, ...]:
        literal = self.instruction.replace("{", "{{").replace("}", "}}")
        return (self.template.replace("{instruction}", literal),)

    @property
    def system(self) -> str | None:
        return self.instruction if self._is_default else None

    @property
    def _is_default(self) -> bool:
        """Whether a chat has the instruction as system message and the data alone as what the user says."""
        return super().said(self.template) != self.template

    def said(self, template: str) -> str:
        return "{data}" if self._is_default else template

    def rows(self) -> Iterator[Example]:
        examples = list(super().rows())
        targets: dict[str, list[str]] = defaultdict(list)
        for example in examples:
            targets[example.group].append(example.target)
        for example in examples:
            yield replace(example, references=tuple(dict.fromkeys([example.target, *targets[example.group]])))

    def example(self, row: Row) -> Example | None:
        raw, answer = row.text(self.data_label), row.text(self.target_label)
        data, target = self._masked(raw), self._masked(_LEADING_MENTIONS.sub("", answer))
        reason = self._fault(raw, data, answer, target)
        if reason:
            self.dropped[reason] += 1
            return None
        example = self.make(
            self.template,
            {"instruction": self.instruction, "data": data},
            cuttable=("data",),
            target=target,
            references=(target,),
            group=normal(data),
        )
        if not self._is_default:
            return example
        return replace(
            example, messages=(Message("system", self.instruction), Message("user", data, ((0, len(data)),)))
        )

    def _fault(self, raw: str, data: str, answer: str, target: str) -> str:
        if not data:
            return "empty_data"
        if not target:
            return "empty_target"
        if _REPOST.match(raw) or _REPOST.match(answer):
            return "repost"
        if _REFUSAL.search(data):
            return "refusal"
        return "short_target" if len(target) < self.shortest_target else ""

    def _masked(self, text: str) -> str:
        """``text`` in one line, with entities decoded and mentions and links masked."""
        plain = html.unescape(text)
        masked = _MENTION.sub("@user", _LINK.sub("[link]", plain))
        self.repaired["entity"] += plain != text
        self.repaired["masked"] += masked != plain
        return " ".join(masked.split())
