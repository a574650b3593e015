"""Page of Gradio: what a person sees, and what their clicks do. Texts of models, people and files are escaped."""

from __future__ import annotations

import html
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lora_gan.atomic import append_json_line
from lora_gan.backbone import GENERATOR
from lora_gan.errors import LoraGANError
from lora_gan.ui import ratings
from lora_gan.ui.models import PATIENCE, Asking, Models, Settings
from lora_gan.ui.records import Records, table
from lora_gan.ui.talk import BASE, BEST_OF, CHARACTERS, NEW_TOKENS, ROLES, Answer, Talk, Turn, choose, label

log = logging.getLogger("lora_gan")

QUEUE = 16  # requests that wait
SESSIONS = 64  # pages whose conversation is kept
BETTER, GOOD, BAD = "better", "good", "bad"  # kinds of ratings
KINDS = {BETTER: "This one is better", GOOD: "Good", BAD: "Bad"}
TITLES = {GENERATOR: "Generator", BASE: "Base model"}
WAITING = 8  # questions that wait for the models, which answer one after the other
ASK: dict[str, Any] = {"concurrency_id": "ask", "concurrency_limit": WAITING, "api_visibility": "private"}
QUICK: dict[str, Any] = {"concurrency_id": "quick", "concurrency_limit": 4, "api_visibility": "private"}
RATE: dict[str, Any] = {"concurrency_id": "rate", "concurrency_limit": 1, "api_visibility": "private"}
FILES: dict[str, Any] = {"concurrency_id": "files", "concurrency_limit": 1, "api_visibility": "private"}
CSS = """
.gradio-container {width: 100%; max-width: 1280px !important; margin: 0 auto}
.said {white-space: pre-wrap; overflow-wrap: anywhere}
.notes {font-size: .8em; opacity: .75; margin-top: .35em}
.chat .bubble-wrap {padding-top: 2.2em}
.chat button[aria-label=Clear] {display: none}
#report iframe {width: 100%; height: 80vh; border: 1px solid #8884; border-radius: 8px; background: white}
footer {display: none !important}
"""


@dataclass
class Session:
    """What a page that is open is waiting for."""

    asking: Asking | None = None

    def stop(self) -> None:
        """Stop an answer; once this returns, nothing of it is shown any more."""
        if self.asking is not None:
            self.asking.stop()
            self.asking.over.wait(PATIENCE)


@dataclass(frozen=True)
class Desk:
    """What the page works with."""

    models: Models
    records: Records
    ratings: Path
    settings: Settings = field(default_factory=Settings)

    @property
    def runs(self) -> list[str]:
        """Names of the runs."""
        return list(self.models.folders)


def build(desk: Desk) -> Any:
    """The page, as ``gradio.Blocks``."""
    import gradio as gr

    with gr.Blocks(title="lora-gan", analytics_enabled=False, fill_width=True) as page:
        talk, session = gr.State(Talk(desk.runs[0])), gr.State(Session())
        with gr.Row(equal_height=True):
            run = gr.Dropdown(desk.runs, value=desk.runs[0], label="Run", interactive=len(desk.runs) > 1, elem_id="run")
            about = gr.Markdown(about_run(desk, desk.runs[0]), elem_id="about", container=True)
        with gr.Tab("Chat"):
            chat_tab(desk, run, about, talk, session)
        with gr.Tab("Samples") as samples:
            samples_tab(desk, run, samples)
        with gr.Tab("Report") as report:
            frame = gr.Markdown(elem_id="report", sanitize_html=False)
            report.select(lambda name: report_frame(desk, name), run, frame, **FILES)
            run.change(lambda: "", None, frame, **FILES)
    page.queue(max_size=QUEUE, api_open=False, default_concurrency_limit=1)
    page.state_session_capacity = SESSIONS
    return page


# chat


def chat_tab(desk: Desk, run: Any, about: Any, talk: Any, session: Any) -> None:
    """Both models side by side, their ratings below them, and the question."""
    import gradio as gr

    columns, buttons = both_columns()
    said = gr.Markdown(" ", elem_id="said")
    with gr.Row(equal_height=True):
        question = gr.Textbox(
            placeholder="Your question",
            show_label=False,
            max_length=CHARACTERS,
            max_lines=8,
            scale=8,
            autofocus=True,
            elem_id="question",
        )
        send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="send")
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, elem_id="stop")
        new = gr.Button("New", scale=1, min_width=90, elem_id="new")
    settings = settings_of(desk)
    shown = [talk, *columns, *buttons.values(), said]
    for asks in (send.click, question.submit):
        inputs = [session, talk, question, *settings]
        asks(partial(ask, desk), inputs, [question, *shown], show_progress="hidden", **ASK)
    stop.click(Session.stop, session, None, show_progress="hidden", **QUICK)
    for begins in (new.click, run.change):
        begins(fresh, [session, run], [question, *shown], show_progress="hidden", **QUICK)
    run.change(partial(about_run, desk), run, about, **FILES)
    for (role, kind), button in buttons.items():
        button.click(partial(rate, desk, role, kind), talk, shown, show_progress="hidden", **RATE)


