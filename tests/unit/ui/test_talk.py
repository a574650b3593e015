"""Conversations, ratings of their answers, and bounds."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import pytest

from lora_gan.data.files import Row
from lora_gan.data.sources.standard import StandardFormat
from lora_gan.errors import LoraGANError
from lora_gan.types import Message
from lora_gan.ui import ratings
from lora_gan.ui.page import chosen_row, conversation, escaped, plain, single_row
from lora_gan.ui.talk import CHARACTERS, TURNS, Answer, Talk, Turn, check_question, choose, label

EVIL = "<script>alert(1)</script>\n  <img src=x onerror='alert(2)'> & [a](javascript:alert(3)) $$x$$"
ANSWERS = {"generator": Answer("yes", True), "base": Answer("no", True)}
ONE = Talk("qa/version_0", (Turn("well?", "well?", answers=ANSWERS),))
CHAT = [Message("user", "hi"), Message("assistant", "hello"), Message("user", "well?")]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_choice_is_a_preference() -> None:
    row = chosen_row(choose(ONE, "base"))
    when = datetime.fromisoformat(row.pop("time"))
    assert when.utcoffset() is not None and abs((datetime.now(timezone.utc) - when).total_seconds()) < 5
    assert row == {"prompt": "well?", "chosen": "no", "rejected": "yes", "run": "qa/version_0"}
    chat = Talk("chat", (replace(ONE.turns[0], prompt=CHAT),))
    row = chosen_row(choose(chat, "generator"))
    assert list(row) == ["prompt", "chosen", "rejected", "time", "run"]
    assert row["prompt"] == [said("user", "hi"), said("assistant", "hello"), said("user", "well?")]
    assert (row["chosen"], row["rejected"]) == ([said("assistant", "yes")], [said("assistant", "no")])


def test_one_answer_is_rated() -> None:
    row = single_row(label(ONE, "base", False), "base")
    assert {**row, "time": ""} == {
        "prompt": "well?",
        "completion": "no",
        "label": False,
        "time": "",
        "run": "qa/version_0",
    }
    row = single_row(label(Talk("chat", (replace(ONE.turns[0], prompt=CHAT),)), "generator", True), "generator")
    assert (row["completion"], row["label"]) == ([said("assistant", "yes")], True)


@pytest.mark.parametrize("prompt", ["well?", CHAT])
def test_ratings_are_data(prompt: Any) -> None:
    """What the project's own source makes of the lines."""
    [example] = StandardFormat("ratings.jsonl").examples(Row(ratings.choice(prompt, "yes", "no", "run"), "line 1"))
    assert (example.target, [n.text for n in example.negatives]) == ("yes", ["no"])
    assert [m.content for m in example.messages] == ["well?"] if prompt == "well?" else ["hi", "hello", "well?"]
    source = StandardFormat("ratings.jsonl")
    good, bad = (Row(ratings.single(prompt, "yes", good, "run"), "line 1") for good in (True, False))
    assert [example.target for example in source.examples(good)] == ["yes"]
    [worse] = source.examples(bad)
    assert (worse.target, [n.text for n in worse.negatives]) == ("", ["yes"])  # of the prompt's good answers


def test_each_rating_is_taken_once() -> None:
    chosen = choose(ONE, "base")
    assert (chosen.turns[0].kept, chosen.turns[0].chosen, ONE.turns[0].kept) == ("base", "base", "generator")
    with pytest.raises(LoraGANError, match="saved already"):
        choose(chosen, "generator")
    rated = label(chosen, "base", True)
    with pytest.raises(LoraGANError, match="saved already"):
        label(rated, "base", False)
    assert label(rated, "generator", False).turns[0].labels == {"base": True, "generator": False}
    same = ONE.with_answer("base", Answer("yes", True))
    with pytest.raises(LoraGANError, match="answers are the same"):
        choose(same, "base")


def test_an_unfinished_answer_cannot_be_rated() -> None:
    for talk in (Talk("x"), ONE.with_answer("base", Answer("n")), Talk("x", (Turn("hi", "hi"),))):
        for rate in (lambda talk: choose(talk, "base"), lambda talk: label(talk, "generator", True)):
            with pytest.raises(LoraGANError, match="nothing to rate yet"):
                rate(talk)
        assert talk.finished.turns == ()


def test_questions_and_conversations_are_bounded() -> None:
    assert check_question(ONE, "  h\x00i\ud800 \n") == "hi"
    assert len(check_question(ONE, "x" * CHARACTERS)) == CHARACTERS
    with pytest.raises(LoraGANError, match=f"has {CHARACTERS + 1} characters; at most {CHARACTERS}"):
        check_question(ONE, "x" * (CHARACTERS + 1))
    with pytest.raises(LoraGANError, match="is empty"):
        check_question(ONE, " \n ")
    with pytest.raises(LoraGANError, match=f"has {TURNS} turns"):
        check_question(Talk("x", ONE.turns * TURNS), "hi")


def test_texts_are_shown_as_texts() -> None:
    talk = Talk("x", (Turn(EVIL, EVIL, answers={"generator": Answer(EVIL, True, EVIL, 0.5), "base": Answer(EVIL)}),))
    for role in ("generator", "base"):
        for message in conversation(talk, role):
            bare = message["content"].replace('<div class="said">', "").replace('<div class="notes">', "")
            assert "<" not in bare.replace("</div>", "") and "\n" not in bare
            assert "&lt;script&gt;alert(1)&lt;/script&gt;&#10;  &lt;img" in bare
    assert "final answer &lt;script&gt;" in conversation(talk, "generator")[1]["content"]
    assert escaped("a", "b", "c") == '<div class="said">a</div><div class="notes">b · c</div>'
    shown = plain("a_b *c* <b> [x](y) `d` $e$ #1 \n z")
    assert not set("_*<>[]()`$").intersection(shown) and shown.endswith("z")
