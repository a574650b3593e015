"""Text metrics of a set of completions: pure functions, in [0, 1] unless stated otherwise."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import regex
import torch
from sacrebleu.metrics import BLEU
from torch import Tensor

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}"  # no spaces: each character is a word
WORD = rf"[{UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}_]--[{UNSPACED}]]+|\p{{So}}"
WORDS = regex.compile(rf"(?V1){WORD}")
PIECES = regex.compile(rf"(?V1){WORD}|\S")
ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}  # our name → rouge-score's
BLEU_ORDER = 4
LONGEST_WORD = 24  # letters; longer words are split into letters, so that "aaaa…" counts as repetition
LONGEST_UNIT = 16  # pieces in the unit of a loop


def words(text: str) -> list[str]:
    """Words of any script in lower case, and emoji; rouge-score's own tokenizer finds only a–z and 0–9."""
    return list(WORDS.findall(unicodedata.normalize("NFKC", text).lower()))


def pieces(text: str) -> list[str]:
    """Words and all other symbols; very long words are split into letters."""
    found = PIECES.findall(unicodedata.normalize("NFKC", text).lower())
    return [piece for word in found for piece in (word if len(word) > LONGEST_WORD else [word])]


@cache
def rouge_scorer(*kinds: str) -> RougeScorer:
    """rouge-score's scorer of the given kinds, such as "rouge_1", over words of any script."""
    from rouge_score.rouge_scorer import RougeScorer  # here, because it imports nltk, which takes a second

    return RougeScorer([ROUGE[kind] for kind in kinds], tokenizer=_Words())


class _Words:
    """Tokenizer for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


# completions against targets


def exact_match(completions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of completions equal to one of their references, ignoring case, outer white space and a final full stop."""
    return _mean([float(matches(a, refs)) for a, refs in zip(completions, references, strict=True)])


def matches(completion: str, references: Iterable[str]) -> bool:
    """Whether the completion equals one of the references, as in :func:`exact_match`."""
    return normalise(completion) in {normalise(reference) for reference in references}


def normalise(text: str) -> str:
    """The form of a text that exact match compares."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()


def contains(completion: str, phrase: str) -> bool:
    """Whether the completion contains the words of ``phrase`` in a row; False if ``phrase`` has no words."""
    text, part = words(completion), words(phrase)
    return bool(part) and any(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


def bleu(completions: Sequence[str], targets: Sequence[str]) -> float:
    """Corpus BLEU (Papineni et al. 2002) by sacrebleu with its defaults, divided by 100.

    Raises:
        ValueError: The numbers of completions and targets differ.
    """
    if len(completions) != len(targets):
        raise ValueError(
            f"need one target for each completion, got {len(completions)} completions and {len(targets)} targets"
        )
    return float(BLEU(force=True).corpus_score(completions, [targets]).score) / 100 if completions else 0.0


def rouge(completions: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Mean ROUGE-1, -2 and -L F1 (Lin 2004) of completion and target, by rouge-score."""
    scorer = rouge_scorer(*ROUGE)
    scores = [scorer.score(target, completion) for completion, target in zip(completions, targets, strict=True)]
    return {name: _mean([score[kind].fmeasure for score in scores]) for name, kind in ROUGE.items()}


def rouge_l(completions: Sequence[str], targets: Sequence[str]) -> float:
    """Mean ROUGE-L F1 (Lin 2004, longest common subsequence of words) of completion and target, by rouge-score."""
    return rouge(completions, targets)["rouge_l"]


def bert_score(completions: Sequence[str], targets: Sequence[str], model: str, batch_size: int = 32) -> float:
    """Mean BERTScore F1 (Zhang et al. 2020) from the model's last layer, neither idf-weighted nor rescaled; in [−1, 1].

    Each token is matched with the most similar one of the other text; special tokens are left out. An empty completion
    or target scores 0. (torchmetrics 1.9 sorts completions and targets by length separately, which pairs them wrongly.)
    """
    found = _token_vectors([*completions, *targets], model, batch_size)
    pairs = zip(found[: len(completions)], found[len(completions) :], strict=True)
    return _mean([_matched_f1(completion @ target.T) for completion, target in pairs])


def _matched_f1(similarity: Tensor) -> float:
    """(completion tokens, target tokens) cosines → harmonic mean of the rows' and the columns' mean best match."""
    if similarity.numel() == 0:
        return 0.0
    precision, recall = float(similarity.amax(1).mean()), float(similarity.amax(0).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _token_vectors(texts: Sequence[str], model: str, batch_size: int) -> list[Tensor]:
    """Unit vectors (tokens, H) of each text, without special tokens."""
    tokenizer, encoder = _token_encoder(model)
    limit = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    found: list[Tensor] = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]),
            padding=True,
            truncation=True,
            max_length=limit,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        ordinary = batch.pop("special_tokens_mask") == 0
        with torch.no_grad():
            hidden = encoder(**batch).last_hidden_state
        unit = torch.nn.functional.normalize(hidden, dim=-1)
        found += [vectors[kept] for vectors, kept in zip(unit, ordinary, strict=True)]
    return found