def both_columns() -> tuple[list[Any], dict[tuple[str, str], Any]]:
    """The conversation with each model, and the buttons that rate its last answer, by role and kind of rating."""
    import gradio as gr

    columns, buttons = [], {}
    with gr.Row():
        for role in ROLES:
            with gr.Column(min_width=280):
                chat = gr.Chatbot(
                    label=TITLES[role],
                    height="50vh",
                    min_height=260,
                    render_markdown=False,
                    latex_delimiters=[],
                    buttons=[],
                    allow_file_downloads=False,
                    elem_id=role,
                    elem_classes="chat",
                    placeholder="Ask something below.",
                )
                columns.append(chat)
                with gr.Row():
                    for kind, words in KINDS.items():
                        button = gr.Button(words, size="sm", interactive=False, elem_id=f"{role}_{kind}")
                        buttons[role, kind] = button
    return columns, buttons


def ask(desk: Desk, session: Session, talk: Talk, question: str, *given: float) -> Iterator[list[Any]]:
    """What the page shows as the answers grow."""
    import gradio as gr

    session.stop()
    asking = session.asking = Asking()
    grown = talk
    try:
        temperature, best_of, new_tokens = given
        settings = Settings(float(temperature), int(best_of), int(new_tokens))
        for grown in desk.models.answer(talk, question or "", settings, asking):
            yield ["", *view(grown, remark(grown))]
        if grown != grown.finished:
            yield [question, *view(grown.finished, "Stopped.")]  # the question can be changed and asked again
    except LoraGANError as error:
        gr.Warning(html.escape(str(error)))
        yield [question, *view(talk.finished, " ")]
    finally:
        asking.over.set()


def fresh(session: Session, run: str) -> list[Any]:
    """A new conversation with the models of a run."""
    session.stop()
    return ["", *view(Talk(run), " ")]


def rate(desk: Desk, role: str, kind: str, talk: Talk) -> list[Any]:
    """Save a rating, then show it."""
    import gradio as gr

    try:
        after = choose(talk, role) if kind == BETTER else label(talk, role, kind == GOOD)
        save(desk.ratings, chosen_row(after) if kind == BETTER else single_row(after, role))
    except LoraGANError as error:
        gr.Warning(html.escape(str(error)))
        return view(talk, " ")
    return view(after, f"Saved: the answer of the {TITLES[role].lower()} is {kind}.")


def view(talk: Talk, words: str) -> list[Any]:
    """The conversation as the page shows it, and what is said below it."""
    return [talk, *(conversation(talk, role) for role in ROLES), *states(talk), words]


def settings_of(desk: Desk) -> list[Any]:
    """Temperature, best of n and length, as the command set them."""
    import gradio as gr

    start = desk.settings
    with gr.Accordion("Settings", open=False), gr.Row():
        return [
            gr.Slider(0, 2, start.temperature, step=0.05, label="Temperature", info="0: the likeliest token each time"),
            gr.Slider(1, BEST_OF, start.best_of, step=1, label="Best of", info="by the discriminator, sampled"),
            gr.Slider(1, NEW_TOKENS, start.new_tokens, step=1, label="Longest answer", info="tokens"),
        ]  # fmt: skip


def states(talk: Talk) -> Iterator[Any]:
    """Which of the buttons of a rating can be clicked."""
    import gradio as gr

    for role in ROLES:
        turn = talk.last
        yield gr.Button(interactive=turn is not None and turn.chosen is None)
        yield from [gr.Button(interactive=turn is not None and role not in turn.labels)] * 2


def conversation(talk: Talk, role: str) -> list[dict[str, str]]:
    """The messages of one column, escaped."""
    messages = []
    for turn in talk.turns:
        messages.append({"role": "user", "content": escaped(turn.question)})
        if role in turn.answers:
            messages.append({"role": "assistant", "content": escaped(turn.answers[role].text, *notes(turn, role))})
        elif not turn.done:
            messages.append({"role": "assistant", "content": escaped("…")})
    return messages


