"""Who may see the page, and what it answers."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from lora_gan.errors import LoraGANError
from lora_gan.ui.access import BODY, PASSWORD, Guard, check_host, is_loopback, listen, read_password

HOST = {"host": "127.0.0.1:7860"}
JOIN = "/gradio_api/queue/join"
SECRET = "a long password"


def answered(
    path: str = "/", method: str = "GET", body: bytes = b"", password: str | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body that a guard with an application behind it gives."""
    sent: list[MutableMapping[str, Any]] = []

    async def app(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        got = (await receive())["body"] if scope["method"] == "POST" else b"<script>1</script>"
        assert scope["path"] != "/" or b"accept-encoding" not in dict(scope["headers"])  # to mark its scripts
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"18")]})
        await send({"type": "http.response.body", "body": got + scope["query_string"]})

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    length = {"content-length": str(len(body))} if method == "POST" else {}
    given = {**HOST, **length, **{name.replace("_", "-"): value for name, value in headers.items()}}
    scope = {
        "type": "http",
        "method": method,
        "path": path.partition("?")[0],
        "query_string": path.partition("?")[2].encode(),
        "headers": [(name.encode(), value.encode()) for name, value in given.items() if value],
    }
    asyncio.run(Guard(app, {"127.0.0.1", "localhost", "::1"}, password)(scope, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, sent[1]["body"]


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/config", "/theme.css", "/report/0", "/assets/index-a_B.js", "/static/fonts/a/b.woff2"),
        *("/gradio_api/heartbeat/a1b2", "/gradio_api/queue/data?session_hash=a"),
    ],
)
def test_what_the_page_asks_for_is_answered(path: str) -> None:
    assert answered(path)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/file=/etc/passwd", "/gradio_api/file=../x", "/file=/etc/passwd", "/gradio_api/file/etc/passwd"),
        *("/gradio_api/proxy=http://x", "/gradio_api/upload", "/gradio_api/info", "/gradio_api/run/ask", "/docs"),
        *("/gradio_api/call/ask", "/gradio_api/component_server", "/assets/../x", "/assets//etc/passwd", "/assets/"),
        *("/report/", "/report/../x", "/report/0/x", "/report/99999", "/monitoring", "/gradio_api/runs", "/logout"),
        *("/login", "/config\n", "//", "/gradio_api/deep_link", "/gradio_api/vibe-code", "/assets/a\x00b"),
    ],
)
def test_nothing_else_is(path: str) -> None:
    assert answered(path)[0] == 404
    assert answered(path, "POST", b"{}")[0] == 404


def test_other_websites_are_refused() -> None:
    """They reach the loopback through the same browser."""
    assert answered(host="evil.example")[0] == 403  # whose name was pointed to 127.0.0.1
    assert answered(host="127.0.0.1.evil.example:7860")[0] == 403
    assert answered(host="")[0] == 403
    assert answered(host="[::1")[0] == 403
    assert [answered(host=host)[0] for host in ("localhost:1", "[::1]:7860", "LOCALHOST")] == [200] * 3
    for origin in ("http://evil.example", "null", "http://127.0.0.1:80", "http://127.0.0.1:7860.evil.example"):
        assert answered(JOIN, "POST", b"{}", origin=origin)[0] == 403
    assert answered(JOIN, "POST", b"{}", origin="http://127.0.0.1:7860")[0] == 200
    for site in ("cross-site", "same-site"):
        assert answered("/report/0", sec_fetch_site=site, sec_fetch_mode="navigate", sec_fetch_dest="iframe")[0] == 403
        assert answered("/config", sec_fetch_site=site)[0] == 403
        assert answered("/", sec_fetch_site=site, sec_fetch_mode="navigate", sec_fetch_dest="document")[0] == 200
    assert answered("/", "PUT")[0] == 404 and answered("/", "OPTIONS")[0] == 404


def test_the_password_opens_everything_and_nothing_opens_without() -> None:
    def basic(text: str) -> str:
        return f"Basic {base64.b64encode(text.encode()).decode()}"

    for path in ("/", "/assets/a.js", "/report/0", "/gradio_api/file=/etc/passwd"):
        for wrong in (
            "",
            basic(""),
            basic("me:"),
            basic(f"me:{SECRET}x"),
            basic(SECRET),
            "Basic ä",
            f"Bearer {SECRET}",
        ):
            status, headers, _ = answered(path, password=SECRET, authorization=wrong)
            assert status == 401 and headers["www-authenticate"].startswith("Basic realm")
    right = basic(f"me:{SECRET}")
    assert answered(password=SECRET, authorization=right, host="my.machine:7860")[0] == 200
    assert answered(JOIN, "POST", b"{}", SECRET, authorization=right, origin="http://evil.example")[0] == 403


def test_requests_are_bounded_and_carry_no_files() -> None:
    assert answered(JOIN, "POST", b"{}", content_length=str(BODY + 1))[0] == 413
    assert answered(JOIN, "POST", b"{}", content_length="")[0] == 411
    assert answered(JOIN, "POST", b"{}", content_length="-1")[0] == 411
    good = b'{"data": ["hi", 1, 0.5, true, null], "event_data": {"index": 1}, "fn_index": 0}'
    assert answered(JOIN, "POST", good)[::2] == (200, good)
    file = b'{"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}'
    for bad in (file, b'{"data": [["/etc/passwd"]]}', b'{"data": {}}', b"[]", b"{", b"[" * 100_000, b"\xff"):
        assert answered(JOIN, "POST", bad)[0] in (400, 200 if bad == b'{"data": {}}' else 400)
    assert answered("/?deep_link=../x")[2].endswith(b"</script>")  # the query is not passed on


def test_the_page_runs_its_own_scripts_only() -> None:
    _, headers, body = answered(accept_encoding="br, gzip")
    policy = headers["content-security-policy"]
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert body == f'<script nonce="{nonce}">1</script>'.encode()
    assert headers["content-length"] == str(len(body))
    assert answered()[1]["content-security-policy"] != policy
    assert "script-src 'self' 'nonce-" in policy and "default-src 'none'" in policy
    assert answered("/report/0")[1]["content-security-policy"].startswith("sandbox; default-src 'none'; style-src")


def test_another_host_needs_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD, raising=False)
    assert read_password(None) is None
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        check_host(host, None)
    for host in ("0.0.0.0", "::", "192.168.0.1", "my.machine", ""):
        assert not is_loopback(host)
        with pytest.raises(LoraGANError, match=r"which needs a password.*--password_file"):
            check_host(host, None)
        check_host(host, SECRET)
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n", encoding="utf-8")
    assert read_password(str(file)) == SECRET
    monkeypatch.setenv(PASSWORD, "another password")
    assert (read_password(None), read_password(str(file))) == ("another password", SECRET)
    for wrong in ("", "short", f"{SECRET}\n{SECRET}"):
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(LoraGANError, match="one line of at least 12 characters"):
            read_password(str(file))
    with pytest.raises(LoraGANError, match=r"cannot be read from .*: No such file"):
        read_password(str(tmp_path / "none"))


def test_a_port_that_is_taken_is_named() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(LoraGANError, match=rf"cannot listen on 127.0.0.1, port {port}: .*choose another --port"):
            listen("127.0.0.1", port)
    with pytest.raises(LoraGANError, match="--port must be from 0 to 65535, got 70000"):
        listen("127.0.0.1", 70000)
