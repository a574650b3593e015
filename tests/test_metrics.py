"""Text metrics, worked by hand."""

from __future__ import annotations

import pytest

from lora_gan.metrics import distinct_n, exact_match, normalise, rouge_l


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("Paris", "Paris", True),
        (" paris. ", "Paris", True),
        ("PARIS", "paris.", True),
        ("New \n York", "new york", True),
        ("Paris!", "Paris", False),
        ("Paris..", "Paris", False),  # one full stop only
        ("The capital is Paris", "Paris", False),
        ("", "", True),
        ("", "Paris", False),
        ("😀", "😀", True),
        ("😀", "😃", False),
        ("STRASSE", "Straße", True),
        ("ＡＢＣ", "abc", True),  # full-width letters
        ("e\u0301t\u00e9", "\u00e9te\u0301", True),  # composed and decomposed accents
        ("МОСКВА", "Москва", True),
        ("東京", "東京", True),
    ],
)
def test_exact_match(answer: str, reference: str, same: bool) -> None:
    assert exact_match([answer], [[reference]]) == float(same)


def test_any_reference_will_do() -> None:
    assert exact_match(["Rome", "Oslo", "Bern"], [["Paris", "Rome."], ["Paris"], []]) == pytest.approx(1 / 3)
    assert normalise("  A  b . ") == "a b"


def test_every_answer_needs_references() -> None:
    with pytest.raises(ValueError):
        exact_match(["a", "b"], [["a"]])
    with pytest.raises(ValueError):
        rouge_l(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("answer", "target", "f1"),
    [
        ("the cat sat on mat", "the cat on the mat", 4 / 5),  # "the cat on mat": P = R = 4/5
        ("a b c", "a x b y", 4 / 7),  # "a b": P = 2/3, R = 2/4
        ("b a", "a b", 1 / 2),  # order matters
        ("Hello, World!", "hello world", 1.0),
        ("", "hello", 0.0),
        ("hello", "", 0.0),
        ("", "", 0.0),
        ("😀 hello", "hello 😃", 0.5),  # an emoji is a word
        ("привет мир", "Привет, Мир!", 1.0),  # rouge-score's own tokeniser sees nothing here
        ("été doux", "e\u0301te\u0301 chaud", 1 / 2),
        ("東京 です", "東京 でした", 2 / 3),
    ],
)
def test_rouge_l(answer: str, target: str, f1: float) -> None:
    assert rouge_l([answer], [target]) == pytest.approx(f1)


def test_rouge_l_is_the_mean_over_answers() -> None:
    assert rouge_l(["a b c", "x"], ["a x b y", "x"]) == pytest.approx((4 / 7 + 1) / 2)


def test_distinct_n_by_hand() -> None:
    """Words a b a b | a b: 6 unigrams of 2 kinds; bigrams ab ba ab | ab: 4 of 2 kinds, none across answers."""
    answers = ["a b a b", "A, b!"]
    assert distinct_n(answers, 1) == pytest.approx(2 / 6)
    assert distinct_n(answers, 2) == pytest.approx(2 / 4)
    assert distinct_n(answers, 3) == pytest.approx(2 / 2)
    assert distinct_n(answers, 5) == 0.0
    assert distinct_n(["", "!"], 1) == 0.0


def test_no_answers_score_zero() -> None:
    assert exact_match([], []) == rouge_l([], []) == distinct_n([], 1) == 0.0