def notes(turn: Turn, role: str) -> Iterator[str]:
    """What stands below an answer."""
    answer: Answer = turn.answers[role]
    if not answer.done:
        yield "…"
    if answer.final is not None:
        yield f"final answer {answer.final}"
    if answer.score is not None:
        yield f"discriminator {answer.score:.2f}"
    if turn.chosen == role:
        yield "chosen as better"
    if role in turn.labels:
        yield "rated good" if turn.labels[role] else "rated bad"


def escaped(text: str, *below: str) -> str:
    """A text as HTML that shows it letter by letter, with notes below it, in one line of source.

    Gradio shows the content of a message as HTML, also without Markdown, and takes off indentation.
    """
    said = f'<div class="said">{html.escape(text)}</div>'
    noted = f'<div class="notes">{html.escape(" · ".join(below))}</div>' if below else ""
    return (said + noted).replace("\r", "").replace("\n", "&#10;")


def remark(talk: Talk) -> str:
    """What a person should know of the last turn."""
    turn = talk.turns[-1]
    if turn.forgotten:
        return f"The {turn.forgotten} oldest turns no longer fit into the context and are forgotten."
    return " " if turn.done else "…"


def about_run(desk: Desk, run: str) -> str:
    """Checkpoint, memory and discriminator of a run, as plain words of Markdown."""
    try:
        saved, keeps = desk.models.load(run), desk.models.keeps(run)
    except LoraGANError as error:
        return plain(f"This run cannot be loaded: {error}")
    kept = (
        "both models read one conversation, which goes on with the answer that you choose, else the generator's"
        if keeps
        else "each question is asked alone, as in training"
    )
    scored = "" if saved.scores else f"; no scores: {saved.no_scores}"
    return plain(f"{saved.path.name}, step {saved.step}, on {Path(saved.base).name}: {kept}{scored}.")


def plain(text: str) -> str:
    """A text that Markdown shows as it is."""
    return "".join(f"&#{ord(sign)};" if sign in "\\`*_{}[]()<>#+!|~$&\"'" else sign for sign in " ".join(text.split()))


# ratings


def chosen_row(talk: Talk) -> dict[str, Any]:
    """The line of the choice in the last turn."""
    turn = talk.turns[-1]
    assert turn.chosen is not None
    other = next(role for role in ROLES if role != turn.chosen)
    return ratings.choice(turn.prompt, turn.answers[turn.chosen].text, turn.answers[other].text, talk.run)


def single_row(talk: Talk, role: str) -> dict[str, Any]:
    """The line of the rating of an answer in the last turn."""
    turn = talk.turns[-1]
    return ratings.single(turn.prompt, turn.answers[role].text, turn.labels[role], talk.run)


def save(path: Path, row: Mapping[str, Any]) -> None:
    """Append a rating; it has reached the disk when the page says so.

    Raises:
        LoraGANError: It cannot be written.
    """
    try:
        append_json_line(path, row)
    except OSError as error:
        log.error("a rating could not be written to %s: %s", path, error)
        raise LoraGANError(f"The rating is not saved: {error.strerror}. Try again once that is mended.") from error


# samples and report


def samples_tab(desk: Desk, run: Any, tab: Any) -> None:
    """The samples of one validation as a table."""
    import gradio as gr

    step = gr.Dropdown([], label="Validation after step", elem_id="step")
    rows = gr.Dataframe(
        headers=[""],
        datatype="str",
        interactive=False,
        wrap=True,
        show_search="filter",
        elem_id="samples",
        max_height=650,
    )

    def at(name: str, chosen: int | None) -> Any:
        found = {one.step: one for one in desk.records.samples(name)}
        if chosen not in found:
            return gr.Dataframe(value=[["no samples are recorded"]], headers=[""])
        header, values = table(found[chosen])
        return gr.Dataframe(value=values, headers=header, datatype="str")

    def opened(name: str) -> list[Any]:
        steps = [one.step for one in desk.records.samples(name)]
        newest = steps[-1] if steps else None
        return [gr.Dropdown(choices=steps, value=newest), at(name, newest)]

    tab.select(opened, run, [step, rows], **FILES)
    run.change(opened, run, [step, rows], **FILES)
    step.input(at, [run, step], rows, **FILES)


def report_frame(desk: Desk, run: str) -> str:
    """The frame of a run's report, which runs no script and has no access to the page around it."""
    return f'<iframe src="/report/{desk.runs.index(run)}" title="Report" sandbox></iframe>'
