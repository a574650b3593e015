r"""Final answers: what counts in a completion, apart from the work before it.

They stand after a marker (``#### 72``), after the thinking (``</think>``), in ``\boxed{72}``, or where a regular
expression finds them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

from lora_gan.errors import LoraGANError


class FinalAnswer(ABC):
    """Finds the final answer in a completion. A subclass writes :meth:`split`."""

    @abstractmethod
    def split(self, text: str) -> tuple[str, str]:
        """The work and the final answer of a completion; all is work, and the answer empty, where there is none."""

    def __call__(self, text: str) -> str | None:
        """The final answer, without outer white space; None if the completion has none."""
        return self.split(text)[1].strip() or None

    def work(self, text: str) -> str:
        """What stands before the final answer, without white space at its end; all of it where there is none."""
        return self.split(text)[0].rstrip()


class AfterMarker(FinalAnswer):
    """The text after the last occurrence of a marker, as GSM8K ends with ``#### 72``, without a final full stop.

    Args:
        marker: The text before the final answer.

    Raises:
        LoraGANError: The marker is empty.
    """

    def __init__(self, marker: str = "####") -> None:
        self.marker = _given("marker", marker, "####")

    def split(self, text: str) -> tuple[str, str]:
        work, found, answer = text.rpartition(self.marker)
        return (work, answer.strip().removesuffix(".")) if found else (text, "")


class AfterThinking(FinalAnswer):
    """The text after the end of the thinking; none where the thinking did not end.

    Args:
        end: What ends the thinking. It must be text: a decoder leaves out special tokens.

    Raises:
        LoraGANError: The end is empty.
    """

    def __init__(self, end: str = "</think>") -> None:
        self.end = _given("end", end, "</think>")

    def split(self, text: str) -> tuple[str, str]:
        work, _, answer = text.partition(self.end)
        return work, answer


class Boxed(FinalAnswer):
    r"""What stands in the last ``\boxed{…}`` whose braces are balanced; ``\{`` and ``\}`` are no braces."""

    def split(self, text: str) -> tuple[str, str]:
        for start in reversed([match.start() for match in re.finditer(r"\\boxed\s*\{", text)]):
            inside = text.index("{", start) + 1
            end = _closing(text, inside)
            if end is not None:
                return text[:start], text[inside:end]
        return text, ""


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

    def split(self, text: str) -> tuple[str, str]:
        last = None
        for last in self.compiled.finditer(text):  # noqa: B007 — the last one counts
            pass
        return (text, "") if last is None else (text[: last.start()], last[1] or "")


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
