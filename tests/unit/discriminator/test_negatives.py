"""Worse completions: what each kind makes of a target, and what none of them may be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lora_gan.data.datamodule import collate
from lora_gan.data.tokenizer import encode, encode_completions
from lora_gan.discriminator.negatives import (
    CutShort,
    Echo,
    HardNegatives,
    MadeUp,
    Negatives,
    OtherCompletions,
    Refusal,
    Repetition,
    ShuffledWords,
    Swapped,
)
from lora_gan.errors import LoraGANError
from lora_gan.text_metrics import normalise
from lora_gan.types import Example, Negative, PromptBatch
from tests.conftest import CONTEXT, EOS

KINDS = [HardNegatives, OtherCompletions, ShuffledWords, CutShort, Repetition, Swapped, Refusal, Echo]
FAMILY, E_ACUTE = "👩\u200d👩\u200d👧", "e\u0301"
TARGETS = [
    "The capital of France is Paris.",
    "In 1912 Albert Einstein met Marie Curie.",
    "我喜欢在东京吃寿司。",
    "สวัสดีชาวโลก",
    "مرحبا ١٢٣ عالم",
    f"😀{FAMILY} 👍🏽",
    "Paris",
    "a",
    "...",
    "",
    "no no no",
    E_ACUTE * 2,
    "one\n- two\n\n- three <|endoftext|>",
]

Batches = Callable[..., PromptBatch]


@pytest.fixture
def texts_of(tokenizer: PreTrainedTokenizerFast) -> Callable[[Negatives, PromptBatch], list[list[str]]]:
    """The negatives of a batch as texts, after a look at how they end."""

    def text(ids: Tensor) -> str:
        assert ids.dtype == torch.long and ids.tolist().index(EOS) == len(ids) - 1, "one EOS, at the end"
        return str(tokenizer.decode(ids[:-1].tolist()))

    def texts(negatives: Negatives, batch: PromptBatch) -> list[list[str]]:
        return [[text(ids) for ids in row] for row in negatives(batch, tokenizer)]

    return texts


Texts = Callable[[Negatives, PromptBatch], list[list[str]]]


def many(negatives: Negatives, batch: PromptBatch, texts_of: Texts, times: int = 40) -> set[str]:
    """What the batch's first prompt gets when asked often enough to see everything."""
    torch.manual_seed(0)
    return {text for _ in range(times) for text in texts_of(negatives, batch)[0]}


@pytest.fixture
def worldwide(tokenizer: PreTrainedTokenizerFast) -> PromptBatch:
    """Targets of many kinds; every second one has a negative of its own."""
    wrong = Negative("wrong", "wrong")
    examples = [
        Example(f"### Prompt:\nQ{i}\n\n### Response:\n", target, negatives=(wrong,) * (i % 2), group=str(i))
        for i, target in enumerate(TARGETS)
    ]
    return collate(encode(tokenizer, examples))


# every kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_prompt", [1, 3])
def test_none_is_an_accepted_completion(
    kind: type[Negatives], per_prompt: int, worldwide: PromptBatch, texts_of: Texts
) -> None:
    torch.manual_seed(0)
    for _ in range(10):
        made = texts_of(kind(per_prompt), worldwide)
        assert len(made) == len(TARGETS)
        for row, target in zip(made, TARGETS, strict=True):
            assert len(row) <= per_prompt
            assert len(set(row)) == len(row), "none twice"
            assert normalise(target) not in {normalise(text) for text in row}


