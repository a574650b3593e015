"""Prompts from templates and from chat templates, which remember what of them may be cut."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from lora_gan.errors import DataError, LoraGANError
from lora_gan.types import Example, Message, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "\ud800", "\ud801"  # around what may be cut; cleaned text holds no lone surrogates

PROMPT_TURN = "### Prompt:\n{text}\n\n"
RESPONSE_TURN = "### Response:\n{text}\n\n"


def default_template(content: str) -> str:
    """The template that sources use unless another one is given, with ``content`` in the place of the prompt."""
    return f"### Prompt:\n{content}\n\n### Response:\n"


@dataclass(frozen=True)
class Prompt:
    """A text and the spans of it that may be cut."""

    text: str
    cuttable: tuple[Span, ...]


def fill(template: str, **fields: str) -> str:
    """``template`` with its ``{field}`` places filled; the filled-in text may hold braces."""
    try:
        return template.format_map(fields)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        known = ", ".join(f"{{{field}}}" for field in fields)
        raise DataError(
            f"the template {template!r} cannot be filled: {error!r}; it may name {known}, a literal brace is doubled"
        ) from error


def prompt(template: str, cuttable: Collection[str], **fields: str) -> Prompt:
    """``template`` filled; the fields named in ``cuttable`` may be cut where the prompt is too long."""
    return unmark(fill(template, **{name: mark(text) if name in cuttable else text for name, text in fields.items()}))


def user_message(fields: Mapping[str, str], cuttable: Collection[str]) -> Message:
    """The fields that are not empty, one below the other, as what the user says."""
    said = [mark(text) if name in cuttable else text for name, text in fields.items() if text]
    made = unmark("\n\n".join(said))
    return Message("user", made.text, made.cuttable)


def mark(text: str) -> str:
    """``text`` as something that may be cut."""
    return f"{OPEN}{text}{CLOSE}" if text else ""


def unmark(text: str) -> Prompt:
    """``text`` without its marks, and where they were."""
    pieces = re.split(f"[{OPEN}{CLOSE}]", text)
    ends = [sum(len(piece) for piece in pieces[: i + 1]) for i in range(len(pieces))]
    return Prompt("".join(pieces), tuple(zip(ends[0:-1:2], ends[1::2], strict=True)))


def pieces_of(text: str, cuttable: Sequence[Span]) -> list[str]:
    """``text`` in pieces; those at odd indices may be cut."""
    borders = [0, *(border for span in cuttable for border in span), len(text)]
    return [text[start:end] for start, end in pairwise(borders)]


def join(pieces: Sequence[str]) -> Prompt:
    """The inverse of :func:`pieces_of`."""
    return unmark("".join(mark(piece) if i % 2 else piece for i, piece in enumerate(pieces)))


def as_chat(tokenizer: PreTrainedTokenizerBase, example: Example, system: str | None) -> Example:
    """``example`` with its dialogue in the format of the tokenizer's chat template as prompt."""
    if not tokenizer.chat_template:
        raise LoraGANError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; set data.init_args.chat: false, "
            "or take a base model that was made for chat"
        )
    if not example.messages:
        raise LoraGANError(f"the source {example.source} gives no dialogue; set data.init_args.chat: false")
    messages = example.messages
    if system is not None:
        messages = (Message("system", system), *(message for message in messages if message.role != "system"))
    turns = [{"role": message.role, "content": _marked(message)} for message in messages]
    made = unmark(str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)))
    return replace(example, prompt=made.text, cuttable=made.cuttable)


def _marked(message: Message) -> str:
    pieces = pieces_of(message.content, message.cuttable)
    return "".join(mark(piece) if i % 2 else piece for i, piece in enumerate(pieces))
