"""Ratings by people: lines of JSON in TRL's formats of preferences, which are data to train on.

A choice between two answers is ``{"prompt", "chosen", "rejected", "time", "run"}``, a rating of one
``{"prompt", "completion", "label", "time", "run"}``. Of a run whose conversations go on, prompt and answers are lists
of messages (TRL's conversational format), of another one texts: the question as it was asked, without the run's
template.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from lora_gan.types import Message

Prompt = str | Sequence[Message]


def choice(prompt: Prompt, chosen: str, rejected: str, run: str) -> dict[str, Any]:
    """The better of two answers to the same prompt."""
    answers = {"chosen": _answer(prompt, chosen), "rejected": _answer(prompt, rejected)}
    return {"prompt": _written(prompt), **answers, "time": now(), "run": run}


def single(prompt: Prompt, completion: str, good: bool, run: str) -> dict[str, Any]:
    """A good or bad answer."""
    return {
        "prompt": _written(prompt),
        "completion": _answer(prompt, completion),
        "label": good,
        "time": now(),
        "run": run,
    }


def now() -> str:
    """ISO 8601, UTC, in seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _written(prompt: Prompt) -> str | list[dict[str, str]]:
    return prompt if isinstance(prompt, str) else [_message(turn) for turn in prompt]


def _answer(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    return text if isinstance(prompt, str) else [_message(Message("assistant", text))]


def _message(turn: Message) -> dict[str, str]:
    return {"role": turn.role, "content": turn.content}
