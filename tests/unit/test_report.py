"""Reports of runs: numbers worked by hand, escaping, thinning, damaged and synthetic runs."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from lora_gan.errors import LoraGANError
from lora_gan.report import page as pages
from lora_gan.report import report, write_report
from lora_gan.report.plots import whole
from lora_gan.report.run import read_run, thinned
from lora_gan.report.settings import differences
from lora_gan.report.warnings import kept_warnings
from lora_gan.results import Result, markdown_table, read_table, save_result
from tests.screenshots.report import browser, screenshot

EVIL = "<script>alert('a | b')</script>"
RESULT = Result(
    "best-4.ckpt", 4, "rows.json", 100, {"trained": {"exact_match": 0.2, "rouge_l": 0.5}}, {"exact_match": 100}
)


class Tags(HTMLParser):
    """Names of all tags; fails where an end does not belong to the open tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        for name, value in attrs:  # nothing is loaded
            assert name not in ("src", "href", "xlink:href") or (value or "").startswith("#"), (tag, name, value)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def made_run(folder: Path, steps: int = 3, scalars: int = 2, text: str = EVIL, logs: bool = True) -> Path:
    """A folder as a fit leaves it, with a curriculum."""
    folder.mkdir(parents=True)
    phase = "{start: 2, coefficients: {policy: 1.0}}"
    curriculum = f"[{{class_path: lora_gan.callbacks.Curriculum, init_args: {{phases: [{phase}]}}}}]"
    (folder / "config.yaml").write_text(f"seed_everything: 3\ntrainer: {{max_steps: 9, callbacks: {curriculum}}}\n")
    save_result(folder, RESULT)
    if logs:
        with SummaryWriter(str(folder)) as writer:
            for step in range(steps):
                for number in range(scalars):
                    writer.add_scalar(f"reward/part_{number}" if number % 2 else f"loss/{number}", step % 7 / 3, step)
            writer.add_scalar("best/text/answer", 0.25, 2)
            table = markdown_table(["prompt", "target", "trained"], [[text, "a | b", text]])
            writer.add_text("samples", table, 0)
            writer.add_text("samples", table, 2)
    return folder


def test_standard_error_and_differences_by_hand() -> None:
    assert pages.standard_error(0.2, 100) == pytest.approx(0.04)  # sqrt(0.16 / 100)
    assert pages.standard_error(1.0, 5) == 0
    # 0.5 of 100 and 0.65 of 100: together 0.575, error sqrt(0.244375 * 0.02) = 0.0699, twice that 0.1398
    assert pages.differs(0.5, 0.65, (100, 100)) and not pages.differs(0.5, 0.63, (100, 100))
    assert not pages.differs(0.0, 1.0, (2, 2)), "two prompts prove nothing"
    assert not pages.differs(0.3, 0.3, (10, 10))


def test_only_shares_on_the_same_data_are_marked() -> None:
    other = replace(RESULT, metrics={"trained": {"exact_match": 0.5, "rouge_l": 0.9}})
    assert pages.is_marked(RESULT, other, "trained", "exact_match")
    assert not pages.is_marked(RESULT, other, "trained", "rouge_l"), "no share of prompts"
    assert not pages.is_marked(RESULT, replace(other, data="others"), "trained", "exact_match")
    assert not pages.is_marked(RESULT, replace(other, counted={}), "trained", "exact_match"), "of an older version"


def test_thinning_keeps_ends_and_peaks() -> None:
    curve = dict.fromkeys(range(5000), 0.0) | {1234: 9.0, 4321: -9.0}
    few = thinned(curve, 500)
    assert len(few) <= 500 and min(few) == 0 and max(few) == 4999 and list(few) == sorted(few)
    assert few[1234] == 9.0 and few[4321] == -9.0
    assert thinned({1: 2.0, 5: 1.0}) == {1: 2.0, 5: 1.0}


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1))
def test_a_table_is_read_as_it_was_written(rows: list[tuple[str, str]]) -> None:
    """Whatever completions hold: bars, backslashes, line breaks, which become spaces."""
    read = read_table(markdown_table(["prompt", "target"], rows))
    assert read == [["prompt", "target"], *([" ".join(cell.split()) for cell in row] for row in rows)]


def test_settings_differ_from_signatures() -> None:
    curriculum = {"class_path": "lora_gan.callbacks.LastCheckpoint", "init_args": {"every_n_steps": 7}}
    text = {"class_path": "lora_gan.callbacks.TextMetrics", "init_args": {"samples": 3}}
    unknown = {"class_path": "not_here.Model", "init_args": {"size": 3}}
    found = differences({"seed_everything": 0, "model": unknown, "trainer": {"callbacks": [curriculum, text]}})
    said = {one.name: (one.value, one.default) for one in found}
    assert said["trainer.callbacks[0].every_n_steps"] == ("7", "100")
    assert "trainer.callbacks[1].samples" not in said and "seed_everything" not in said
    assert said["model.size"] == ("3", "unknown")