@cache
def _token_encoder(model: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    return AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()


# diversity of completions


def distinct_n(completions: Sequence[str], n: int) -> float:
    """Distinct word n-grams of all completions divided by all their n-grams (Li et al. 2016); 0 if there are none."""
    grams = _all_grams(completions, n)
    return len(set(grams)) / max(len(grams), 1)


def ngram_entropy(completions: Sequence[str], n: int) -> float:
    """Entropy in nats of the word n-grams of all completions (Zhang et al. 2018); 0 if there are none."""
    return entropy(_all_grams(completions, n))


def entropy(things: Iterable[Any]) -> float:
    """Entropy in nats of the relative frequencies of equal items."""
    counts = np.array([*Counter(things).values()], dtype=float)
    shares = counts / counts.sum()
    return abs(float(-(shares * np.log(shares)).sum()))


def self_bleu(completions: Sequence[str]) -> float:
    """Mean sentence BLEU-4 of each completion against all others (Zhu et al. 2018): 1 if all are equal.

    Words of any script, exponential smoothing, effective order; 0 for fewer than two completions. An n-gram's largest
    count among the *others* follows from its two largest counts, so the time is linear in the words, not in the pairs.
    """
    counted = [_counts(words(completion)) for completion in completions]
    best = _two_largest(counted)
    lengths = Counter(sum(counts[0].values()) for counts in counted)
    scores = []
    for owner, counts in enumerate(counted):
        length = sum(counts[0].values())
        clipped = [sum(min(c, best[g].among_others(owner)) for g, c in of_order.items()) for of_order in counts]
        totals = [sum(of_order.values()) for of_order in counts]
        closest = _closest(length, lengths - Counter([length]))
        scores.append(BLEU.compute_bleu(clipped, totals, length, closest, "exp", effective_order=True).score / 100)
    return min(_mean(scores), 1.0) if len(completions) > 1 else 0.0


class _Largest:
    """The two largest counts of an n-gram in different completions, and which completion has the largest."""

    def __init__(self) -> None:
        self.owner, self.first, self.second = -1, 0, 0

    def add(self, owner: int, count: int) -> None:
        if count > self.first:
            self.owner, self.first, self.second = owner, count, self.first
        else:
            self.second = max(self.second, count)

    def among_others(self, owner: int) -> int:
        return self.second if owner == self.owner else self.first


def _two_largest(counted: Sequence[Sequence[Counter[tuple[str, ...]]]]) -> dict[tuple[str, ...], _Largest]:
    best: dict[tuple[str, ...], _Largest] = {}
    for owner, counts in enumerate(counted):
        for of_order in counts:
            for gram, count in of_order.items():
                best.setdefault(gram, _Largest()).add(owner, count)
    return best


def _closest(length: int, lengths: Counter[int]) -> int:
    """The length closest to ``length``; of two, the shorter."""
    return min(lengths, key=lambda other: (abs(other - length), other), default=0)


def repetition(text: str, n: int = 3, loop: int = 4) -> float:
    """Share of a text that is repetition: the larger of two shares.

    The first is the share of n-grams (n ≥ 2) that occurred before. The second is the share of words and symbols in the
    longest loop: a unit of up to 16 of them, repeated in a row at least ``loop`` times (≥ 3).
    """
    read = pieces(text)
    if len(set(_grams(read, 2))) == len(read) - 1:
        return 0.0
    grams = _grams(read, n)
    again = 1 - len(set(grams)) / len(grams) if grams else 0.0
    return max(again, _looped(read, loop) / max(len(read), 1))


def _looped(read: Sequence[str], loop: int) -> int:
    """Number of pieces in the longest loop, without its first unit."""
    codes = np.unique(np.array(read, dtype=object), return_inverse=True)[1] if read else np.zeros(0)
    longest = 0
    for period in range(1, min(LONGEST_UNIT, len(read) // loop) + 1):
        differs = np.flatnonzero(codes[period:] != codes[:-period])
        run = int(np.diff(differs, prepend=-1, append=len(read) - period).max()) - 1
        if run >= (loop - 1) * period:
            longest = max(longest, run)
    return longest


# sets of embeddings


def mmd(completions: Tensor, targets: Tensor) -> float:
    """Squared maximum mean discrepancy (Gretton et al. 2012, biased) of embeddings (n, H) and (m, H), in [0, 2].

    Gaussian kernel exp(−d² / s), where s is the median squared distance between two targets, so that values of one
    split are comparable during a run. 0 for equal sets.
    """
    if not len(completions) or not len(targets):
        return 0.0
    x, y = completions.double(), targets.double()
    between = torch.pdist(y).square()
    scale = float(between.median()) if len(between) else 0.0

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (-torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square() / (scale or 1.0)).exp().mean()

    return max(float(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)), 0.0)


def _all_grams(completions: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [gram for completion in completions for gram in _grams(words(completion), n)]


def _counts(read: Sequence[str]) -> list[Counter[tuple[str, ...]]]:
    """Counts of the n-grams, for n from 1 to 4."""
    return [Counter(_grams(read, n)) for n in range(1, BLEU_ORDER + 1)]


def _grams(read: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(read[i:] for i in range(n)), strict=False))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(len(values), 1)
