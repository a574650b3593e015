"""The page in a real browser: it streams, ratings land in the file, and texts stay texts.

Needs gradio, playwright and chromium, see CONTRIBUTING.md; without them the tests are skipped.
"""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_gan.cli import main
from lora_gan.ui.talk import CHARACTERS
from tests.helpers.browser import MISSING, Server, browser, served

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>[a](javascript:3)"
SECRET = "a long password"
READY = "#generator_good:not([disabled])"
SAVED = "#said:has-text('Saved')"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING}")]


@pytest.fixture(scope="module")
def run(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on a tiny base that has learned to answer with HTML."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"{EVIL} {n}", "completion": EVIL} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    main(
        [
            "fit",
            f"--config={ROOT / 'configs' / 'sft.yaml'}",
            f"--model.base={bases['gpt2']}",
            "--model.generator.optimizer.init_args.lr=0.01",
            "--model.sampling.max_new_tokens=80",
            "--data.source=lora_gan.data.StandardFormat",
            f"--data.path={folder / 'rows.jsonl'}",
            "--data.batch_size=4",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=200",
            "--trainer.val_check_interval=200",
            f"--trainer.logger.init_args.save_dir={folder}",
        ]
    )
    return next(folder.glob("*/version_0"))


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    with served([run], "--max_new_tokens=80") as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


class Tab:
    """A page in a browser of its own, with what must not happen in it."""

    def __init__(self, chromium: Any, url: str, **settings: Any) -> None:
        self.page = chromium.new_context(**settings).new_page()
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.page.goto(url)
        self.page.wait_for_selector("#send")

    def ask(self, question: str, wait: bool = True) -> None:
        self.page.fill("#question textarea", question)
        self.page.click("#send")
        if wait:
            self.page.wait_for_selector(f"#generator:has-text({json.dumps(question)})")
            self.page.wait_for_selector(READY)

    def rate(self, button: str) -> None:
        self.page.click(f"#{button}")
        self.page.wait_for_selector(f"#{button}[disabled]")
        self.page.wait_for_selector(SAVED)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))


@pytest.fixture
def tab(chromium: Any, server: Server) -> Iterator[Callable[[], Tab]]:
    opened: list[Tab] = []

    def make() -> Tab:
        opened.append(Tab(chromium, server.url))
        return opened[-1]

    yield make
    for each in opened:
        assert each.dialogs == []  # no script of a text has run
        assert [url for url in each.requests if not url.startswith((server.url, "data:", "blob:"))] == []
        each.page.context.close()


def ratings(run: Path) -> list[dict[str, Any]]:
    path = run / "ratings.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def asked(rating: dict[str, Any]) -> list[str]:
    return [message["content"] for message in rating["prompt"] if message["role"] == "user"]


def test_an_answer_streams(tab: Callable[[], Tab]) -> None:
    page = tab()
    page.page.evaluate(
        "() => { window.seen = []; const box = document.querySelector('#generator');"
        "new MutationObserver(() => window.seen.push(box.innerText.length))"
        ".observe(box, {subtree: true, childList: true, characterData: true}) }"
    )
    page.ask("hello")
    assert len(set(page.page.evaluate("() => window.seen"))) > 4
    assert "hello" in page.text("#base") and "both models read one conversation" in page.text("#about")
    assert "has never been trained" in page.text("#about")  # the discriminator


def test_html_is_shown_as_text(tab: Callable[[], Tab], server: Server) -> None:
    page = tab()
    page.ask(f"{EVIL} 3")
    assert page.text("#generator").count(EVIL) == 2, page.text("#generator")  # the question, and what it has learned
    for role in ("#generator", "#base"):
        assert page.page.query_selector(f"{role} .message img, {role} .message a, {role} .message script") is None
    page.page.get_by_role("tab", name="Samples").click()
    page.page.wait_for_selector(f"#samples [role=gridcell]:has-text({json.dumps(EVIL)})")
    assert page.page.query_selector("#samples img, #samples script, #samples [role=gridcell] a") is None
    page.page.get_by_role("tab", name="Report").click()
    report = page.page.frame_locator("#report iframe")
    assert EVIL in report.locator("td", has_text="alert(1)").first.inner_text(timeout=60_000)
    assert report.locator("img, script").count() == 0
    assert not any(url == f"{server.url}/x" for url in page.requests)


def test_ratings_land_in_the_file(tab: Callable[[], Tab], run: Path) -> None:
    before, page = len(ratings(run)), tab()
    page.ask(f"{EVIL} 5")
    page.rate("generator_better")
    page.rate("base_bad")
    choice, single = ratings(run)[before:]
    assert (asked(choice), choice["run"]) == ([f"{EVIL} 5"], f"{run.parent.name}/version_0")
    assert choice["chosen"] == [{"role": "assistant", "content": EVIL}]
    assert choice["rejected"] == single["completion"] and single["label"] is False
    assert page.page.is_disabled("#base_better") and page.page.is_enabled("#generator_bad")
    page.page.click("#new")
    page.page.wait_for_selector("#generator_bad[disabled]")
    assert len(ratings(run)) == before + 2