def test_a_completion_is_text_and_the_page_is_whole(tmp_path: Path) -> None:
    path = write_report(made_run(tmp_path / "gan" / "version_0"))
    assert path is not None
    text = path.read_text(encoding="utf-8")
    tags = Tags(text)
    assert "script" not in tags.seen and {"svg", "table"} <= tags.seen
    assert "&lt;script&gt;alert(&#x27;a | b&#x27;)" in text
    assert "<td>0.200 ± 0.040</td>" in text and "<td>0.500</td>" in text
    assert "step 2, by text/answer 0.250" in text and "from step 2: coefficients" in text
    assert "http:" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text), "nothing is loaded"


def test_a_coefficient_stays_as_it_is_to_the_end_of_the_run(tmp_path: Path) -> None:
    """It is logged when it changes, so its curve would end there."""
    folder = made_run(tmp_path / "run", steps=6)
    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar("coefficient/policy", 0.5, 2)
    run = read_run(folder)
    assert whole(run, "coefficient/policy") == {2: 0.5, 5: 0.5} and max(whole(run, "loss/0")) == 5
    assert "Coefficients" in pages.page([run])


def test_two_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (made_run(tmp_path / name / "version_0") for name in ("a", "b"))
    save_result(second, replace(RESULT, metrics={"trained": {"exact_match": 0.5}}))
    report([str(first), str(second)], str(tmp_path / "both.html"))
    assert capsys.readouterr().out.strip() == str(tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert '<td class="marked">0.500 ± 0.050</td>' in text and text.count('class="marked"') == 1
    assert "loss/0, a/version_0" in text and "loss/0, b/version_0" in text
    Tags(text)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    bare = made_run(tmp_path / "bare", logs=False)
    (bare / "results.json").unlink()
    text = "\n".join(read_run(bare).notes)
    assert "no curves and samples" in text and "no held-out results" in text
    assert write_report(bare) is not None
    (bare / "metrics.csv").write_text("step,loss/generator\n1,0.5\n2,\n3,nan\n", encoding="utf-8")
    run = read_run(bare)
    assert run.curves == {"loss/generator": {1: 0.5}} and "not a finite number in 1 records" in " ".join(run.notes)
    with pytest.raises(LoraGANError, match="is not the folder of a run"):
        report([str(tmp_path)])


def test_damage_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    (events,) = run.glob("events*")
    whole = events.read_bytes()
    events.write_bytes(whole[: len(whole) // 2])
    assert "loss/0" in read_run(run).curves, "what is before the damage"
    events.write_bytes(b"\x07" * 100)
    (run / "results.json").write_text("{", encoding="utf-8")
    (run / "config.yaml").write_text("a: [", encoding="utf-8")
    notes = " ".join(read_run(run).notes)
    assert events.name in notes and "results.json cannot be read" in notes and "config.yaml cannot be read" in notes
    assert write_report(run) is not None


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = made_run(tmp_path / "run", logs=False)
    (run / ".report.html.partial").mkdir()
    assert write_report(run) is None and "the report of the run could not be written" in caplog.text


def test_the_report_in_the_documentation_names_no_machine() -> None:
    text = (Path(__file__).parents[2] / "docs" / "gan_and_sft.html").read_text(encoding="utf-8")
    Tags(text)
    assert len(text.encode()) < 2_000_000 and "gan/version_0, sft/version_0" in text
    assert not re.search(r"[\s>\"'](/(tmp|work|root|home|usr)/|[A-Z]:\\)", text)


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="needs Chromium")
def test_a_browser_shows_the_report(tmp_path: Path) -> None:
    path = write_report(made_run(tmp_path / "run"))
    assert path is not None
    screenshot(path, tmp_path / "report.png", (400, 300))
    header = (tmp_path / "report.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and header[16:] == (400).to_bytes(4, "big") + (300).to_bytes(4, "big")


@pytest.mark.slow  # writing 120,000 records
def test_a_long_run_has_a_small_report(tmp_path: Path) -> None:
    path = write_report(made_run(tmp_path / "run", steps=2000, scalars=60))
    assert path is not None and path.stat().st_size < 2_000_000


def test_warnings_are_kept_and_escaped(tmp_path: Path) -> None:
    run, log = made_run(tmp_path / "run", logs=False), logging.getLogger("lora_gan")
    with kept_warnings(lambda: run):
        log.warning("collapse: %s\nagain", "<b>")
        log.info("not a warning")
    log.warning("too late")
    (line,) = read_run(run).warnings
    assert line.endswith(" collapse: <b> again")
    assert "collapse: &lt;b&gt; again" in pages.page([read_run(run)])
