"""Digit chains: numbers worked by hand, the text of the pretraining, the questions and their splits."""

from __future__ import annotations

import re
from random import Random

import pytest

from lora_gan.data import DigitChains
from lora_gan.data.digits import STEP, Chain, draw, facts, question, step, valid_steps, worked
from lora_gan.errors import LoraGANError
from lora_gan.types import Example

CHAIN = Chain(6, (("times", 3), ("minus", 9), ("plus", 7)))  # 18 → 8, −1 → 9, 16 → 6


def test_a_chain_by_hand() -> None:
    assert question(CHAIN) == "What is 6 times 3 minus 9 plus 7?"
    assert worked(CHAIN) == "6 times 3 is 8. 8 minus 9 is 9. 9 plus 7 is 6. The last digit is 6."
    assert CHAIN.result == 6 and step(2, "minus", 9) == "2 minus 9 is 3."


def test_valid_steps_by_hand() -> None:
    assert valid_steps(worked(CHAIN)) == 1.0
    assert valid_steps("6 times 3 is 8. 8 minus 9 is 1. The last digit is 1.") == 0.5
    assert valid_steps("The last digit is 6.") == 0.0


def test_no_question_is_in_the_text_and_all_of_it_is_true() -> None:
    text = [statement for fact in facts(300) for statement in fact.statements]
    assert len(text) == 300 and not any("?" in document or "What" in document for document in text)
    assert all(valid_steps(document) == 1.0 for document in text)


def test_single_steps_and_chains_are_probed() -> None:
    probed = [fact for fact in facts(0) if fact.cues]
    assert len(probed) == 300 + 100
    assert (probed[0].cues, probed[0].object) == (("0 plus 0 is",), "0")
    for fact in probed[-3:]:
        start, *operations = fact.cues[0].removeprefix("the list ").partition(".")[0].split()
        pairs = tuple(zip(operations[::2], map(int, operations[1::2]), strict=True))
        assert " ".join(Chain(int(start), pairs).steps) == f"{fact.object}."


def by_split(source: DigitChains) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = {}
    for example in source.rows():
        found.setdefault(example.split, []).append(example)
    return found


def test_worked_questions_are_half_of_the_rows() -> None:
    train = by_split(DigitChains(worked=24, answers=200))["train"]
    with_work = [example for example in train if example.target]
    assert (len(with_work), len({example.prompt for example in with_work})) == (192, 24)
    assert all(valid_steps(example.target) == 1.0 for example in with_work)
    assert len(train) == 192 + 200 and all(len(example.answers) == 1 for example in train)


def test_what_a_question_without_work_has_as_target() -> None:
    train = by_split(DigitChains(worked=0, answers=5, target="answer"))["train"]
    assert [example.target for example in train] == [f"The last digit is {example.answers[0]}." for example in train]
    assert [example.target for example in by_split(DigitChains(worked=0, answers=5))["train"]] == [""] * 5


def test_held_out_questions_are_the_same_and_never_trained_on() -> None:
    one, other = by_split(DigitChains(seed=0)), by_split(DigitChains(seed=1))
    assert one["test"] == other["test"] and one["validation"] == other["validation"]
    assert (len(one["test"]), len(one["validation"])) == (300, 100)
    held_out = {example.prompt for split in ("test", "validation") for example in one[split]}
    for found in (one, other):
        assert not held_out & {example.prompt for example in found["train"]}
    assert one["train"] != other["train"] and len(held_out) == 400


def test_mistakes() -> None:
    with pytest.raises(LoraGANError, match="worked and answers must be at least 0, and one of them 1"):
        DigitChains(worked=0, answers=0)
    with pytest.raises(LoraGANError, match="length and worked_length must be at least 1, got 0 and 0"):
        DigitChains(length=0)
    with pytest.raises(LoraGANError, match="there are no 400 different chains of length 1"):
        list(DigitChains(length=1).rows())


def test_a_drawn_chain_has_its_length_and_no_factor_that_loses_digits() -> None:
    random = Random(0)
    chains = [draw(random, 4) for _ in range(200)]
    assert {len(chain.operations) for chain in chains} == {4}
    assert {number for chain in chains for name, number in chain.operations if name == "times"} == {3, 7, 9}


def test_prompts_of_which_nothing_is_known_are_half_of_the_rows() -> None:
    train = by_split(DigitChains(worked=24, answers=32, prompts=2000))["train"]
    with_work = [example for example in train if example.target]
    answered = [example for example in train if example.answers and not example.target]
    free = [example for example in train if not example.answers]
    assert [len(with_work), len(answered), len(free)] == [41 * 24, 31 * 32, 2000]
    assert all(not (example.target or example.references) for example in free)
    asked = [{example.prompt for example in part} for part in (with_work, answered, free)]
    assert [len(each) for each in asked] == [24, 32, 2000] and len(set().union(*asked)) == 2056
    fewer = by_split(DigitChains(worked=24, answers=32))["train"]
    assert {example.prompt for example in fewer} == asked[0] | asked[1], "the same ones are known without them"
    with pytest.raises(LoraGANError, match="prompts must be at least 0, got -1"):
        DigitChains(prompts=-1)


def test_worked_questions_can_be_shorter_than_those_that_are_asked() -> None:
    found = by_split(DigitChains(worked=24, answers=16, prompts=200, worked_length=3))
    steps = [len(STEP.findall(example.target)) for example in found["train"] if example.target]
    assert set(steps) == {3} and len(steps) == 4 * 24
    assert {len(STEP.findall(example.target)) for split in ("test", "validation") for example in found[split]} == {4}
    assert sum(bool(example.answers) and not example.target for example in found["train"]) == 6 * 16
    asked = {example.prompt for example in found["train"] if not example.target}
    assert {len(re.findall("plus|minus|times", prompt)) for prompt in asked} == {4} and len(asked) == 216
    with pytest.raises(LoraGANError, match="length and worked_length must be at least 1, got 4 and 0"):
        DigitChains(worked_length=0)


def test_few_answers_are_repeated_beside_more_worked_questions() -> None:
    train = by_split(DigitChains(worked=24, answers=8))["train"]
    assert [sum(bool(example.target) == with_work for example in train) for with_work in (True, False)] == [24, 24]