@pytest.mark.parametrize("kind", KINDS)
def test_references_are_left_out_too(
    kind: type[Negatives], make_batch: Batches, texts_of: Texts, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Whatever a kind gives is declared right; then it must give something else or nothing."""
    batch = make_batch(("Say it", "two 7 words", "hers"), ("Q2", "his"))
    torch.manual_seed(0)
    right = texts_of(kind(), batch)[0]
    example = replace(batch.examples[0], references=("two 7 words", *map(str.upper, right)))
    batch = replace(batch, examples=(example, batch.examples[1]))
    assert not many(kind(), batch, texts_of) & set(right)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_decides(kind: type[Negatives], worldwide: PromptBatch, texts_of: Texts) -> None:
    def drawn() -> list[list[list[str]]]:
        torch.manual_seed(3)
        return [texts_of(kind(2), worldwide) for _ in range(3)]

    assert drawn() == drawn()


@pytest.mark.parametrize("kind", [kind for kind in dict.fromkeys(KINDS) if kind is not Echo])
def test_others_come_next_time(kind: type[Negatives], make_batch: Batches, texts_of: Texts) -> None:
    batch = make_batch(("Q", "in 1912 by Ann", "x", "y"), ("Q2", "by Bob"), ("Q3", "by Eve"))
    assert len(many(kind(), batch, texts_of)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_too_long_for_the_context(kind: type[Negatives], make_batch: Batches, texts_of: Texts) -> None:
    """Behind a prompt of CONTEXT − 4 there is room for three characters and EOS."""
    long = "p" * (CONTEXT - 4)
    batch = make_batch((long, "a 1", "no!", "nope"), ("Q2", "abc"), ("Q3", "abcd"))
    assert all(len(text) <= 3 for text in many(kind(), batch, texts_of))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(kind: type[Negatives], tokenizer: PreTrainedTokenizerFast) -> None:
    assert kind()(PromptBatch.empty(), tokenizer) == []


def test_each_kind_has_its_name() -> None:
    names = [kind.kind for kind in KINDS]
    assert names == ["hard", "other", "shuffled", "cut", "repetition", "swapped", "refusal", "echo"]


@pytest.mark.parametrize("kind", KINDS)
def test_at_least_one(kind: type[Negatives]) -> None:
    with pytest.raises(LoraGANError, match=f"per_prompt of {kind.__name__} must be at least 1, got 0; remove it"):
        kind(0)


def test_a_list_of_them_in_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--negatives", type=list[Negatives])
    wanted = [
        {"class_path": "lora_gan.discriminator.Refusal", "init_args": {"texts": ["No."]}},
        {"class_path": "lora_gan.discriminator.Echo", "init_args": {"per_prompt": 2}},
    ]
    refusal, echo = parser.instantiate(parser.parse_object({"negatives": wanted})).negatives
    assert isinstance(refusal, Refusal) and refusal.texts == ["No."] and refusal.per_prompt == 1
    assert isinstance(echo, Echo) and echo.per_prompt == 2


def test_your_own_kind(make_batch: Batches, texts_of: Texts) -> None:
    class Upper(MadeUp):
        kind = "upper"

        def _make(self, batch: PromptBatch, b: int, tokenizer: object) -> str | None:
            return batch.targets[b].upper() + "!"

    assert texts_of(Upper(), make_batch(("Q", "abc"))) == [["ABC!"]]


def test_a_kind_that_makes_nothing_is_named_once(
    make_batch: Batches, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    class Shouting(MadeUp):
        kind = "shouting"

        def _make(self, batch: PromptBatch, b: int, tokenizer: object) -> str | None:
            return batch.targets[b].upper()  # accepted, as exact match ignores case

    class Late(Shouting):
        kind = "late"

        def _make(self, batch: PromptBatch, b: int, tokenizer: object) -> str | None:
            return "no" if self.steps else None

    batch = make_batch(("Q", "abc"))
    for kind in (Shouting(), Late()):
        for _ in range(9):
            kind.draw(batch, tokenizer)
    (record,) = caplog.records
    assert "negatives of kind 'shouting': none in the first 3 steps" in record.getMessage()


def test_made_up_texts_are_completions_like_the_target(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = encode_completions(tokenizer, ["<|endoftext|>", ""])
    assert len(first) == len("<|endoftext|>") + 1 and first[-1] == EOS and EOS not in first[:-1]
    assert second == (EOS,)
    assert encode_completions(tokenizer, []) == []


# drawn from the batch


def test_hard_negatives_are_the_examples_own(make_batch: Batches, texts_of: Texts) -> None:
    batch = make_batch(("Q1", "A1", "x"), ("Q2", "A2", "y", "z"), ("Q3", "A3"), ("Q4", "A4"))
    torch.manual_seed(0)
    x, yz, others, _ = texts_of(HardNegatives(2), batch)
    assert x == ["x"] and sorted(yz) == ["y", "z"]
    assert len(others) == 2 and set(others) < {"A1", "A2", "A4"}
    assert texts_of(HardNegatives(1, others=False), batch)[2:] == [[], []]


def test_hard_negatives_are_drawn_by_one_permutation_a_prompt(make_batch: Batches, texts_of: Texts) -> None:
    batch = make_batch(("Q1", "A1", "a", "b", "c", "d"), ("Q2", "A2", "e", "f", "g"))
    torch.manual_seed(5)
    wanted = [[pool[i] for i in torch.randperm(len(pool))[:2].tolist()] for pool in ("abcd", "efg")]
    torch.manual_seed(5)
    assert texts_of(HardNegatives(2), batch) == wanted


def test_a_brought_negative_that_is_right_is_no_negative(make_batch: Batches, texts_of: Texts) -> None:
    batch = make_batch(("Q1", "Paris.", " paris", "Rome"), ("Q2", "Oslo", "OSLO."))
    assert texts_of(HardNegatives(5), batch) == [["Rome"], ["Paris."]]


@pytest.mark.parametrize("kind", [HardNegatives, OtherCompletions])
def test_other_completions_are_of_other_groups(kind: type[Negatives], make_batch: Batches, texts_of: Texts) -> None:
    batch = make_batch(("Q1", "A1"), ("Q2", "A2"), ("Q3", "A3"))
    shared = tuple(replace(example, group=example.group.replace("Q2", "Q1")) for example in batch.examples)
    assert texts_of(kind(5), replace(batch, examples=shared))[:2] == [["A3"], ["A3"]]
    assert texts_of(kind(), make_batch(("Q1", "A1"))) == [[]]


# made from the target


def test_shuffled_words_are_the_same_words(worldwide: PromptBatch, texts_of: Texts) -> None:
    torch.manual_seed(0)
    for row, target in zip(texts_of(ShuffledWords(3), worldwide), TARGETS, strict=True):
        for text in row:
            assert Counter(text) == Counter(target), "code points"
            if " " in target:
                assert Counter(text.split()) == Counter(target.split())


def test_shuffled_words_by_hand(make_batch: Batches, texts_of: Texts) -> None:
    def shuffled(target: str) -> set[str]:
        return many(ShuffledWords(), make_batch(("Q", target)), texts_of, times=60)

    assert shuffled("one  two") == {"two  one"}, "white space stays"
    assert shuffled("ab a b.") == {"ab b. a", "a ab b.", "a b. ab", "b. a ab", "b. ab a"}
    assert shuffled("cat") == {"cta", "act", "atc", "tac", "tca"}
    assert shuffled("我吃") == {"吃我"}
    assert shuffled(f"x{E_ACUTE}") == {f"{E_ACUTE}x"}, "an accent stays on its letter"
    assert shuffled(f"😀{FAMILY}") == {f"{FAMILY}😀"}, "a family stays together"
    assert shuffled("no no no") == shuffled("a") == shuffled("") == shuffled("Aa") == set()


def test_cut_short_by_hand(make_batch: Batches, texts_of: Texts) -> None:
    def cut(target: str) -> set[str]:
        return many(CutShort(), make_batch(("Q", target)), texts_of)

    assert cut("The  cat sat.") == {"The", "The  cat"}
    assert cut("Paris") == {"P", "Pa", "Par", "Pari"}
    assert cut("吃寿司。") == {"吃", "吃寿"}, "without its full stop it would be the target"
    assert cut(f"😀{FAMILY}") == {"😀"}
    assert cut("Hello .") == cut("a") == cut("...") == cut("") == set()


def test_repetition_is_a_loop(make_batch: Batches, texts_of: Texts) -> None:
    """Target of 8 characters: 8 to 24 of them, but at least three times the phrase."""
    loops = many(Repetition(), make_batch(("Q", "a bb cc.")), texts_of, times=200)
    phrases = ["a", "bb", "cc.", "a bb", "bb cc.", "a bb cc.", "Hello world!"]
    found = {text: next(p for p in phrases if not text.replace(p, "").strip()) for text in loops}
    assert set(found.values()) == set(phrases)
    for text, phrase in found.items():
        times = text.count(phrase)
        assert text == " ".join([phrase] * times)
        assert times >= 3 and len(text) >= 8 - 1 - len(phrase) / 2
        assert times == 3 or len(text) <= 24 + len(phrase) / 2


def test_repetition_of_what_has_few_words(make_batch: Batches, texts_of: Texts) -> None:
    def loops(target: str) -> set[str]:
        return many(Repetition(), make_batch(("Q", target)), texts_of)

    classic = "Hello world! Hello world! Hello world!"
    assert loops("") == {classic}
    assert loops("Paris") == {classic, "Paris Paris Paris"}
    assert loops("吃") == {classic, "吃吃吃"}
    assert loops("👍🏽") == {classic, "👍🏽 👍🏽 👍🏽"}


def test_a_number_is_swapped(make_batch: Batches, texts_of: Texts) -> None:
    def swapped(target: str) -> set[str]:
        return many(Swapped(), make_batch(("Q", target)), texts_of, times=200)

    assert swapped("It is 7.") == {f"It is {n}." for n in "012345689"}
    tens, ones = {f"{d}2" for d in "2346789"} | {"52"}, {f"1{d}" for d in "013456789"}
    assert swapped("12") == tens | ones
    assert all(text[:2] == "19" and text != "1912" and len(text) == 4 for text in swapped("1912"))
    assert swapped("٣") == set("٠١٢٤٥٦٧٨٩"), "in its own digits"


def test_a_name_is_swapped(make_batch: Batches, texts_of: Texts) -> None:
    batch = make_batch(
        ("Q1", "The capital of New Zealand is Wellington. Here I stay."),
        ("Q2", 'Berlin is in "Germany".'),
        ("Q3", "The river near Wellington is long. There it is."),
    )
    torch.manual_seed(0)
    assert many(Swapped(), batch, texts_of) == {
        "The capital of Germany is Wellington. Here I stay.",
        "The capital of New Zealand is Germany. Here I stay.",
    }


def test_nothing_to_swap(make_batch: Batches, texts_of: Texts) -> None:
    lonely = make_batch(("Q", "They met in Paris."))
    assert texts_of(Swapped(), lonely) == [[]], "no other name"
    beginnings = make_batch(("Q", "Paris. Rome! I do"), ("Q", "we saw Oslo"))
    assert texts_of(Swapped(), beginnings)[0] == [], "capitals only where sentences begin"


def test_an_accepted_name_is_not_swapped_in(make_batch: Batches, texts_of: Texts) -> None:
    batch = make_batch(("Q", "They speak Urdu"), ("Q2", "They speak English"), ("Q3", "They speak Thai"))
    example = replace(batch.examples[0], references=("They speak Urdu", "English."))
    batch = replace(batch, examples=(example, *batch.examples[1:]))
    assert many(Swapped(), batch, texts_of) == {"They speak Thai"}


# made of something else


def test_refusals(make_batch: Batches, texts_of: Texts) -> None:
    batch = make_batch(("Q", "I cannot help with that!"), ("Q2", "No."))
    assert len(many(Refusal(), batch, texts_of)) == 6
    assert many(Refusal(3, texts=["Never.", "Nein."]), batch, texts_of) == {"Never.", "Nein."}
    assert texts_of(Refusal(texts=["No"]), batch) == [["No"], []]


@pytest.mark.parametrize("texts", [[], ["No.", " "]])
def test_refusals_need_texts(texts: list[str]) -> None:
    with pytest.raises(LoraGANError, match="texts of Refusal must be one or more non-empty strings"):
        Refusal(texts=texts)


@pytest.mark.parametrize(
    ("prompt", "echoes"),
    [
        ("### Prompt:\nWhat is 2 # 3?\nSay it.\n\n### Response:\n", ["What is 2 # 3?\nSay it."]),
        ("### Prompt: Who?\n### Response:", ["Who?"]),
        ("### Instruction\nWho?\n### Response\n", ["Who?"]),
        ("Who? ", ["Who?"]),
        ("谁？😀", ["谁？😀"]),
        ("<|endoftext|>Who?", ["Who?"]),
        ("### Prompt:\n\n### Response:\n", []),
        ("Yes", []),
        ("", []),
    ],
)
def test_echo_by_hand(prompt: str, echoes: list[str], make_batch: Batches, texts_of: Texts) -> None:
    assert texts_of(Echo(2), make_batch((prompt, "yes."))) == [echoes]
