"""Access to the page: from this machine, or with a password; nothing but what the page itself asks for is answered."""

from __future__ import annotations

import base64
import hmac
import ipaddress
import json
import os
import re
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lora_gan.errors import LoraGANError

PASSWORD = "LORA_GAN_UI_PASSWORD"  # environment variable
SHORTEST = 12  # characters of a password: too many to try out
BODY = 1 << 17  # bytes of a request
PATHS = (
    re.compile(  # all that the page asks for; Gradio's routes of files, uploads, proxies and its API are not among them
        r"/|/config|/theme\.css|/favicon\.ico|/report/\d{1,4}|/(assets|static)(/[\w.-]+)+"
        r"|/gradio_api/(queue/join|queue/data|cancel|reset|startup-events|heartbeat/\w{1,64})"
    )
)
QUERIED = "/queue/data"  # the only route whose query is read
POLICY = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; frame-src 'self'; frame-ancestors 'self'; base-uri 'self'; "
    "form-action 'none'"
)
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'self'"
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


def read_password(file: str | None) -> str | None:
    """The password in a file, else in the environment; None where there is none.

    It is no argument of the command, because other accounts of the machine can read those.

    Raises:
        LoraGANError: The file cannot be read, or the password is too short.
    """
    try:
        given = Path(file).read_text(encoding="utf-8").strip() if file else os.environ.get(PASSWORD)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise LoraGANError(f"the password cannot be read from {file}: {reason}; write it on one line there") from error
    if given is not None and (len(given) < SHORTEST or "\n" in given):
        raise LoraGANError(
            f"the password in {file or PASSWORD} must be one line of at least {SHORTEST} characters, so that it cannot "
            f"be guessed; got {len(given)}"
        )
    return given


def check_host(host: str, password: str | None) -> None:
    """Refuse to serve other machines without a password.

    Raises:
        LoraGANError: The host is not the loopback, and there is no password.
    """
    if password is None and not is_loopback(host):
        raise LoraGANError(
            f"--host {host} lets other machines in, which needs a password: write one of at least {SHORTEST} "
            f"characters to a file that only you can read and name it with --password_file, or set {PASSWORD}; without "
            "--host the page is for this machine only"
        )


def is_loopback(host: str) -> bool:
    """Whether a host, an address or a name, is this machine and is reached from it alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free.

    Raises:
        LoraGANError: The port is taken or not allowed, or the host is none of this machine.
    """
    if not 0 <= port <= 65535:
        raise LoraGANError(f"--port must be from 0 to 65535, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=64)
    except OSError as error:
        raise LoraGANError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port, 0 for any that is free"
        ) from error


