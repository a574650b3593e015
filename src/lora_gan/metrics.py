"""Text metrics of a set of answers: pure functions, each in [0, 1]."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import regex
from rouge_score.rouge_scorer import RougeScorer

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}"  # written without spaces: each sign is a word
WORDS = regex.compile(rf"(?V1)[{UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}_]--[{UNSPACED}]]+|\p{{So}}")


class _Words:
    """Words of any script, and emoji; rouge-score's own tokeniser knows only a–z and 0–9."""

    def tokenize(self, text: str) -> list[str]:
        return list(WORDS.findall(unicodedata.normalize("NFKC", text).lower()))


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of answers equal to one of their references, but for case, outer white space and a final full stop."""
    hits = (normalise(a) in {normalise(r) for r in refs} for a, refs in zip(answers, references, strict=True))
    return _mean([float(hit) for hit in hits])


def normalise(text: str) -> str:
    """What exact match compares."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()


def rouge_l(answers: Sequence[str], targets: Sequence[str]) -> float:
    """Mean ROUGE-L F1 (Lin 2004, longest common subsequence of words) of answer and target, by rouge-score."""
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return _mean([scorer.score(t, a)["rougeL"].fmeasure for a, t in zip(answers, targets, strict=True)])


def distinct_n(answers: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams of all answers together (Li et al. 2016); 0 where there are none."""
    words = [_Words().tokenize(answer) for answer in answers]
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
