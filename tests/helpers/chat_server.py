"""A real HTTP server that speaks chat completions and answers as a test says."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the server sends: an answer of the model, or another body."""

    answer: str | None = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | None = None


Script = Callable[[str], Reply | str]  # the user's message → the answer


@dataclass
class ChatServer:
    """What was asked. ``texts`` leaves out the request with which a run begins."""

    url: str
    script: Script
    texts: list[str] = field(default_factory=list)
    fields: list[dict[str, Any]] = field(default_factory=list)  # of every request
    keys: set[str] = field(default_factory=set)
    lock: Lock = field(default_factory=Lock)
    at_once: int = 0
    most_at_once: int = 0

    def reply(self, request: dict[str, Any], key: str) -> Reply:
        text = request["messages"][-1]["content"]
        with self.lock:
            self.fields.append(request)
            self.keys.add(key)
        if text == "Answer with the number 1." and request["model"] == "judge":
            return Reply("1")
        with self.lock:
            self.texts.append(text)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            found = self.script(text)
        finally:
            with self.lock:
                self.at_once -= 1
        return found if isinstance(found, Reply) else Reply(found)


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            reply = server.reply(request, self.headers.get("authorization", ""))
            body = (reply.body if reply.body is not None else json.dumps(completion(reply.answer))).encode()
            try:
                self.send_response(reply.status)
                for name, value in {"content-type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:  # the client has given up
                self.close_connection = True

        def log_message(self, *given: Any) -> None:
            """Print nothing."""

    return Handler


def completion(answer: str | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}


@contextmanager
def serving(script: Script) -> Iterator[ChatServer]:
    """A server on a free port of this machine."""
    server = ChatServer("", script)
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    http.daemon_threads = True
    http.block_on_close = False
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def closed_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shown(text: str) -> dict[str, str]:
    """The blocks of what the judge reads, by name."""
    found = re.findall(r"^\[([\w ]+) ([0-9a-f]{8})\]\n(.*?)\n\[end \2\]$", text, re.DOTALL | re.MULTILINE)
    return {name: content for name, _, content in found}
