"""Dialogues in rows: messages (role, content), ShareGPT turns (from, value), or single texts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lora_gan.data.files import Row
from lora_gan.errors import DataError
from lora_gan.types import Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
_SPEAKER = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")  # of Anthropic's preferences: "\n\nHuman: …\n\nAssistant: …"


def dialogue(row: Row, prompt: str | None, reply: str | None) -> list[Message]:
    """The turns in the field ``reply`` after those in ``prompt``, unless ``reply`` repeats them; one may be None.

    A field ``system`` is the system message where the turns have none. Replies before the first question, which most
    chat templates cannot write, are left out; the row says so in ``repaired``.

    Raises:
        DataError: A field is missing or is no text or list of messages, or a message has another role or no text.
    """
    opening = messages(row, prompt, "user") if prompt else []
    turns = _replies(row, prompt, reply) if reply else []
    if not all(turn in turns for turn in opening):
        turns = opening + turns
    if all(turn.role != "system" for turn in turns):
        turns = [Message("system", row.text("system", default="")), *turns]
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
    if first < len(turns) and any(turn.role == "assistant" for turn in turns[:first]):
        row.repaired.add("turns_before_the_first_question")
    return [turn for turn in turns[:first] if turn.role == "system" and turn.content] + turns[first:]


def messages(row: Row, field: str, role: str) -> list[Message]:
    """The messages in a field; a text is one message of ``role``."""
    if isinstance(row.values.get(field), str):
        return [Message(role, row.text(field))]
    return _list_of_messages(row, field)


def _replies(row: Row, prompt: str | None, reply: str) -> list[Message]:
    return messages(row, reply, "assistant") if prompt else _whole(row, reply)


def is_dialogue(value: object) -> bool:
    """Whether a field holds messages, not texts."""
    return isinstance(value, list) and any(isinstance(turn, Mapping) for turn in value)


def is_transcript(value: object) -> bool:
    """Whether a field holds a whole dialogue as one text, ``"\\n\\nHuman: …\\n\\nAssistant: …"``."""
    return isinstance(value, str) and bool(_SPEAKER.match(value))


def _whole(row: Row, field: str) -> list[Message]:
    """The dialogue in a field, from its first turn on."""
    value = row.values.get(field)
    if not isinstance(value, str):
        return _list_of_messages(row, field)
    if not is_transcript(value):
        raise DataError(
            f"{row.where}: the field {field!r} is str, not a list of messages, and there is no field 'prompt' that it "
            'could answer; add one, or write the dialogue as "\\n\\nHuman: …\\n\\nAssistant: …"'
        )
    speakers = _SPEAKER.split(value)[1:]
    pairs = zip(speakers[::2], speakers[1::2], strict=True)
    return [Message("user" if name == "Human" else "assistant", row.clean(text)) for name, text in pairs]


def _list_of_messages(row: Row, field: str) -> list[Message]:
    value = row.values.get(field)
    if not isinstance(value, list):
        if field not in row.values:
            row.text(field)  # says which fields there are
        kind = "null" if value is None else type(value).__name__
        remedy = "put the number in quotes, or " * isinstance(value, int | float) + "fix or delete the row"
        raise DataError(f"{row.where}: the field {field!r} is {kind}, not a list of messages or a text; {remedy}")
    return [_message(row, turn, f"{row.where}: turn {n} of {field!r}") for n, turn in enumerate(value, start=1)]


def _message(row: Row, turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is {type(turn).__name__}, not an object with role and content; fix or delete the row")
    named = turn.get("role", turn.get("from"))
    role = ROLES.get(named.casefold()) if isinstance(named, str) else None
    if role is None:
        raise DataError(f"{where} has the role {named!r}, not system, user or assistant; change or delete the row")
    content = turn.get("content", turn.get("value"))
    if content is None and (turn.get("tool_calls") or turn.get("function_call")):
        raise DataError(f"{where} calls a tool and says nothing; tool calls cannot be learned, so delete the row")
    return Message(role, row.clean("".join(_texts(content, where))), learned=_learned(turn, where))


def _learned(turn: Mapping[str, object], where: str) -> bool:
    """Whether a reply is a target: a field ``weight`` of 0 says that it is not."""
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(f"{where} has the weight {weight!r}, not 0 or 1; change it, or repeat rows that matter more")
    return weight != 0


def _texts(content: object, where: str) -> list[str]:
    """The texts of a content: a text, or a list of parts such as ``{"type": "text", "text": "…"}``."""
    if isinstance(content, str):
        return [content]
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") in ("text", None) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else "null" if part is None else type(part).__name__
            raise DataError(f"{where} holds {kind}, not text; only text can be learned, so change or delete the row")
        texts.append(text)
    return texts
