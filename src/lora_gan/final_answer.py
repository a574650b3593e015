r"""Final answers: what counts in a completion, apart from the work before it.

They stand after a marker (``#### 72``), after the thinking (``</think>``), in ``\boxed{72}``, or where a regular
expression finds them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from lora_gan.errors import LoraGANError


@dataclass(frozen=True)
class Parts:
    """A completion, from its beginning; all is work where there is no final answer."""

    work: str
    lead: str = ""  # between the two, such as a marker
    answer: str = ""


class FinalAnswer(ABC):
    """Finds the final answer in a completion. A subclass writes :meth:`split`."""

    @abstractmethod
    def split(self, text: str) -> Parts:
        """The parts of a completion."""

    def __call__(self, text: str) -> str | None:
        """The final answer, without outer white space; None if the completion has none."""
        return self.split(text).answer.strip() or None

    def work(self, text: str) -> str:
        """What stands before the final answer, without white space at its end; all of it where there is none."""
        return self.split(text).work.rstrip()


class AfterMarker(FinalAnswer):
    """The text after the last occurrence of a marker, as GSM8K ends with ``#### 72``, without a final full stop.

    Args:
        marker: The text before the final answer.

    Raises:
        LoraGANError: The marker is empty.
    """

    def __init__(self, marker: str = "####") -> None:
        self.marker = _given("marker", marker, "####")

    def split(self, text: str) -> Parts:
        work, found, rest = text.rpartition(self.marker)
        answer = rest.lstrip()
        space = rest[: len(rest) - len(answer)]
        return Parts(work, found + space, answer.rstrip().removesuffix(".")) if found else Parts(text)


class AfterThinking(FinalAnswer):
    """The text after the end of the thinking; none where the thinking did not end.

    Args:
        end: What ends the thinking. It must be text: a decoder leaves out special tokens.

    Raises:
        LoraGANError: The end is empty.
    """

    def __init__(self, end: str = "</think>") -> None:
        self.end = _given("end", end, "</think>")

    def split(self, text: str) -> Parts:
        return Parts(*text.partition(self.end))


class Boxed(FinalAnswer):
    r"""What stands in the last ``\boxed{…}`` whose braces are balanced; ``\{`` and ``\}`` are no braces."""

    def split(self, text: str) -> Parts:
        for start in reversed([match.start() for match in re.finditer(r"\\boxed\s*\{", text)]):
            inside = text.index("{", start) + 1
            end = _closing(text, inside)
            if end is not None:
                return Parts(text[:start], text[start:inside], text[inside:end])
        return Parts(text)


class Pattern(FinalAnswer):
    r"""The first group of the last match of a regular expression, such as ``answer is (\d+)``.

    Args:
        pattern: The regular expression in Python's syntax; ``(?s)`` at its start lets a dot match line breaks.

    Raises:
        LoraGANError: It is no regular expression, or it has no group.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        try:
            self.compiled = re.compile(pattern)
        except re.error as error:
            raise LoraGANError(
                f"the pattern {pattern!r} is no regular expression: {error}; put a backslash before each sign that "
                "stands for itself, such as \\( or \\$"
            ) from error
        if not self.compiled.groups:
            raise LoraGANError(
                f"the pattern {pattern!r} has no group; put parentheses around the final answer, as in answer is (.+)"
            )

    def split(self, text: str) -> Parts:
        last = None
        for last in self.compiled.finditer(text):  # noqa: B007 — the last one counts
            pass
        if last is None:
            return Parts(text)
        before = last.start() if last[1] is None else last.start(1)
        return Parts(text[: last.start()], text[last.start() : before], last[1] or "")


def find_answer(text: str, final_answer: FinalAnswer | None) -> str | None:
    """The final answer of a completion; None if it has none. Without a setting the whole completion is the answer."""
    return (text.strip() or None) if final_answer is None else final_answer(text)


def _given(name: str, text: str, example: str) -> str:
    if not text.strip():
        raise LoraGANError(
            f"{name} must not be empty, got {text!r}; give the text before the answer, such as {example}"
        )
    return text


def _closing(text: str, start: int) -> int | None:
    """Where the brace closes that was opened before ``start``; None where it does not."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return start + brace.start()
    return None
