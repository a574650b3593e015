"""Prompts, written from templates or by the chat template of a tokenizer, and which of their text is from the data."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from string import Formatter
from typing import TYPE_CHECKING, Any

from lora_gan.errors import DataError, LoraGANError
from lora_gan.types import Example, Message, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# around what is from the data, cuttable or not; cleaned text holds no lone surrogates
CUT_OPEN, CUT_CLOSE, KEEP_OPEN, KEEP_CLOSE = MARKS = "\ud800", "\ud801", "\ud802", "\ud803"
PAIRS = ((CUT_OPEN, CUT_CLOSE), (KEEP_OPEN, KEEP_CLOSE))
_MARK = re.compile(f"([{''.join(MARKS)}])")
_NUMBERED = re.compile(rf"([{CUT_OPEN}{CUT_CLOSE}])(\d+)\1")

PROMPT_TURN = "### Prompt:\n{text}\n\n"
RESPONSE_TURN = "### Response:\n{text}\n\n"
END_OF_THOUGHT = "</think>"  # templates of reasoning models leave out what stands before it in earlier turns


def default_template(content: str) -> str:
    """The template that sources use unless another one is given, with ``content`` in the place of the prompt."""
    return f"### Prompt:\n{content}\n\n### Response:\n"


# plain templates


@dataclass(frozen=True)
class Prompt:
    """A text, its spans that may be cut, and its spans in which control tokens are plain text, both in order."""

    text: str
    cuttable: tuple[Span, ...] = ()
    literal: tuple[Span, ...] = ()

    def without(self, start: int, end: int) -> Prompt:
        """The prompt without its characters from ``start`` to ``end``; spans of which nothing is left are dropped."""

        def moved(spans: Sequence[Span]) -> tuple[Span, ...]:
            kept = [tuple(x - max(0, min(x, end) - start) for x in span) for span in spans]
            return tuple((a, b) for a, b in kept if a < b)

        return Prompt(self.text[:start] + self.text[end:], moved(self.cuttable), moved(self.literal))


def fill(template: str, **fields: str) -> str:
    """``template`` with its ``{field}`` places filled; the filled-in text may hold braces."""
    try:
        return template.format_map(fields)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        known = ", ".join(f"{{{field}}}" for field in fields)
        raise DataError(
            f"the template {template!r} cannot be filled: {error!r}; it may name {known}, a literal brace is doubled"
        ) from error


def before_text(turn: str) -> str:
    """What a template of a turn writes before its {text}: the header of an answer."""
    return fill(turn, text="\0").split("\0")[0]


def prompt(template: str, cuttable: Collection[str], **fields: str) -> Prompt:
    """``template`` filled; the fields named in ``cuttable`` may be cut where the prompt is too long."""
    return unmark(fill(template, **{name: mark(text, name in cuttable) for name, text in fields.items()}))


def user_message(template: str, fields: Mapping[str, str], cuttable: Collection[str]) -> Message:
    """What the user says: the fields that are not empty, one below the other, or ``template`` if it has own words."""
    if own_words(template):
        made = prompt(_content(template).strip(), cuttable, **fields)
    else:
        made = unmark("\n\n".join(mark(text, name in cuttable) for name, text in fields.items() if text))
    return Message("user", made.text, made.cuttable)


def own_words(template: str) -> bool:
    """Whether a template says more than its fields and the headings of :func:`default_template`."""
    return bool("".join(words for words, *_ in Formatter().parse(_content(template))).strip())


def _content(template: str) -> str:
    """``template`` without the headings of :func:`default_template`."""
    before, after = default_template("\0").split("\0")
    return template.removeprefix(before).removesuffix(after)


def fields_of(template: str) -> tuple[str, ...]:
    """The names of the fields of a template, each once."""
    return tuple(dict.fromkeys(name for _, name, _, _ in Formatter().parse(template) if name is not None))


def mark(text: str, cuttable: bool = True) -> str:
    """``text`` as text of the data, which may be cut or not."""
    opening, closing = PAIRS[0 if cuttable else 1]
    return f"{opening}{text}{closing}" if text else ""


def unmark(text: str) -> Prompt:
    """``text`` without its marks, and where they were; a mark without its partner marks nothing."""
    pieces = _MARK.split(text)  # a mark at every odd index
    marks, ends = pieces[1::2], list(accumulate(map(len, pieces[::2])))
    spans = dict(zip(pairwise(ends[:-1]), pairwise(marks), strict=True))
    return Prompt(
        "".join(pieces[::2]),
        tuple(span for span, pair in spans.items() if pair == PAIRS[0]),
        tuple(span for span, pair in spans.items() if pair in PAIRS),
    )


# chat templates


def writes_chat(tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> bool:
    """Whether prompts are written with the tokenizer's chat template: as ``chat`` says, or where there is one."""
    return bool(tokenizer.chat_template) if chat is None else chat


