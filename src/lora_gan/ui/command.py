"""Command ``ui``: serves the page on this machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_gan.atomic import check_file_writable
from lora_gan.errors import LoraGANError

RATINGS = "ratings.jsonl"


def ui(
    runs: list[str],
    host: str = "127.0.0.1",
    port: int = 7860,
    password_file: str | None = None,
    ratings: str | None = None,
    best_of: int = 1,
    temperature: float | None = None,
    max_new_tokens: int = 64,
    template: str | None = None,
    base: str | None = None,
    dequantize: bool = False,
) -> None:
    """Serve a page on this machine: chat with the generator and its base side by side, rate answers, see the run.

    The page needs gradio. Ratings are appended to a file that fit reads as data. Stop it with Ctrl+C.

    Args:
        runs: Folders of runs, such as lightning_logs/gan/version_0; the page shows one of them at a time.
        host: Address to serve on; one that other machines reach needs a password.
        port: Port to serve on; 0 is any that is free.
        password_file: File with a password that the page asks for; else it is that in LORA_GAN_UI_PASSWORD, if any.
        ratings: File that ratings are appended to; ratings.jsonl in the folder of the first run if it is not given.
        best_of: Answers that are sampled for each question at first, of which the discriminator's best is shown.
        temperature: Samples at this temperature at first; 0 takes the most likely token each time. By default 0, or 1
            with best_of.
        max_new_tokens: Length limit of an answer at first.
        template: Format of a prompt instead of that of the run; {prompt} stands for the question.
        base: Folder or hub id of the base, if it has moved since the training.
        dequantize: Load a base that was quantised in training as it was before, as on a machine without a GPU.
    """
    require_gradio()
    from lora_gan.ui.access import check_host, listen, read_password

    password = read_password(password_file)
    check_host(host, password)
    folders = named(runs)
    file = Path(ratings) if ratings else next(iter(folders.values())) / RATINGS
    check_ratings(file)
    with listen(host, port) as listening:
        from lora_gan.ui.models import Models, Settings
        from lora_gan.ui.page import Desk
        from lora_gan.ui.records import Records

        warm = float(best_of > 1) if temperature is None else temperature
        models = Models(folders, template, base, dequantize)
        desk = Desk(models, Records(folders), file, Settings(warm, best_of, max_new_tokens))
        check_first(desk)
        try:
            serve(application(desk, host, password), listening)
        finally:
            models.close()


def require_gradio() -> None:
    """Check for the extra before anything is loaded.

    Raises:
        LoraGANError: It is missing.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise LoraGANError(
            "the page needs gradio, which is not installed: pip install 'gradio>=6.31,<7' (or the extra: "
            "pip install -e '.[ui]')"
        ) from error


def named(runs: Sequence[str]) -> dict[str, Path]:
    """Folders of runs by the names that the page shows.

    Raises:
        LoraGANError: There is none, one is given twice, or one has no configuration or no checkpoint.
    """
    folders: dict[str, Path] = {}
    for run in runs:
        folder = Path(run).resolve()
        missing = [part for part in ("config.yaml", "checkpoints/*.ckpt") if not any(folder.glob(part))]
        if missing:
            raise LoraGANError(
                f"{run} is not the folder of a run: it has no {missing[0]}; fit names the folder in its last lines, "
                "such as lightning_logs/gan/version_0"
            )
        if folder in folders.values():
            raise LoraGANError(f"the run {run} is given twice; name each run once")
        name = "/".join(folder.parts[-2:])
        folders[str(folder) if name in folders else name] = folder
    if not folders:
        raise LoraGANError("ui needs the folder of a run, such as lightning_logs/gan/version_0")
    return folders


def check_ratings(file: Path) -> None:
    """Try that ratings can be written.

    Raises:
        LoraGANError: They cannot.
    """
    try:
        check_file_writable(file)
        if file.exists() and not os.access(file, os.W_OK):
            raise PermissionError(13, "no permission to write to it", str(file))
    except OSError as error:
        raise LoraGANError(
            f"ratings cannot be written to {file}: {error.strerror}; choose another file with --ratings"
        ) from error


def check_first(desk: Any) -> None:
    """Load the first run, before the page says that it is there.

    Raises:
        LoraGANError: It cannot be loaded, or its discriminator cannot choose the best of n.
    """
    from lora_gan.best_of import BestOf
    from lora_gan.inference import sampling_at

    settings = desk.settings
    sampling_at(settings.temperature, BestOf(settings.best_of, "discriminator"), settings.new_tokens)
    first = desk.models.load(desk.runs[0])
    if settings.best_of > 1 and not first.scores:
        raise LoraGANError(f"{first.no_scores}; leave out --best_of")


def application(desk: Any, host: str, password: str | None) -> Any:
    """The page and the reports of its runs as an ASGI application, behind its guard."""
    import gradio as gr
    from fastapi import FastAPI
    from fastapi.responses import HTMLResponse, Response

    from lora_gan.ui.access import Guard
    from lora_gan.ui.page import CSS, build

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def report(number: int) -> Response:
        known = number < len(desk.runs)
        return HTMLResponse(desk.records.report(desk.runs[number])) if known else Response("no such run", 404)

    app.add_api_route("/report/{number}", report, response_model=None)
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    gr.mount_gradio_app(
        app,
        build(desk),
        path="/",
        theme=theme,
        css=CSS,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        allowed_paths=[],
        max_file_size=0,
    )
    return Guard(app, {host, "localhost", "127.0.0.1", "::1"}, password)


def serve(app: Any, listening: socket.socket) -> None:
    """Answer requests until Ctrl+C."""
    import uvicorn

    host, port = listening.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}   (Ctrl+C ends it)", flush=True)
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=64,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(settings)
    logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)  # of pages that are still open
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