class Guard:
    """ASGI middleware: answers what the page asks for, of this machine or with the password, and nothing else.

    A website that the same browser shows can send requests here, too. So a request from another origin is refused,
    and, without a password, one under another host name, which a website can point to the loopback (DNS rebinding).
    Pages may load nothing from elsewhere, and run no script but their own, whatever a text in them holds.
    """

    def __init__(self, app: Application, hosts: Iterable[str], password: str | None) -> None:
        """
        Args:
            app: What answers.
            hosts: Names of the host that are answered without a password.
            password: Of any user, asked for by HTTP Basic; None: there is none.
        """
        self.app, self.hosts, self.password = app, {host.casefold() for host in hosts}, password

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            refusal = self.refusal(scope["method"], scope["path"], headers)
            body = b"" if refusal or scope["method"] != "POST" else await whole(receive)
            refusal = refusal or (None if _is_plain(body) else (400, "values that the page does not send"))
            if refusal:
                await refuse(send, *refusal)
            else:
                await self.app(bare(scope), replayed(body, receive), Sealed(send, scope["path"]).send)

    def refusal(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and words, where a request is refused."""
        if self.password is None and host_name(headers.get("host", "")) not in self.hosts:
            return 403, "unknown host name"
        if self.password is not None and not self._knows(headers.get("authorization", "")):
            return 401, "a password is needed"
        if not _same_origin(method, headers):
            return 403, "a request from another page"
        if method not in ("GET", "HEAD", "POST") or ".." in path or not PATHS.fullmatch(path):
            return 404, "not found"
        if method == "POST":
            return _refused_body(headers)
        return None

    def _knows(self, authorization: str) -> bool:
        kind, _, coded = authorization.partition(" ")
        try:
            given = base64.b64decode(coded, validate=True).partition(b":")[2]
        except ValueError:
            given = b""
        return kind.casefold() == "basic" and hmac.compare_digest(given, (self.password or "").encode())


class Sealed:
    """The answer to a request, with headers that keep a page to itself."""

    def __init__(self, send: Send, path: str) -> None:
        self._send, self.is_page, self.is_report = send, path == "/", path.startswith("/report/")
        self.nonce = secrets.token_urlsafe(16)
        self.start: MutableMapping[str, Any] = {}
        self.body = b""

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Pass on a part of the answer; the page itself once it is whole, with its scripts marked as its own."""
        if message["type"] == "http.response.start":
            self.start = {**message, "headers": [*message["headers"], *self._headers()]}
            if not self.is_page:
                await self._send(self.start)
        elif not self.is_page:
            await self._send(message)
        else:
            self.body += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_page()

    async def _send_page(self) -> None:
        body = self.body.replace(b"<script", f'<script nonce="{self.nonce}"'.encode())
        kept = [(name, value) for name, value in self.start["headers"] if name.lower() != b"content-length"]
        length = (b"content-length", str(len(body)).encode())
        await self._send({**self.start, "headers": [*kept, length]})
        await self._send({"type": "http.response.body", "body": body})

    def _headers(self) -> list[tuple[bytes, bytes]]:
        policy = REPORT_POLICY if self.is_report else POLICY.format(nonce=self.nonce)
        named = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            **({"cache-control": "no-store"} if self.is_page or self.is_report else {}),
        }
        return [(name.encode(), value.encode()) for name, value in named.items()]


def bare(scope: Scope) -> Scope:
    """A request without a query that is not read, and without leave to compress the page, whose scripts are marked."""
    query = scope["query_string"] if scope["path"].endswith(QUERIED) else b""
    headers = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding" or scope["path"] != "/"]
    return {**scope, "query_string": query, "headers": headers}


def host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").casefold()
    except ValueError:
        return ""


def _same_origin(method: str, headers: dict[str, str]) -> bool:
    """Whether the browser sends a request for the page itself, or a person follows a link to it."""
    origin = headers.get("origin")
    if origin is not None and origin.casefold().partition("://")[2] != headers.get("host", "").casefold():
        return False
    linked = (
        method == "GET" and headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    )
    return linked or headers.get("sec-fetch-site", "none") in ("none", "same-origin")


def _refused_body(headers: dict[str, str]) -> tuple[int, str] | None:
    length = headers.get("content-length", "")
    if not length.isdigit():
        return 411, "the length is missing"
    return (413, f"more than {BODY} bytes") if int(length) > BODY else None


def _is_plain(body: bytes) -> bool:
    """Whether what an event of the page carries are texts and numbers: no files, which Gradio would look for."""
    try:
        sent = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        return False
    values = sent.get("data") or [] if isinstance(sent, dict) else None
    return isinstance(values, list) and all(value is None or isinstance(value, str | int | float) for value in values)


async def whole(receive: Receive) -> bytes:
    """The body of a request, whose length is known to be bounded."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = bool(message.get("more_body"))
    return body


def replayed(body: bytes, receive: Receive) -> Receive:
    """Receives a body that was read already, then what follows it."""
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> MutableMapping[str, Any]:
        return parts.pop() if parts else await receive()

    return receive_again


async def refuse(send: Send, status: int, words: str) -> None:
    """Answer with a status and words."""
    body = words.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    asks = [(b"www-authenticate", b'Basic realm="lora-gan", charset="UTF-8"')] * (status == 401)
    await send({"type": "http.response.start", "status": status, "headers": headers + asks})
    await send({"type": "http.response.body", "body": body})