def test_two_tabs_at_once(tab: Callable[[], Tab], run: Path) -> None:
    before, one, other = len(ratings(run)), tab(), tab()
    one.ask("of the first", wait=False)
    other.ask("of the second", wait=False)
    for page, mine, theirs in ((one, "of the first", "of the second"), (other, "of the second", "of the first")):
        page.page.wait_for_selector(READY)
        assert mine in page.text("#generator") and theirs not in page.text("#generator")
    one.page.click("#generator_good")
    other.page.click("#generator_good")
    for page in (one, other):
        page.page.wait_for_selector(SAVED)
    assert sorted(map(asked, ratings(run)[before:])) == [["of the first"], ["of the second"]]


def test_stopping_and_loading_again_leave_the_page_usable(tab: Callable[[], Tab]) -> None:
    page = tab()
    page.ask("first", wait=False)
    page.page.reload()
    page.page.wait_for_selector("#send")
    page.ask("second", wait=False)
    page.page.click("#stop")
    page.page.wait_for_selector("#said:has-text('Stopped'), " + READY)
    page.ask("third")
    assert "first" not in page.text("#generator")


def test_what_is_typed_wrong_is_said(tab: Callable[[], Tab]) -> None:
    page = tab()
    page.page.fill("#question textarea", "   ")
    page.page.click("#send")
    page.page.wait_for_selector(".toast-body:has-text('The question is empty')")
    page.page.fill("#question textarea", f"{EVIL} " * 3)
    page.page.click("#send")
    page.page.wait_for_selector(".toast-body:has-text('fit into the context of 256')")
    page.page.wait_for_selector("#send")
    assert page.page.input_value("#question textarea").startswith(EVIL)  # to be shortened
    page.page.fill("#question textarea", "x" * (CHARACTERS + 100))
    assert len(page.page.input_value("#question textarea")) == CHARACTERS
    page.ask("and now right")


def status(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_no_path_reaches_the_files(server: Server, run: Path) -> None:
    config = run / "config.yaml"
    for path in (f"file={config}", f"file/{config}", "file=ratings.jsonl", "upload", "info", "proxy=http://x"):
        assert status(f"{server.url}/gradio_api/{path}") == 404
    for path in (f"assets/../../..{config}", f"assets/%2e%2e/%2e%2e{config}", f"static/{config}", f"file={config}"):
        assert status(f"{server.url}/{path}") in (403, 404)
    assert status(f"{server.url}/report/0") == 200 and status(f"{server.url}/report/1") == 404
    assert status(server.url, Host="evil.example") == 403
    assert status(server.url, Origin="http://evil.example") == 403


def test_a_killed_server_loses_no_rating(run: Path, chromium: Any, tmp_path: Path) -> None:
    file = tmp_path / "new" / "ratings.jsonl"
    for question in ("one", "two"):
        with served([run], f"--ratings={file}") as running:
            page = Tab(chromium, running.url)
            page.ask(question)
            page.rate("base_good")
            running.kill()
            page.page.context.close()
        with file.open("a", encoding="utf-8") as torn:
            torn.write('{"prompt": "torn')
    rows = file.read_text(encoding="utf-8").splitlines()
    assert [asked(json.loads(row)) for row in rows[:2]] == [["one"], ["two"]] and rows[2:] == ['{"prompt": "torn']


def test_the_password_is_asked_for(run: Path, chromium: Any, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET, encoding="utf-8")
    with served([run], f"--password_file={tmp_path / 'secret'}", "--host=0.0.0.0") as running:
        url = running.url.replace("0.0.0.0", "127.0.0.1")
        assert [status(f"{url}{path}") for path in ("/", "/config", "/report/0", "/theme.css")] == [401] * 4
        page = Tab(chromium, url, http_credentials={"username": "me", "password": SECRET})
        page.ask("hello")
        page.page.context.close()


def test_mistakes_end_before_the_model_is_loaded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wrong = {
            (str(run), f"--port={port}"): f"cannot listen on 127.0.0.1, port {port}",
            (str(run), "--host=0.0.0.0"): "which needs a password",
            (str(run), "--best_of=4", "--port=0"): "has never been trained; leave out --best_of",
            (str(run.parent),): "is not the folder of a run",
            (): "runs",
        }
        for arguments, message in wrong.items():
            with pytest.raises(SystemExit) as ended:
                main(["ui", *arguments])
            assert ended.value.code == 2 and message in capsys.readouterr().err
