"""What each data set becomes, by hand-written rows; and the counts that real samples have, where they are here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_gan.data import ARC, OASST, TWON, Alpaca, Dolly, Mixture, OwnFile, Source, StandardFormat, TruthfulQA
from lora_gan.data.checks import checked
from lora_gan.data.splits import assign_splits, one_wording_each
from lora_gan.errors import DataError, LoraGANError
from lora_gan.types import Example, Message, Negative

FIXTURES = Path(__file__).parents[2] / "fixtures"
SAMPLES = Path(__file__).parents[4] / "shared" / "data"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="../shared/data (real samples) is not here")


def fixture(name: str) -> str:
    return str(FIXTURES / name)


def read(source: Source) -> list[Example]:
    examples = list(source.rows())
    assert all(example.references[0] == example.target for example in examples)
    assert all(example.messages[-1].role == "user" for example in examples)
    return examples


def texts(example: Example) -> list[str]:
    return [negative.text for negative in example.negatives]


def write(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


# Dolly


def test_dolly_row_by_row() -> None:
    source = Dolly(fixture("dolly.jsonl"))
    bridge, fruit, _, letter = read(source)
    assert source.dropped == Counter(response_is_context=1)
    assert source.repaired == Counter(citation=1)
    assert bridge.prompt == (
        "### Prompt:\nWhen was the bridge opened?\n"
        "The old bridge was opened in 1911. It was rebuilt in 1954.\n\n### Response:\n"
    )
    assert (fruit.prompt, fruit.target) == (
        "### Prompt:\nWhich of these is a fruit: apple, chair?\n\n### Response:\n",
        "Apple",
    )
    ((start, end),) = letter.cuttable
    assert letter.prompt[:start] == "### Prompt:\nWho wrote the letter?\n"
    assert letter.prompt[end:] == "\n\n### Response:\n"
    assert [e.target for e in Dolly(fixture("dolly.jsonl"), categories=["closed_qa"]).rows()] == [bridge.target]


# TruthfulQA


def test_truthfulqa_row_by_row() -> None:
    source = TruthfulQA(fixture("truthfulqa.csv"))
    cats, sugar = read(source)
    assert source.repaired == Counter(semicolon_at_the_end=1)
    assert cats.prompt == "Q: Do cats always land on their feet?\nA:"
    assert cats.references == ("No, not always", "Cats sometimes fail to land on their feet", "I have no comment")
    assert cats.negatives == tuple(
        Negative(text, "incorrect") for text in ("Yes, always", "Cats never fall", "Unknown")
    )
    assert texts(sugar) == ["Yes, it does", "Sugar doubles energy"]
    assert 'children "hyper"?' in sugar.prompt
    (whistle,) = read(TruthfulQA(fixture("truthfulqa.bom.csv")))
    assert (whistle.references, texts(whistle)) == (("Yes", "It is legal"), ["No", "It is a crime"])


def test_truthfulqa_is_held_out_unless_allowed() -> None:
    held_out = assign_splits(read(TruthfulQA(fixture("truthfulqa.csv"))), {"validation": 0.0, "test": 0.0}, seed=0)
    assert [len(held_out[name].examples) for name in held_out] == [0, 0, 2]
    source = TruthfulQA(fixture("truthfulqa.csv"), allow_train=True)
    allowed = assign_splits(read(source), {"validation": 0.0, "test": 0.0}, seed=0)
    assert len(allowed["train"].examples) == 2
    assert "I have no comment" not in allowed["train"].examples[0].references
    assert "not benchmark scores" in source.note


def test_truthfulqa_choices_of_both_forms(tmp_path: Path) -> None:
    dicts = {"question": "Q?", "mc1_targets": {"b": 1, "x": 0}, "mc2_targets": {"a": 1, "b": 1, "x": 0, "y": 0}}
    lists = {
        "question": "Q?",
        "mc1_targets": {"choices": ["b", "x"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["a", "b", "x", "y"], "labels": [1, 1, 0, 0]},
    }
    for row in (dicts, lists):
        (example,) = read(TruthfulQA(write(tmp_path / "mc.jsonl", [row])))
        assert (example.target, example.references, texts(example)) == ("b", ("b", "a"), ["x", "y"])
    with pytest.raises(DataError, match=r"mc\.jsonl, line 1: the field 'mc1_targets' is not {answer: 0 or 1}"):
        read(TruthfulQA(write(tmp_path / "mc.jsonl", [{**dicts, "mc1_targets": {"b": 2}}])))


@needs_samples
def test_real_truthfulqa() -> None:
    source = TruthfulQA(str(SAMPLES / "truthfulqa" / "TruthfulQA.csv"))
    examples = read(source)
    assert len(examples) == 790
    assert source.repaired == Counter(semicolon_at_the_end=22, correct_and_incorrect=2)
    assert sum("I have no comment" in example.references for example in examples) == 86
    assert sum(len(example.negatives) for example in examples) == 3251 + 1 - 2  # one best was missing; 2 are correct
    assert len(read(TruthfulQA(str(SAMPLES / "truthfulqa" / "mc_task.json")))) == 790


# ARC


def test_arc_row_by_row() -> None:
    source = ARC(fixture("arc.jsonl"))
    bat, gas, ice, mass = read(source)
    assert source.dropped == Counter(needs_its_choices=1)
    assert (bat.prompt, bat.target, texts(bat)) == (
        "Question: Which is a mammal?\nAnswer:",
        "bat",
        ["cod", "ant", "eel"],
    )
    assert (gas.target, ice.target, mass.target) == ("carbon dioxide", "ice", "kilogram")
    assert [len(example.negatives) for example in (bat, gas, ice, mass)] == [3, 3, 2, 4]
    (same,) = read(ARC(fixture("arc_ai2_original_format.jsonl")))
    assert (same.prompt, same.target, same.negatives, same.group) == (gas.prompt, gas.target, gas.negatives, gas.group)


def test_arc_multiple_choice() -> None:
    magnet = read(ARC(fixture("arc.jsonl"), mode="mcq"))[-1]
    assert magnet.prompt == ("Question: A magnet will pull on\nA. wood\nB. iron\nC. iron\nD. all of the above\nAnswer:")
    assert (magnet.target, texts(magnet)) == ("B. iron", ["A. wood", "D. all of the above"])
    letters = read(ARC(fixture("arc.jsonl"), mode="mcq", answer="letter"))
    assert [example.target for example in letters] == ["A", "B", "A", "E", "B"]
    assert texts(letters[1]) == ["A", "C", "D"]


def test_arc_third_format_and_official_splits(tmp_path: Path) -> None:
    rows = [{"query": f"Q{i}", "choices": ["Bb", "bb", "bb"], "gold": 1} for i in range(2)]
    train, test = write(tmp_path / "train.jsonl", rows[:1]), write(tmp_path / "test.jsonl", rows[1:])
    examples = read(ARC(train, test_path=test))
    assert [example.split for example in examples] == ["train", "test"]
    assert (examples[0].target, texts(examples[0])) == ("bb", ["Bb"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answerKey": "F"}, "the answerKey 'F' is not one of the labels A, B"),
        ({"answerKey": None}, "the answerKey None is not one of"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "A"]}, "answerKey": "A"}, "the answerKey 'A' is not one of"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "got 2 choices with 1 labels"),
        ({"choices": {"text": ["a"], "label": ["A"]}}, "1 choices"),
        ({"choices": {"text": ["a", ""], "label": ["A", "B"]}}, "choices that are not empty"),
        ({"choices": {"text": ["a", 2], "label": ["A", "B"]}}, "the list in the field 'choices' holds int, not text"),
        ({"choices": ["a", "b"]}, "'choices' is missing"),
        ({"question": 3}, "'question' is missing or not text"),
        ({"question": {"stem": "s", "choices": "a"}}, "0 choices"),
    ],
)
def test_a_bad_arc_row_is_reported_or_dropped(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"question": "Q?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    path = write(tmp_path / "arc.jsonl", [good, {**good, **change}])
    with pytest.raises(DataError, match=rf"arc\.jsonl, line 2: .*{message}"):
        read(ARC(path))
    source = ARC(path, on_bad_row="drop")
    assert [example.target for example in read(source)] == ["b"]
    assert source.dropped == Counter(bad_row=1)


@needs_samples
def test_real_arc() -> None:
    source = ARC(str(SAMPLES / "arc" / "ARC-Challenge.test.jsonl"))
    assert len(read(source)) == 1158
    assert source.dropped == Counter(needs_its_choices=14)
    choices = Counter(len(e.negatives) + 1 for e in read(ARC(source.path, mode="mcq")))
    assert choices.total() == 1172
    assert choices.total() - choices[4] == 7


# OASST


@pytest.mark.parametrize("name", ["oasst_messages.jsonl", "oasst_trees.jsonl"])
def test_oasst_row_by_row(name: str) -> None:
    source = OASST(fixture(name))
    egg, soft, number = read(source)
    orphans = {"orphan": 1} if name == "oasst_messages.jsonl" else {}
    assert source.dropped == Counter(
        rejected=1, deleted=1, other_language=2, below_one_left_out=1, no_reply=2, **orphans
    )
    assert (egg.target, egg.negatives) == (
        "Put it in boiling water for eight minutes.",
        (Negative("Boil it.", "lower_rank"),),
    )
    assert (soft.target, soft.negatives) == ("About five minutes.", ())
    assert (number.target, texts(number)) == ("Seven.", ["A number."])
    assert [e.group for e in (egg, soft, number)] == ["t1", "t1", "t5"]
    assert soft.prompt == (
        "### Prompt:\nHow do I boil an egg?\n\n### Response:\nPut it in boiling water for eight minutes.\n\n"
        "### Prompt:\nAnd for a soft one?\n\n### Response:\n"
    )
    assert [soft.prompt[slice(*span)] for span in soft.cuttable] == [egg.messages[0].content, egg.target]
    assert [(m.role, m.content) for m in soft.messages] == [
        ("user", "How do I boil an egg?"),
        ("assistant", egg.target),
        ("user", "And for a soft one?"),
    ]


def test_oasst_settings() -> None:
    def targets(**settings: Any) -> list[str]:
        return [example.target for example in read(OASST(fixture("oasst_messages.jsonl"), **settings))]

    assert targets(turns="first") == targets(max_turns=1) == ["Put it in boiling water for eight minutes.", "Seven."]
    assert targets(limit=1) == ["Put it in boiling water for eight minutes."]
    assert targets(langs=["en", "es"])[2] == "Lima."
    (soft,) = [e for e in read(OASST(fixture("oasst_messages.jsonl"), history=False)) if e.target.startswith("About")]
    assert soft.prompt == "### Prompt:\nAnd for a soft one?\n\n### Response:\n"
    gaps = [texts(e) for e in OASST(fixture("oasst_messages.jsonl"), min_rank_gap=2).rows()]
    assert gaps == [[], [], ["A number."]]
    chat = OASST(fixture("oasst_messages.jsonl"), user_turn="User: {text}\n\n", assistant_turn="Assistant: {text}\n\n")
    assert read(chat)[0].prompt == "User: How do I boil an egg?\n\nAssistant: "


def message(id: str, parent: str | None, **change: Any) -> dict[str, Any]:
    role = "prompter" if id.startswith("p") else "assistant"
    known = {"message_tree_id": "t", "text": id, "lang": "en", "review_result": True, "deleted": False}
    return {"message_id": id, "parent_id": parent, "role": role, **known, **change}


def test_oasst_takes_a_subtree_along(tmp_path: Path) -> None:
    rows = [
        message("p0", None),
        message("a1", "p0", deleted=True),
        message("p2", "a1"),
        message("a3", "p2"),
        message("a4", "p0", review_result=None),
        message("p5", "p0"),
        message("a6", "p0", labels={"name": ["spam"], "value": [0.5]}),
        message("a7", "p0", labels={"spam": {"value": 0.4}, "quality": {"value": 0.1}}),
        message("a8", "p0", labels={"spam": {"value": 0.4}, "quality": {"value": 0.9}}),
        message("p9", "a7"),
        message("a10", "p9"),
    ]
    path = write(tmp_path / "m.jsonl", rows)
    source = OASST(path)
    assert [(e.target, e.negatives) for e in read(source)] == [("a8", ())]  # no ranks: the quality decides
    assert source.dropped == Counter(deleted=1, below_one_left_out=2, unreviewed=1, wrong_role=1, spam=1)
    assert [e.target for e in read(OASST(path, all_paths=True))] == ["a8", "a10"]
    assert [e.target for e in read(OASST(path, unreviewed=True))] == ["a8"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([message("p0", None), message("p0", None)], "line 2: the message_id 'p0' occurs twice"),
        ([message("p0", "a1"), message("a1", "p0")], "line 1: the message 'p0' is its own ancestor"),
        ([message("p0", "p0")], "'p0' is its own ancestor"),
        ([message("p0", None, role="system")], "the role 'system' is neither"),
        ([message("p0", 3)], "'parent_id' of the message 'p0' is empty or of the wrong type"),
        ([message("p0", None, rank=0.5)], "rank 0.5 is not a whole number"),
        ([message("p0", None, rank=float("inf"))], "rank inf is not a whole number"),
        ([message("p0", None, message_tree_id=None)], "'message_tree_id'"),
        ([message("p0", None, text=None)], "the field 'text' is null"),
        ([{"message_tree_id": "t", "prompt": message("p0", None, replies=[1])}], "replies of 'p0' are not a list"),
    ],
)
def test_a_broken_tree_is_reported_or_dropped(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = write(tmp_path / "m.jsonl", rows)
    with pytest.raises(DataError, match=message):
        read(OASST(path))
    source = OASST(path, on_bad_row="drop")
    assert read(source) == []
    assert source.dropped["bad_row"] > 0


def test_nan_is_no_rank(tmp_path: Path) -> None:
    rows = [message("p0", None), message("a1", "p0", rank=float("nan")), message("a2", "p0", rank=0.0)]
    assert [e.target for e in read(OASST(write(tmp_path / "m.jsonl", rows)))] == ["a2"]


@needs_samples
def test_real_oasst_messages() -> None:
    path = SAMPLES / "oasst" / "oasst1.en.validation.messages.sample.jsonl"
    rows = [json.loads(line) for line in path.open()]
    source = OASST(str(path))
    examples = read(source)
    ids = {row["message_id"] for row in rows}
    orphans = [row for row in rows if row["parent_id"] and row["parent_id"] not in ids]
    deleted = [row for row in rows if row["deleted"]]
    rejected = [row for row in rows if row["review_result"] is False and not row["deleted"] and row not in orphans]
    assert (len(rows), len(deleted), len(rejected), len(orphans)) == (1182, 26, 28, 2)
    assert {key: source.dropped[key] for key in ("deleted", "rejected", "orphan")} == {
        "deleted": 26,
        "rejected": 28,
        "orphan": 2,
    }
    by_text = {row["text"].strip(): row for row in rows}
    for example in examples:
        ranks = [by_text[text]["rank"] for text in [example.target, *texts(example)] if text in by_text]
        assert example.negatives == () or (None not in ranks and ranks[0] == min(ranks))
    assert len(examples) == 165


@needs_samples
def test_real_oasst_trees() -> None:
    examples = read(OASST(str(SAMPLES / "oasst" / "oasst_en_100_tree.jsonl")))
    assert len({example.group for example in examples}) <= 100
    assert len(examples) == 147


# TWON


def test_twon_replies() -> None:
    source = TWON(fixture("twon_replies.jsonl"))
    first, second = read(source)
    assert source.dropped == Counter(empty_target=1, short_target=1, repost=1)
    assert first.references == ("Great news, my kids will love it!", "finally. Took you long enough [link]")
    assert second.references == first.references[::-1]
    assert first.group == second.group
    assert "library downtown. & the cafe too!\n\n### Response:\n" in first.prompt
    assert first.messages[0] == Message("system", "You are a social media user. Reply to the following post.")


def test_twon_posts() -> None:
    source = TWON(
        fixture("twon_posts.jsonl"),
        instruction="Write a post to the topic.",
        data_label="annotation",
        target_label="full_text",
        template="{instruction} {data}:",
    )
    bikes, soup = read(source)
    assert source.dropped == Counter(refusal=1)
    assert bikes.prompt == "Write a post to the topic. Announcement of a new bike lane:"
    assert soup.target == "What soup do you cook when it snows…"


@needs_samples
def test_real_synthetic_posts() -> None:
    path = str(SAMPLES / "twon" / "etmaal2024.synthetic_posts.english.json")
    examples = read(TWON(path, data_label="topic", target_label="text"))
    assert len(examples) == 345
    assert not any("http" in example.target for example in examples)


# Today's usual formats


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def said(example: Example) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in example.messages]


def test_messages_row_by_row() -> None:
    source = StandardFormat(fixture("messages.jsonl"))
    ferry, harbour, captain, tea = read(source)
    assert source.dropped == Counter(no_reply=1, empty_target=1)
    assert (ferry.prompt, ferry.target) == ("### Prompt:\nWhen does the ferry leave?\n\n### Response:\n", "At nine.")
    assert said(harbour) == [
        ("system", "Answer in one word."),
        ("user", "Is the harbour open?"),
        ("assistant", "Yes."),
        ("user", "Until when?"),
    ]
    assert harbour.target == "Midnight."
    assert harbour.prompt == (
        "### System:\nAnswer in one word.\n\n### Prompt:\nIs the harbour open?\n\n### Response:\nYes.\n\n"
        "### Prompt:\nUntil when?\n\n### Response:\n"
    )
    assert [harbour.prompt[slice(*span)] for span in harbour.cuttable] == ["Is the harbour open?", "Yes."]
    assert [message.cuttable for message in harbour.messages] == [(), ((0, 20),), ((0, 4),), ()]
    assert said(captain) == [("user", "Who steers the ferry?")]
    assert captain.target == "Captain Mirel."
    assert (said(tea), tea.target) == ([("user", "Thanks. Is there tea?")], "Yes, on deck two.")


def test_every_turn_makes_an_example_of_each_reply_in_one_group() -> None:
    examples = read(StandardFormat(fixture("messages.jsonl"), every_turn=True))
    assert [example.target for example in examples] == [
        "At nine.",
        "Yes.",
        "Midnight.",
        "Captain Mirel.",
        "Yes, on deck two.",
    ]
    assert [example.group for example in examples[1:3]] == ["answer in one word.\nis the harbour open?"] * 2


def test_sharegpt_conversations() -> None:
    ships, wood = read(StandardFormat(fixture("conversations.json")))
    assert said(ships)[0] == ("system", "You know ships.")
    assert said(ships)[-1] == ("user", "And a mast?")
    assert (ships.target, ships.source) == ("The pole that carries the sails.", "conversations")
    assert (said(wood), wood.target, wood.group) == ([("user", "What floats?")], "Wood does.", "what floats?")


def test_prompt_and_completion_are_what_an_own_file_gives() -> None:
    examples = read(StandardFormat(fixture("completions.csv")))
    own = read(OwnFile(fixture("completions.csv"), target="completion"))
    assert [(e.prompt, e.target, e.group, said(e)) for e in examples] == [
        (e.prompt, e.target, e.group, said(e)) for e in own
    ]


def test_rejected_replies_are_negatives() -> None:
    source = StandardFormat(fixture("preferences.jsonl"))
    examples = read(source)
    assert [(e.messages[-1].content, e.target, e.negatives) for e in examples] == [
        ("How deep is the lake?", "Forty metres.", (Negative("It is blue.", "rejected"),)),
        ("I am lost.", "Let us find the way together.", (Negative("Your fault.", "rejected"),)),
        ("Is it raining?", "Yes, a little.", (Negative("Look yourself.", "rejected"),)),
        ("Same?", "The same.", ()),
    ]
    assert said(examples[1])[0] == ("system", "Be kind.")
    assert source.dropped == Counter(negative_same_as_target=1)


def test_preferences_without_a_prompt_are_whole_dialogues(tmp_path: Path) -> None:
    def turns(*contents: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), contents, strict=False)]

    rows = [
        {"chosen": turns("Hi?", "Hello!"), "rejected": turns("Hi?", "Go away.")},
        {"chosen": turns("Hi?", "Hello!"), "rejected": turns("Ho?", "Go away.")},
    ]
    source = StandardFormat(write(tmp_path / "rows.jsonl", rows))
    assert [texts(example) for example in read(source)] == [["Go away."], []]
    assert source.dropped == Counter(rejected_reply_to_another_prompt=1)


def rated(tmp_path: Path, *rows: dict[str, Any]) -> tuple[list[tuple[str, list[str]]], Counter[str]]:
    """Targets with their negatives, and what was dropped, of a file of ratings."""
    source = StandardFormat(
        write(tmp_path / "ratings.jsonl", [{"time": "2026-11-29", "run": "a", **row} for row in rows])
    )
    return [(example.target, texts(example)) for example in read(source)], +source.dropped


def choice(chosen: str, rejected: str, prompt: str = "Q?") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def single(completion: str, label: bool, prompt: str = "Q?") -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


def test_good_and_bad_answers_to_a_prompt_are_pairs(tmp_path: Path) -> None:
    rows = [single("no", False), single("yes", True), single("yes", True), single("aye", True), single("nay", False)]
    assert rated(tmp_path, *rows) == ([("yes", ["no", "nay"]), ("aye", ["no", "nay"])], Counter())


def test_good_answers_alone_are_targets_and_bad_ones_alone_are_dropped(tmp_path: Path) -> None:
    rows = [single("yes", True), single("no", False, "R?"), single("nay", False, "R?"), choice("a", "b", "S?")]
    found, dropped = rated(tmp_path, *rows)
    assert found == [("yes", []), ("a", ["b"])] and dropped == Counter(bad_answer_without_a_good_one=2)


def test_several_choices_for_a_prompt(tmp_path: Path) -> None:
    """Each is an example; where an answer is bad as well, each answer."""
    rows = [choice("a", "b"), choice("b", "c"), choice("a", "c"), choice("a", "b")]
    assert rated(tmp_path, *rows) == ([("a", ["b"]), ("b", ["c"]), ("a", ["c"]), ("a", ["b"])], Counter())
    found = [("a", ["b", "c", "d"]), ("b", ["c", "d"])]
    assert rated(tmp_path, *rows, single("d", False)) == (found, Counter())


def test_opposite_ratings_cancel_each_other(tmp_path: Path) -> None:
    """Of a pair two to one: once; one to one: not at all, and what remains of the prompt stays."""
    assert rated(tmp_path, choice("a", "b"), choice("b", "a")) == ([], Counter(contradicting_ratings=2))
    rows = [choice("a", "b"), choice("b", "a"), choice("a", "b"), choice("b", "c")]
    assert rated(tmp_path, *rows) == ([("a", ["b"]), ("b", ["c"])], Counter(contradicting_ratings=2))
    rows = [single("a", True), single("a", False), single("a", False), single("b", True)]
    assert rated(tmp_path, *rows) == ([("b", ["a"])], Counter(contradicting_ratings=2))


def test_a_choice_counts_before_ratings_of_each_answer(tmp_path: Path) -> None:
    rows = [choice("a", "b"), single("a", False), single("b", True)]
    assert rated(tmp_path, *rows) == ([("a", ["b"]), ("b", [])], Counter())


def test_ratings_of_conversations(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hi!"}]
    asked = [*asked, {"role": "user", "content": "Well?"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("Fine.", "Bad."))
    source = StandardFormat(
        write(
            tmp_path / "ratings.jsonl",
            [
                {"prompt": asked, "completion": bad, "label": False},
                {"prompt": asked, "chosen": good, "rejected": [{"role": "assistant", "content": "So."}]},
                {"prompt": asked[2:], "completion": good, "label": True},
            ],
        )
    )
    first, second = read(source)
    assert texts(first) == ["So.", "Bad."] and [turn.content for turn in first.messages] == ["Hi.", "Hi!", "Well?"]
    assert second.target == "Fine." and not second.negatives, "another prompt"


def test_ratings_are_mixed_with_targets(tmp_path: Path) -> None:
    ratings = write(tmp_path / "ratings.jsonl", [choice("a", "b"), single("c", False), single("x", False, "R?")])
    targets = write(
        tmp_path / "targets.jsonl", [{"prompt": "S?", "completion": "s"}, {"prompt": "T?", "completion": "t"}]
    )
    mixed = Mixture([StandardFormat(ratings), StandardFormat(targets)])
    assert [(one.target, texts(one)) for one in read(mixed)] == [("a", ["b", "c"]), ("s", []), ("t", [])]
    assert +mixed.dropped == Counter({"preferences/bad_answer_without_a_good_one": 1})


def test_a_reply_with_the_weight_0_is_no_target(tmp_path: Path) -> None:
    """As in the files of chat fine-tuning services; null is no weight, as parquet fills in where others have one."""
    said = [
        {"role": "user", "content": "Q?", "weight": None},
        {"role": "assistant", "content": "First.", "weight": 0},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Second.", "weight": 1},
    ]
    path = write(tmp_path / "rows.jsonl", [{"messages": said}, {"messages": said[:2]}])
    source = StandardFormat(path, every_turn=True)
    assert [(example.messages[1].content, example.target) for example in read(source)] == [("First.", "Second.")]
    assert source.dropped == Counter(weight_0=2)
    path = write(tmp_path / "half.jsonl", [{"messages": [*said[:3], {**said[3], "weight": 0.5}]}])
    with pytest.raises(DataError, match=r"turn 4 of 'messages' has the weight 0\.5, not 0 or 1"):
        read(StandardFormat(path))


def test_the_last_reply_that_is_learned_is_the_target(tmp_path: Path) -> None:
    said = [turn("user", "Q?"), turn("assistant", "First."), turn("user", "And?"), turn("assistant", "Second.")]
    path = write(tmp_path / "rows.jsonl", [{"messages": [*said[:3], {**said[3], "weight": 0}]}])
    source = StandardFormat(path)
    (example,) = read(source)
    assert ([message.content for message in example.messages], example.target) == (["Q?"], "First.")
    assert source.dropped == Counter()


def test_turns_before_the_first_question_are_counted(tmp_path: Path) -> None:
    rows = [
        {"messages": [turn("assistant", "Welcome!"), turn("user", "Q?"), turn("assistant", "A")]},
        {"messages": [turn("system", "Be kind."), turn("user", "Q?"), turn("assistant", "A")]},
    ]
    source = StandardFormat(write(tmp_path / "rows.jsonl", rows))
    assert [len(example.messages) for example in read(source)] == [1, 2]
    assert source.repaired == Counter(turns_before_the_first_question=1)


@pytest.mark.parametrize(
    ("make", "row"),
    [
        (StandardFormat, {"messages": [{"role": "user", "content": "a\ud800"}, {"role": "assistant", "content": "b"}]}),
        (StandardFormat, {"instruction": "a", "output": "b\x00"}),
        (Alpaca, {"instruction": "a\ud800", "output": "b\x00"}),
        (partial(OwnFile, negatives="no"), {"prompt": "a", "response": "b", "no": ["c\x00", "d\x07"]}),
        (ARC, {"question": "a", "choices": {"text": ["b", "c\x00"], "label": ["A", "B"]}, "answerKey": "A"}),
    ],
)
def test_what_is_deleted_from_a_text_is_counted(
    make: Callable[..., Source], row: dict[str, Any], tmp_path: Path
) -> None:
    clean = json.loads(json.dumps(row).replace("\\ud800", "").replace("\\u0000", "").replace("\\u0007", ""))
    source = make(write(tmp_path / "rows.jsonl", [row, {**clean, "unread": "\x00"}]))
    assert len({(example.prompt, example.target) for example in read(source)}) == 1
    assert +source.repaired == Counter(control_characters_removed=1)


def test_transcripts_of_human_and_assistant(tmp_path: Path) -> None:
    def told(reply: str, question: str = "Why?") -> str:
        return f"\n\nHuman: Hi: you\n\nHuman?\n\nAssistant: Hello.\n\nHuman: {question}\n\nAssistant: {reply}"

    rows = [
        {"chosen": told("Because."), "rejected": told("No.")},
        {"chosen": told("Because."), "rejected": told("No.", "How?")},
    ]
    source = StandardFormat(write(tmp_path / "hh.jsonl", rows))
    first, second = read(source)
    roles = [("user", "Hi: you\n\nHuman?"), ("assistant", "Hello."), ("user", "Why?")]
    assert (said(first), first.target, texts(first), texts(second)) == (roles, "Because.", ["No."], [])
    assert source.dropped == Counter(rejected_reply_to_another_prompt=1)


def test_a_negative_that_is_the_target_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "Q?", "chosen": "A", "rejected": "A", "response": "A"}])
    for source in (StandardFormat(path), OwnFile(path, negatives="rejected")):
        (example,) = source.rows()
        assert example.negatives == ()
        assert source.dropped == Counter(negative_same_as_target=1)


def test_the_path_of_the_data_module_is_enough(tmp_path: Path) -> None:
    source = StandardFormat(every_turn=True)
    assert len(read(source.with_path(fixture("messages.jsonl")))) == 5
    with pytest.raises(DataError, match="no data file is named; set data"):
        read(source)


def test_a_data_set_on_the_hub_by_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(*name: str, split: str) -> list[dict[str, str]]:
        asked.append((*name, split))
        return [{"prompt": "Q?", "completion": "A"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = StandardFormat("someone/rows", hub_config="main", hub_split="train_sft")
    assert [example.target for example in read(source)] == ["A"]
    assert asked == [("someone/rows", "main", "train_sft")]


def test_an_alpaca_file_gives_the_same_examples() -> None:
    alpaca, standard = Alpaca(fixture("alpaca.json")), StandardFormat(fixture("alpaca.json"))
    assert list(standard.rows()) == list(alpaca.rows())
    assert (standard.dropped, standard.repaired) == (alpaca.dropped, alpaca.repaired)
    assert standard.with_path("other.json").dropped == Counter(alpaca.dropped)


def test_final_answers_in_standard_formats(tmp_path: Path) -> None:
    """The answer belongs to the last reply."""
    rows = [{"prompt": "2 + 2?", "completion": "It is #### 4", "answer": 4}, {"prompt": "Hi", "completion": "Ho"}]
    found = read(StandardFormat(write(tmp_path / "a.jsonl", rows)))
    assert [(e.target, e.answers) for e in found] == [("It is #### 4", ("4",)), ("Ho", ())]
    turns = [("user", "1 + 1?"), ("assistant", "2"), ("user", "2 + 2?"), ("assistant", "4")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = write(tmp_path / "b.jsonl", [{"messages": messages, "answer": ["4", "four"]}])
    assert [e.answers for e in read(StandardFormat(path, every_turn=True))] == [(), ("4", "four")]
    path = write(tmp_path / "c.jsonl", [{"instruction": "2 + 2?", "output": "It is 4", "answer": "4"}])
    assert [e.answers for e in read(StandardFormat(path))] == [("4",)]


def test_rows_of_prompt_and_answer_are_prompts_without_target(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2 + 2?", "answer": 4},
        {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "3 + 3?"}], "answer": "6"},
        {"prompt": "Hi", "answer": None},
        {"prompt": "", "answer": "4"},
    ]
    source = StandardFormat(write(tmp_path / "rows.jsonl", rows))
    first, second = source.rows()
    assert source.name == first.source == "answers"
    assert (first.prompt, first.target) == ("### Prompt:\n2 + 2?\n\n### Response:\n", "")
    assert (first.references, first.answers, second.answers) == ((), ("4",), ("6",))
    assert [message.role for message in second.messages] == ["system", "user"]
    assert source.dropped == Counter(empty_answer=1, empty_prompt=1)


def test_rows_with_an_answer_and_no_completion_are_prompts_without_target(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "answer": "b"}, {"prompt": "c", "completion": None, "answer": "d"}]
    source = StandardFormat(write(tmp_path / "rows.jsonl", [*rows, {"prompt": "e", "answer": "f"}]))
    assert [(e.target, e.answers) for e in source.rows()] == [("b", ("b",)), ("", ("d",)), ("", ("f",))]
    for first in (rows[1], {"prompt": "c", "answer": "d"}):
        source = StandardFormat(write(tmp_path / "first.jsonl", [first, rows[0], first]))
        assert [(e.target, e.answers) for e in source.rows()] == [("", ("d",)), ("b", ("b",)), ("", ("d",))]


def test_rows_with_tests(tmp_path: Path) -> None:
    """They stand beside a reply, or in its place; a row without either is left out."""
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
    rows = [
        {"prompt": "Add.", "completion": "def add(a, b): return a + b", "tests": tests},
        {"prompt": "Sum.", "completion": None, "tests": tests[0]},
        {"prompt": "Both.", "tests": tests, "answer": 4},
        {"prompt": "None.", "tests": []},
    ]
    wanted = [("def add(a, b): return a + b", tests), ("", tests[:1]), ("", tests)]
    for order in (rows, [*rows[1:], rows[0]]):
        source = StandardFormat(write(tmp_path / "rows.jsonl", order))
        found = sorted((e.target, list(e.tests), e.answers, e.is_answered) for e in source.rows())
        assert found == sorted(
            (target, given, ("4",) * (given == tests and not target), True) for target, given in wanted
        )
        assert source.dropped == Counter(empty_answer=1)
    assert not any(example.without_answer().tests for example in source.rows())
    path = write(tmp_path / "bare.jsonl", [{"prompt": "Add.", "tests": tests}])
    source = StandardFormat(path)
    assert [(e.source, list(e.tests)) for e in source.rows()] == [("tests", tests)]
    messages = [{"role": role, "content": text} for role, text in (("user", "Add."), ("assistant", "Done."))]
    path = write(tmp_path / "messages.jsonl", [{"messages": messages * 2, "tests": tests}])
    assert [list(e.tests) for e in StandardFormat(path, every_turn=True).rows()] == [[], tests]
    path = write(tmp_path / "own.jsonl", [{"q": "Add.", "test_list": tests}, {"q": "Sum."}])
    assert [list(e.tests) for e in OwnFile(path, "{q}", target=None, tests="test_list").rows()] == [tests, []]


def test_tests_that_are_none_are_refused_or_dropped(tmp_path: Path) -> None:
    for wrong, message in (
        (["assert add(1, 2"], r"holds 'assert add\(1, 2', which is not Python: '\(' was never closed"),
        (["3 ="], "holds '3 =', which is not Python: .*; a test is a statement such as assert"),
        ({"input": 1}, "is dict, not a list of texts"),
        ([3], "holds int, not text"),
    ):
        path = write(tmp_path / "bad.jsonl", [{"prompt": "Add.", "tests": wrong}])
        with pytest.raises(DataError, match=rf"line 1: .*'tests' {message}"):
            read(StandardFormat(path))
        source = StandardFormat(path, on_bad_row="drop")
        assert (list(source.rows()), source.dropped) == ([], Counter(bad_row=1))
    with pytest.raises(DataError, match=r"example 1: the test 'assert \(' is not Python: .*; fix or delete it"):
        list(checked([Example("Q", "", tests=("assert (",))], "mine"))
    with pytest.raises(DataError, match="its tests are str 'assert True'; give a tuple of them, each as a text"):
        list(checked([Example("Q", "", tests="assert True")], "mine"))  # type: ignore[arg-type]


def test_questions_and_answers_are_no_format_that_is_recognised(tmp_path: Path) -> None:
    """As in GSM8K, where answer holds the work, too."""
    path = write(tmp_path / "a.jsonl", [{"question": "2 + 2?", "answer": "It is #### 4"}])
    with pytest.raises(DataError, match=r"the fields question, answer are no format that is recognised .*OwnFile"):
        read(StandardFormat(path))


def test_nested_rows_are_the_same_in_parquet(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    rows = json.loads(Path(fixture("conversations.json")).read_text())
    parquet.write_table(Table.from_pylist(rows), tmp_path / "rows.parquet")
    examples = read(StandardFormat(str(tmp_path / "rows.parquet")))
    assert examples == read(StandardFormat(fixture("conversations.json")))


def test_a_row_of_another_shape_is_refused_or_dropped(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"messages": []}]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"line 2: the field 'prompt' is missing \(fields found: messages\), which"):
        read(StandardFormat(path))
    source = StandardFormat(path, on_bad_row="drop")
    assert len(read(source)) == 1
    assert source.dropped == Counter(bad_row=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "the fields text are no format that is recognised .* lora_gan.data.OwnFile, whose template"),
        (
            {"instruction": "a", "context": "", "response": "b"},
            "lora_gan.data.Dolly reads rows of instruction, context, response; set",
        ),
        ({"messages": "a"}, "'messages' is str, not a list of messages"),
        ({"messages": ["a"]}, "turn 1 of 'messages' is str, not an object with role and content"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "turn 1 of 'messages' has the role 'tool', not system, user",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "turn 1 of 'messages' holds null, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "holds image_url, not text"),
        (
            {"prompt": "a", "completion": 3},
            "'completion' is int, not a list of messages or a text; put the number in q",
        ),
        (
            {"chosen": "b", "rejected": "c"},
            "'chosen' is str, not a list of messages, and there is no field 'prompt' that",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "turn 1 of 'messages' calls a tool and says nothing; tool calls cannot be learned",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected' is int, not a list of texts"),
    ],
)
def test_a_row_that_is_no_dialogue_is_reported(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl, line 1: .*{message}"):
        read(StandardFormat(write(tmp_path / "rows.jsonl", [row])))


@pytest.mark.parametrize("source", [Alpaca, Dolly, TruthfulQA, ARC, OASST, TWON, OwnFile])
def test_every_source_names_the_one_that_would_fit(source: Callable[..., Source]) -> None:
    with pytest.raises(DataError, match=r"is missing \(fields found: messages, id\); .* lora_gan.data.StandardFormat,"):
        read(source(fixture("messages.jsonl")))


def test_fields_that_are_not_read_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lora_gan")
    read(StandardFormat(fixture("messages.jsonl")))
    assert "rows of messages; other fields are not read: id" in caplog.text


# Files of your own


def test_own_file(tmp_path: Path) -> None:
    rows = [{"q": "Q?", "text": "long", "a": "A", "more": ["A", "B"], "no": ["A", "C", "C"], "who": "x", "s": "test"}]
    path = write(tmp_path / "own.jsonl", [*rows, {**rows[0], "a": ""}])
    source = OwnFile(
        path, "{q} <{text}> ", target="a", references="more", negatives="no", group="who", split="s", on_bad_row="drop"
    )
    (example,) = read(source)
    assert example.prompt == "Q? <long> "
    assert [example.prompt[slice(*span)] for span in example.cuttable] == ["long"]
    assert (example.references, texts(example)) == (("A", "B"), ["C"])
    assert (example.group, example.split) == ("x", "test")
    assert source.dropped == Counter(empty_target=1, negative_same_as_target=1)


def test_final_answers_of_an_own_file(tmp_path: Path) -> None:
    rows = [{"q": "Q?", "n": 7, "r": "A"}, {"q": "P?", "n": ["8", 8.0, 0.5], "r": "B"}, {"q": "R?", "r": "C"}]
    path = write(tmp_path / "own.jsonl", rows)
    wanted = [("7",), ("8", "0.5"), ()]
    assert [e.answers for e in OwnFile(path, "{q}", target="r", answer="n").rows()] == wanted
    without = list(OwnFile(path, "{q}", target=None, answer="n").rows())
    assert [(e.target, e.references, e.answers) for e in without] == [("", (), answers) for answers in wanted]
    for wrong in ({"value": 7}, True, float("inf")):
        path = write(tmp_path / "bad.jsonl", [{"prompt": "Q?", "n": wrong}])
        with pytest.raises(DataError, match=r"line 1: the field 'n' holds .*; a final answer is a text or a"):
            list(OwnFile(path, target=None, answer="n").rows())


def test_negatives_of_an_own_file_may_be_a_single_text(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q?", "response": "A", "rejected": "B"},
        {"prompt": "P?", "response": "A", "rejected": ["C", None]},
    ]
    source = OwnFile(write(tmp_path / "own.jsonl", rows), negatives="rejected")
    assert [texts(example) for example in read(source)] == [["B"], ["C"]]


def test_prompts_without_targets(tmp_path: Path) -> None:
    source = OwnFile(write(tmp_path / "own.jsonl", [{"q": "Q?"}, {"q": ""}]), "{q}", target=None)
    assert [(e.prompt, e.target, e.references) for e in source.rows()] == [("Q?", "", ())]
    assert source.dropped == Counter(empty_prompt=1)


@pytest.mark.parametrize(
    ("template", "message"),
    [("{}", "must name its fields"), ("none", "must name"), ("{a", "cannot be read"), ("{a.b}", "must name")],
)
def test_a_bad_template_is_reported(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        OwnFile("a.json", template)
    with pytest.raises(DataError, match="cuttable names b, but the template has a only"):
        OwnFile("a.json", "{a}", cuttable=["b"])


def test_an_unknown_template_field_names_the_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"own\.jsonl, line 1: the field 'x' is missing \(fields found: q\)"):
        read(OwnFile(write(tmp_path / "own.jsonl", [{"q": "a"}]), "{x}"))


# Mixtures


class Numbers(Source):
    def __init__(self, letter: str, count: int) -> None:
        super().__init__()
        self.letter, self.count = letter, count

    @property
    def name(self) -> str:
        return self.letter

    def rows(self) -> list[Example]:
        self.dropped["odd"] = 1
        return [Example(f"{self.letter}{i}", "t", group=f"{self.letter}{i}") for i in range(self.count)]


def test_weights_are_shares() -> None:
    mixture = Mixture([Numbers("a", 100), Numbers("b", 30), Numbers("c", 5)], weights=[2, 1, 0])
    prompts = [example.prompt for example in mixture.rows()]
    assert Counter(prompt[0] for prompt in prompts) == Counter(a=60, b=30)
    assert len(set(prompts)) == 90
    assert mixture.dropped == Counter(
        {"a/odd": 1, "b/odd": 1, "c/odd": 1, "a/over_its_weight": 40, "c/over_its_weight": 5}
    )
    assert [example.prompt for example in mixture.rows()] == prompts
    assert len(list(Mixture([Numbers("a", 3), Numbers("b", 4)]).rows())) == 7


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1], "1 weights for 2 sources"), ([1, -0.5], "must be >= 0, got -0.5"), ([0, 0], "all weights .* are 0")],
)
def test_weights_are_checked(weights: list[float], message: str) -> None:
    with pytest.raises(LoraGANError, match=message):
        Mixture([Numbers("a", 1), Numbers("b", 1)], weights)


def test_small_sources_come_several_times() -> None:
    """Half and half of 10 and 4: 10 and 4 + 4 + 2; all that is the same has one item, of which evaluation keeps one."""
    found = list(Mixture([Numbers("a", 10), Numbers("b", 4)], weights=[1, 1], repeat=True).rows())
    counts = Counter(example.prompt for example in found)
    assert sum(n for prompt, n in counts.items() if prompt[0] == "a") == 10
    assert sorted(n for prompt, n in counts.items() if prompt[0] == "b") == [2, 2, 3, 3]
    assert len(one_wording_each(found, seed=0)) == 14
    with pytest.raises(LoraGANError, match="repeat: true needs weights"):
        Mixture([Numbers("a", 1)], repeat=True)


def test_a_mixture_without_sources() -> None:
    with pytest.raises(LoraGANError, match="at least one source"):
        Mixture([])


# What is left out


def test_the_command_line_takes_every_source(tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser

    sources = [
        {"class_path": f"lora_gan.data.{name}", "init_args": {"path": fixture(file), "on_bad_row": "drop"}}
        for name, file in (
            ("Alpaca", "alpaca.json"),
            ("Dolly", "dolly.jsonl"),
            ("TruthfulQA", "truthfulqa.csv"),
            ("ARC", "arc.jsonl"),
            ("OASST", "oasst_trees.jsonl"),
            ("TWON", "twon_replies.jsonl"),
            ("StandardFormat", "messages.jsonl"),
            ("OwnFile", "alpaca.json"),
        )
    ]
    sources[-1]["init_args"] |= {"template": "{instruction}", "target": "output"}
    config = {"class_path": "lora_gan.data.Mixture", "init_args": {"sources": sources}}
    parser = ArgumentParser()
    parser.add_subclass_arguments(Source, "source")
    mixture = parser.instantiate(parser.parse_args([f"--source={json.dumps(config)}"])).source
    counts = Counter(example.source for example in mixture.rows())
    assert counts == Counter(alpaca=7, dolly=4, truthfulqa=2, arc=4, oasst=3, twon=2, messages=4, ownfile=9)


@pytest.mark.parametrize("make", [Alpaca, Dolly, TWON, OwnFile, StandardFormat, ARC, TruthfulQA])
def test_limits_are_checked(make: Callable[..., Source]) -> None:
    with pytest.raises(LoraGANError, match="limit must be at least 1"):
        make("a.json", limit=0)
