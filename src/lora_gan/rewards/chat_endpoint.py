"""Chat endpoint: a server that speaks OpenAI's chat completions, asked with retries and within a budget."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import cached_property
from importlib.util import find_spec
from threading import Event, Lock
from typing import Any, TypeVar

from lora_gan.errors import LoraGANError

Read = TypeVar("Read")
RETRIED = (408, 409, 425, 429)  # and 500 and above: what may be different the next time
LONGEST_PAUSE = 8.0  # seconds between two attempts, where the server names no time
REMEDIES = {
    400: "the server does not take the request as it is: compare max_tokens, temperature and extra with what it offers",
    401: "check the key in the environment variable that api_key_env names",
    403: "check the key in the environment variable that api_key_env names, and what it may use",
    404: "check base_url, which often ends in /v1, and model",
    429: "lower concurrency, or raise retries",
}


class Unanswered(Exception):
    """No usable answer after all attempts; the text says why, and how to fix it."""


class Unusable(Exception):
    """An attempt without a usable answer.

    Args:
        reason: What happened, and how to fix it.
        final: Whether another attempt would end the same way.
        wait: Seconds that the server asks to wait; None: it does not say.
    """

    def __init__(self, reason: str, final: bool = False, wait: float | None = None) -> None:
        super().__init__(reason)
        self.final = final
        self.wait = wait


@dataclass
class ChatEndpoint:
    """A model behind a URL. Threads may share it.

    Args:
        base_url: Address of the server, such as http://localhost:8000/v1.
        model: Name of the model there.
        api_key_env: Name of the environment variable that holds the key; None: no key.
        timeout: Seconds that an attempt may take.
        retries: Attempts after the first one.
        max_requests: Most attempts of this object; None: no limit.
        max_tokens: Length limit of an answer; None: that of the server.
        temperature: Sampling temperature of an answer; None: that of the server.
        extra: Further fields of a request.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    timeout: float = 60.0
    retries: int = 3
    max_requests: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    requests: int = field(default=0, init=False)  # attempts so far

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/]", self.base_url):
            raise LoraGANError(
                f"base_url must begin with http:// or https:// and name a server, such as http://localhost:8000/v1; "
                f"got {self.base_url!r}"
            )
        if not self.model:
            raise LoraGANError("model must be the name of a model of the server, got an empty text")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise LoraGANError(
                "api_key_env must be the name of an environment variable that holds the key, such as OPENAI_API_KEY, "
                "and never the key itself"
            )
        if not self.timeout > 0:
            raise LoraGANError(f"timeout must be > 0 seconds, got {self.timeout}")
        if self.temperature is not None and not self.temperature >= 0:
            raise LoraGANError(f"temperature must be at least 0, got {self.temperature}")
        for name, least in (("retries", 0), ("max_requests", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise LoraGANError(f"{name} must be at least {least}, got {value}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("client", "_lock")}

    @cached_property
    def client(self) -> Any:
        """The client of the package ``openai``.

        Raises:
            LoraGANError: The package or the key is missing.
        """
        if find_spec("openai") is None:
            raise LoraGANError("asking a chat endpoint needs the package openai: pip install openai")
        from openai import OpenAI

        key = "none" if self.api_key_env is None else os.environ.get(self.api_key_env)
        if not key:
            raise LoraGANError(
                f"api_key_env names the environment variable {self.api_key_env}, and it is not set: "
                f"export {self.api_key_env}=…"
            )
        return OpenAI(base_url=self.base_url, api_key=key, timeout=self.timeout, max_retries=0)

    @cached_property
    def _lock(self) -> Lock:
        return Lock()

    def open(self) -> None:
        """Make what threads share, so that none of them has to."""
        _ = self.client, self._lock

    def ask(self, text: str, read: Callable[[str], Read], stop: Event) -> Read:
        """What ``read`` makes of the answer to a user's message.

        Args:
            text: The message.
            read: Raises :class:`Unusable` for an answer that cannot be used.
            stop: When it is set, no further attempt is made.

        Raises:
            Unanswered: No attempt gave a usable answer, or the budget is spent.
        """
        attempt = 0
        while True:
            try:
                return read(self._attempt(text, stop))
            except Unusable as problem:
                attempt += 1
                if problem.final or attempt > self.retries or stop.wait(self._pause(problem, attempt)):
                    attempts = f"; {attempt} attempts" if attempt > 1 else ""
                    raise Unanswered(f"{problem}{attempts}") from problem

    def _pause(self, problem: Unusable, attempt: int) -> float:
        """Seconds until the next attempt: what the server asks for, at most ``timeout``, or twice as long each time."""
        return min(0.5 * 2 ** (attempt - 1), LONGEST_PAUSE) if problem.wait is None else min(problem.wait, self.timeout)

    def _attempt(self, text: str, stop: Event) -> str:
        """One request; the text of its answer, which is not empty."""
        import openai

        self._count(stop)
        fields = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        given = {name: value for name, value in fields.items() if value is not None}
        messages = [{"role": "user", "content": text}]
        try:
            found = self.client.chat.completions.create(
                model=self.model, messages=messages, extra_body=self.extra or None, **given
            )
        except openai.APITimeoutError as error:
            raise Unusable(
                f"{self.base_url} gave no answer within {self.timeout:g} seconds; raise timeout, or lower concurrency"
            ) from error
        except openai.APIConnectionError as error:
            raise Unusable(
                f"{self.base_url} cannot be reached ({error.__cause__ or error}); check base_url, and that the server "
                "runs"
            ) from error
        except openai.APIStatusError as error:
            raise self._refused(error) from error
        except (openai.OpenAIError, ValueError) as error:  # an answer of another format
            raise self._foreign(error) from error
        return self._text_of(found)

    def _count(self, stop: Event) -> None:
        with self._lock:
            if stop.is_set():
                raise Unusable("stopped, because another request failed", final=True)
            if self.max_requests is not None and self.requests >= self.max_requests:
                raise Unusable(f"the budget of {self.max_requests} requests is spent; raise max_requests", final=True)
            self.requests += 1

    def _refused(self, error: Any) -> Unusable:
        status = int(error.status_code)
        said = " ".join(str(error.message).split())[:300]
        remedy = REMEDIES.get(status, "its log may say why" if status >= 500 else "check base_url, model and extra")
        reason = f"{self.base_url} answers with HTTP status {status} for the model {self.model!r} ({said}); {remedy}"
        return Unusable(reason, status < 500 and status not in RETRIED, _retry_after(error.response.headers))

    def _foreign(self, got: object) -> Unusable:
        return Unusable(
            f"{self.base_url} does not answer with a chat completion ({_short(got)}); check base_url, which often ends "
            "in /v1"
        )

    def _text_of(self, found: Any) -> str:
        choices = getattr(found, "choices", None)
        message = getattr(choices[0], "message", None) if choices else None
        if message is None:
            raise self._foreign(found)
        text = str(message.content or "").strip()
        if not text:
            reason = choices[0].finish_reason  # type: ignore[index]
            raise Unusable(
                f"the model {self.model!r} gave an empty answer (finish_reason {reason}); raise max_tokens", wait=0.0
            )
        return text


def _retry_after(headers: Any) -> float | None:
    """Seconds of the header Retry-After, which gives these or a date; None without it."""
    given = headers.get("retry-after")
    if given is None:
        return None
    try:
        return max(float(given), 0.0)
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(given) - datetime.now(timezone.utc)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return None


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else text[:119] + "…"
