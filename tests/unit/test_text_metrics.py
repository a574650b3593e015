"""Text metrics, worked by hand."""

from __future__ import annotations

import math
import random
import time

import pytest
import torch

from lora_gan.sentence_encoder import bundled_minilm
from lora_gan.text_metrics import (
    bert_score,
    bleu,
    distinct_n,
    entropy,
    exact_match,
    mmd,
    ngram_entropy,
    normalise,
    pieces,
    repetition,
    rouge,
    rouge_l,
    self_bleu,
    words,
)

ANY = [
    "the cat sat on the mat",
    "",
    "Paris",
    "привет мир привет",
    "東京 です",
    "😀 😀 hello",
    "the cat sat on a mat again",
]


@pytest.mark.parametrize(
    ("completion", "reference", "same"),
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
def test_exact_match(completion: str, reference: str, same: bool) -> None:
    assert exact_match([completion], [[reference]]) == float(same)


def test_any_reference_will_do() -> None:
    assert exact_match(["Rome", "Oslo", "Bern"], [["Paris", "Rome."], ["Paris"], []]) == pytest.approx(1 / 3)
    assert normalise("  A  b . ") == "a b"


def test_every_completion_needs_references() -> None:
    with pytest.raises(ValueError):
        exact_match(["a", "b"], [["a"]])
    with pytest.raises(ValueError):
        rouge_l(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("completion", "target", "f1"),
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
def test_rouge_l(completion: str, target: str, f1: float) -> None:
    assert rouge_l([completion], [target]) == pytest.approx(f1)


def test_rouge_l_is_the_mean_over_completions() -> None:
    assert rouge_l(["a b c", "x"], ["a x b y", "x"]) == pytest.approx((4 / 7 + 1) / 2)


def test_distinct_n_by_hand() -> None:
    """Words a b a b | a b: 6 unigrams of 2 kinds; bigrams ab ba ab | ab: 4 of 2 kinds, none across completions."""
    completions = ["a b a b", "A, b!"]
    assert distinct_n(completions, 1) == pytest.approx(2 / 6)
    assert distinct_n(completions, 2) == pytest.approx(2 / 4)
    assert distinct_n(completions, 3) == pytest.approx(2 / 2)
    assert distinct_n(completions, 5) == 0.0
    assert distinct_n(["", "!"], 1) == 0.0


def test_no_completions_score_zero() -> None:
    assert exact_match([], []) == rouge_l([], []) == distinct_n([], 1) == bleu([], []) == 0.0
    assert rouge([], []) == {"rouge_1": 0.0, "rouge_2": 0.0, "rouge_l": 0.0}
    assert ngram_entropy([], 1) == ngram_entropy(["a"], 2) == self_bleu([]) == self_bleu(["a"]) == 0.0


# BLEU and ROUGE


def test_bleu_equals_nltk() -> None:
    from nltk.translate.bleu_score import corpus_bleu

    completions = ["the cat sat on a mat", "there is a dog in the garden today", "one two three four five"]
    targets = ["the cat sat on the mat today", "there is a dog in our garden", "one two three four six"]
    wanted = corpus_bleu([[target.split()] for target in targets], [completion.split() for completion in completions])
    assert bleu(completions, targets) == pytest.approx(wanted, abs=1e-6)
    assert bleu(targets, targets) == pytest.approx(1)
    assert bleu(["", "x"], ["a b c d", ""]) == 0
    assert bleu(["東京 は 日本 の 首都", "👍 😀 🎉 🐈"], ["東京 は 日本 の 首都", "👍 😀 🎉 🐈"]) == pytest.approx(1)
    with pytest.raises(ValueError, match="2 completions and 1 targets"):
        bleu(["a", "b"], ["a"])


def test_rouge_by_hand() -> None:
    """ "a b c" and "a x b y": 4/7, 0, 4/7; "b c d" and "b c": 4/5, 2/3, 4/5."""
    assert rouge(["a b c", "b c d"], ["a x b y", "b c"]) == pytest.approx(
        {"rouge_1": (4 / 7 + 4 / 5) / 2, "rouge_2": (0 + 2 / 3) / 2, "rouge_l": (4 / 7 + 4 / 5) / 2}
    )


# variety


def test_entropy_by_hand() -> None:
    """Pairs of words ab, ba, ab | ab: ¾ and ¼."""
    assert ngram_entropy(["a b a b", "A, b!"], 2) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert ngram_entropy(["a b c d"], 1) == pytest.approx(math.log(4))
    assert ngram_entropy(["a a a"], 1) == 0
    assert entropy("") == 0


def test_self_bleu_equals_sacrebleu() -> None:
    """One sentence BLEU for each completion, all others as its references, on the same words."""
    from sacrebleu.metrics import BLEU

    random.seed(1)
    drawn = [" ".join(random.choices("abcde", k=random.randint(0, 9))) for _ in range(25)]
    for completions in (drawn, ANY):
        read = [" ".join(words(completion)) for completion in completions]
        by_library = BLEU(effective_order=True, tokenize="none")
        scores = [by_library.sentence_score(one, read[:i] + read[i + 1 :]).score for i, one in enumerate(read)]
        assert self_bleu(completions) == pytest.approx(sum(scores) / len(scores) / 100, abs=1e-9)


def test_self_bleu_at_its_ends() -> None:
    assert self_bleu(["the same completion every time"] * 5) == pytest.approx(1)
    assert self_bleu(["a b c", "d e f", "😀", "東京"]) == 0


def test_self_bleu_of_many_completions_is_fast() -> None:
    """500 completions of 60 words, 250,000 pairs."""
    random.seed(0)
    completions = [" ".join(random.choices([str(n) for n in range(2000)], k=60)) for _ in range(500)]
    start = time.process_time()
    self_bleu(completions)
    assert time.process_time() - start < 5


def test_pieces_and_repetition() -> None:
    assert pieces("Hi, 東京!") == ["hi", ",", "東", "京", "!"]
    assert pieces("x" * 25) == ["x"] * 25
    assert [repetition(text) for text in ANY] == [0] * len(ANY)
    assert repetition("a b c a b c") == pytest.approx(1 / 4)


# sets of embeddings


def test_mmd_by_hand() -> None:
    """Points {0} and {0, 1}, median squared distance 1: 1 + (2 + 2/e)/4 − 2·(1 + 1/e)/2 = ½ − 1/2e."""
    assert mmd(torch.tensor([[0.0]]), torch.tensor([[0.0], [1.0]])) == pytest.approx(0.5 - 0.5 / math.e)
    assert mmd(torch.zeros(0, 2), torch.ones(3, 2)) == 0
    assert mmd(torch.zeros(1, 2), torch.ones(1, 2)) == pytest.approx(2 - 2 * math.exp(-2)), "one target: scale 1"


def test_mmd_equals_scikit_learn() -> None:
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    torch.manual_seed(0)
    x, y = torch.randn(20, 8), torch.randn(30, 8) + 0.5
    gamma = 1 / float(torch.pdist(y.double()).square().median())
    blocks = [pairwise.rbf_kernel(a.double().numpy(), b.double().numpy(), gamma) for a, b in ((x, x), (y, y), (x, y))]
    assert mmd(x, y) == pytest.approx(blocks[0].mean() + blocks[1].mean() - 2 * blocks[2].mean(), abs=1e-9)
    assert mmd(y, y[torch.randperm(30)]) == pytest.approx(0, abs=1e-9)
    assert mmd(x, y) > mmd(x, x + 0.1)


# BERTScore


def test_bert_score_equals_torchmetrics() -> None:
    """Pair by pair, because torchmetrics mixes up the pairs of a batch."""
    from torchmetrics.functional.text.bert import bert_score as by_torchmetrics

    model = str(bundled_minilm())
    completions = ["Paris is France's capital.", "no", "東京 😀", "the cat sat on the mat for a long time"]
    targets = ["The capital of France is Paris.", "yes", "京都 😃", "the cat sat"]
    wanted = [
        float(by_torchmetrics([completion], [target], model_name_or_path=model)["f1"])
        for completion, target in zip(completions, targets, strict=True)
    ]
    found = [bert_score([completion], [target], model) for completion, target in zip(completions, targets, strict=True)]
    assert found == pytest.approx(wanted, abs=1e-5)
    assert bert_score(completions, targets, model, batch_size=3) == pytest.approx(sum(wanted) / 4, abs=1e-5)
    assert bert_score(["", "a"], ["a", ""], model) == bert_score([], [], model) == 0
    assert bert_score(["same"], ["same"], model) == pytest.approx(1, abs=1e-5)