def as_chat(
    tokenizer: PreTrainedTokenizerBase, example: Example, system: str | None, options: Mapping[str, Any] | None = None
) -> Example:
    """``example`` with its dialogue in the format of the tokenizer's chat template as prompt.

    Args:
        tokenizer: Has the template.
        example: Has messages.
        system: Takes the place of the system messages of the dialogue; None leaves them.
        options: Further variables of the template, such as enable_thinking.

    Raises:
        LoraGANError: There is no template or no dialogue, the template raises an error, or it leaves out a message.
    """
    if not example.messages:
        raise LoraGANError(f"the source {example.source} gives no dialogue; set data.init_args.chat: false")
    messages = list(example.messages)
    if system is not None:
        messages = [Message("system", system), *(message for message in messages if message.role != "system")]
    made = _written(tokenizer, messages, options or {})
    return replace(example, prompt=made.text, cuttable=made.cuttable, literal=made.literal, chat=True)


def turn_end(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """The ids that the chat template writes after an assistant's message, up to the first control token.

    EOS where it writes none, so that every completion ends.
    """
    said = "Hello."
    turns = [Message("user", said), Message("assistant", said + CUT_CLOSE)]
    _, marked, after = _rendered(tokenizer, turns, options or {}, add_generation_prompt=False).rpartition(CUT_CLOSE)
    before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (said, said + after))
    end = whole[len(before) :] if marked else []
    control = [place for place, id in enumerate(end) if id in tokenizer.added_tokens_decoder]
    return tuple(end[: control[0] + 1]) if control else (int(tokenizer.eos_token_id),)


def _written(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any]) -> Prompt:
    """The dialogue with the header of the answer; what may be cut is known where the template changes no message."""
    text = _rendered(tokenizer, messages, options)
    numbered = [replace(m, content=_numbered(n, m.content)) for n, m in enumerate(messages)]
    pieces = _NUMBERED.split(_rendered(tokenizer, numbered, options))  # text, mark, number, text, …
    places = list(accumulate(map(len, pieces[::3])))
    found = {(kind, int(n)): place for kind, n, place in zip(pieces[1::3], pieces[2::3], places, strict=False)}
    as_marked = "".join(pieces[::3]) == text  # else the template looks at how a message begins or ends
    literal, cuttable = [], []
    for n, message in enumerate(messages):
        core = message.content.strip()
        start, end = (found.get((kind, n)) if as_marked else None for kind in (CUT_OPEN, CUT_CLOSE))
        span = _span(text, core, start, end) if as_marked else _found(text, _shown(message))
        if core and (span is None or _shown(message) not in text):
            raise _left_out(tokenizer, message, n + 1 == len(messages))
        if span is not None and span[0] < span[1]:
            literal.append(span)
            offset = span[0] - message.content.index(core)
            if as_marked and text[slice(*span)] == core:
                cuttable += [(start + offset, end + offset) for start, end in message.cuttable]
    return Prompt(text, tuple(sorted(cuttable)), tuple(sorted(literal)))


def _span(text: str, core: str, start: int | None, end: int | None) -> Span | None:
    """Where ``text`` holds ``core``, or the end of it, which is what templates keep of a turn with its thoughts."""
    if end is None:
        return None
    if start is not None and text[start:end] == core:
        return start, end
    same = len(os.path.commonprefix([text[:end][::-1], core[::-1]]))  # noqa: RUF071
    return end - same, end


def _found(text: str, shown: str) -> Span | None:
    place = text.rfind(shown)
    return None if place < 0 else (place, place + len(shown))


def _shown(message: Message) -> str:
    """What a template has to keep of a message."""
    thoughtless = message.content.rpartition(END_OF_THOUGHT)[2] if message.role == "assistant" else message.content
    return thoughtless.strip()


def _numbered(number: int, content: str) -> str:
    """``content`` between marks with its number; the space around it stays outside, where a template may trim it."""
    core = content.strip()
    before, _, after = content.partition(core) if core else (content, "", "")
    return f"{before}{CUT_OPEN}{number}{CUT_OPEN}{core}{CUT_CLOSE}{number}{CUT_CLOSE}{after}"


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    add_generation_prompt: bool = True,
) -> str:
    if not tokenizer.chat_template:
        raise LoraGANError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; set data.init_args.chat: false, "
            "or take a base model that was made for chat"
        )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(
            tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt, **dict(options)
            )
        )
    except Exception as error:  # a template raises what its author wrote, or any error of jinja
        roles = [message.role for message in messages]
        system = "leave out the system message (data.init_args.system), " * ("system" in roles)
        raise LoraGANError(
            f"the chat template of {tokenizer.name_or_path!r} cannot write a dialogue of {', '.join(roles)}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}; {system}correct the template, or set "
            "data.init_args.chat: false"
        ) from error


