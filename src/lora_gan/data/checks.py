"""Check of the examples that a source gives, so that a mistake in an own source is named where it is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lora_gan.data.files import python_fault
from lora_gan.errors import DataError
from lora_gan.types import Example, Message, Negative

TEXTS = ("prompt", "target", "group", "source", "split", "item")
LISTS = {"references": str, "answers": str, "tests": str, "negatives": Negative, "messages": Message}  # what they hold
WRITTEN = {str: "a text", Negative: 'Negative(text, kind="…")', Message: "Message(role, content)"}


def checked(examples: Iterable[Example], source: str) -> Iterator[Example]:
    """The examples of the source of that name.

    Raises:
        DataError: One is no example, a field is of the wrong type, or a text cannot be encoded as UTF-8.
    """
    if isinstance(examples, str) or not isinstance(examples, Iterable):
        raise DataError(
            f"the source {source}: rows() returned {_kind(examples)}; return a list of Example(prompt, target, …), or "
            "yield them"
        )
    for number, example in enumerate(examples, start=1):
        yield check(example, f"the source {source}, example {number}")


def check(example: Example, where: str) -> Example:
    """``example`` as it is; raises as :func:`checked`."""
    if not isinstance(example, Example):
        raise DataError(f"{where} is {_kind(example)}, not lora_gan.types.Example(prompt, target, …)")
    for name in TEXTS:
        _check_text(getattr(example, name), f"{where}: its {name}")
    for name, kind in LISTS.items():
        _check_list(getattr(example, name), kind, f"{where}: its {name}")
    for negative in example.negatives:
        _check_text(negative.text, f"{where}: the text of a negative")
        _check_text(negative.kind, f"{where}: the kind of a negative")
    for message in example.messages:
        _check_text(message.content, f"{where}: the content of a message")
    for reference in example.references:
        _check_text(reference, f"{where}: a reference")
    for answer in example.answers:
        _check_text(answer, f"{where}: an accepted final answer")
    for test in example.tests:
        _check_text(test, f"{where}: a test")
        if fault := python_fault(test):
            raise DataError(f"{where}: the test {test!r} is not Python: {fault}; fix or delete it")
    return example


def _check_list(values: Sequence[object], kind: type, what: str) -> None:
    if not isinstance(values, tuple | list):
        raise DataError(f"{what} are {_kind(values)}; give a tuple of them, each as {WRITTEN[kind]}")
    for value in values:
        if not isinstance(value, kind):
            raise DataError(f"{what} hold {_kind(value)}; write each of them as {WRITTEN[kind]}")


def _check_text(text: object, what: str) -> None:
    if not isinstance(text, str):
        raise DataError(f"{what} is {_kind(text)}, not text; write a text, an empty one where there is none")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds half of a character, {text[error.start]!r} at {error.start}, which no tokenizer can read; "
            "clean it with lora_gan.data.files.clean"
        ) from error


def _kind(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