def _left_out(tokenizer: PreTrainedTokenizerBase, message: Message, last: bool) -> LoraGANError:
    what = "question" if last else "system message" if message.role == "system" else f"{message.role}'s earlier turn"
    remedy = {
        "system": "leave out data.init_args.system and write the instruction into the prompt",
        "user": "take a template that writes each message's content as text",
    }.get(message.role, "take a template that keeps the dialogue, or data of one turn")
    return LoraGANError(
        f"the chat template of {tokenizer.name_or_path!r} leaves out or changes the {what}, {message.content[:80]!r}: "
        f"{remedy}, or set data.init_args.chat: false"
    )


# what a run writes


@dataclass(frozen=True)
class PromptFormat:
    """How a run writes its prompts; a checkpoint holds it, so that inference writes them the same way.

    Args:
        templates: The templates of the source, each with its own fields; without chat they are the whole prompt, with
            chat their own words are part of what the user says.
        turns: Templates of a turn with {text}, by role, of a source of dialogues; None where each prompt is one
            question. Not used with chat.
        chat: Whether prompts are written with the chat template of the tokenizer.
        system: The system message of a chat.
        chat_template_kwargs: Further variables of the chat template, such as enable_thinking.
    """

    templates: tuple[str, ...] = (default_template("{prompt}"),)
    turns: Mapping[str, str] | None = None
    chat: bool = False
    system: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    @property
    def keeps_dialogue(self) -> bool:
        """Whether a prompt can have earlier turns."""
        return self.chat or self.turns is not None

    def write(self, tokenizer: PreTrainedTokenizerBase, example: Example) -> Example:
        """``example`` with its prompt in this format; raises as :func:`as_chat`."""
        return as_chat(tokenizer, example, self.system, self.chat_template_kwargs) if self.chat else example

    def replaces_system(self, example: Example) -> bool:
        """Whether :meth:`write` takes an own system message out of the example."""
        if not self.chat or self.system is None:
            return False
        own = [message.content for message in example.messages if message.role == "system"]
        return own not in ([], [self.system])

    def asked(self, question: str) -> Example:
        """One question as an example of the run.

        Raises:
            LoraGANError: The run's templates have several fields, or ask a question in several ways.
        """
        if self.turns and not self.chat:
            return self.dialogue([Message("user", question)])
        single = {t: names[0] for t in self.templates if len(names := fields_of(t)) == 1}
        written = {fill(template, **{name: question}): (template, name) for template, name in single.items()}
        if len(written) == 1:
            ((template, name),) = written.values()
            return self.filled(template, {name: question})
        listed = " and ".join(map(repr, self.templates))
        raise LoraGANError(
            f"the run was trained with the prompts {listed}, which a question alone does not decide; give "
            "--template with {prompt} in the place of the question, or rows with these fields to generate"
        )

    def dialogue(self, messages: Sequence[Message]) -> Example:
        """A dialogue as an example of the run; the last message is the user's.

        Raises:
            LoraGANError: The run's prompts are single questions, and this is more.
        """
        if self.chat:
            return Example(messages[-1].content, "", messages=tuple(messages))
        turns = self.turns or {}
        if len(messages) == 1 and not turns:
            return self.asked(messages[-1].content)
        if unknown := {message.role for message in messages} - set(turns):
            raise LoraGANError(
                f"the run's prompts have no place for a turn of {', '.join(sorted(unknown))}; "
                "ask the last question alone, or train with data.init_args.chat: true"
            )
        written = [fill(turns[m.role], text=mark(m.content, cuttable=False)) for m in messages]
        made = unmark("".join(written) + before_text(turns["assistant"]))
        return Example(made.text, "", messages=tuple(messages), literal=made.literal)

    def row(self, values: Mapping[str, object]) -> Example | None:
        """A row with all fields of one of the templates as an example; None if it has not."""
        texts = {name: value for name, value in values.items() if isinstance(value, str) and value.strip()}
        for template in () if self.turns else sorted(self.templates, key=lambda template: -len(fields_of(template))):
            names = fields_of(template)
            if names and texts.keys() >= set(names):
                return self.filled(template, {name: texts[name] for name in names})
        return None

    def filled(self, template: str, fields: Mapping[str, str]) -> Example:
        """A template with its fields as an example without target."""
        made = prompt(template, (), **fields)
        message = user_message(template, fields, ())
        return Example(made.text, "", messages=(message,), literal=made.literal)
