"""Overlap rewards: compare the words or letters of completion and references; the best reference counts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from sacrebleu.metrics import BLEU, CHRF
from torch import Tensor

from lora_gan.rewards.base import Reward, references_of
from lora_gan.text_metrics import ROUGE, contains, matches, rouge_scorer, words
from lora_gan.types import PromptBatch, RewardContext


class ReferenceReward(Reward):
    """Compares one completion with its references; 0 without references."""

    needs_target = True

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        references = [references_of(example) for example in batch.examples]
        scored = [
            self._score(completion, references[n // context.num_generations])
            for n, completion in enumerate(completions)
        ]
        return torch.tensor(scored, dtype=torch.float32)

    def _score(self, completion: str, references: Sequence[str]) -> float:
        return self.compare(completion, references) if references else 0.0

    @abstractmethod
    def compare(self, completion: str, references: Sequence[str]) -> float:
        """The score of one completion against at least one reference."""


class BleuReward(ReferenceReward):
    """Sentence BLEU-4 (Papineni et al. 2002) by sacrebleu: exponential smoothing, effective order; in [0, 1].

    Args:
        weight: Factor in the total reward.
        tokenize: Tokenizer of sacrebleu: 13a; zh, char or another for languages written without spaces.
        name: Name in the logs, ``reward/<name>``.
    """

    def __init__(self, weight: float = 1.0, tokenize: str = "13a", name: str = "bleu") -> None:
        super().__init__(weight, name)
        self.bleu = BLEU(effective_order=True, tokenize=tokenize)

    def compare(self, completion: str, references: Sequence[str]) -> float:
        return min(float(self.bleu.sentence_score(completion, references).score) / 100, 1.0)


class RougeReward(ReferenceReward):
    """ROUGE F1 (Lin 2004) by rouge-score over words of any script, without stemming; in [0, 1].

    Args:
        kind: rouge_1 (words), rouge_2 (pairs of words) or rouge_l (longest common subsequence).
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``; by default the kind.
    """

    def __init__(
        self, kind: Literal["rouge_1", "rouge_2", "rouge_l"] = "rouge_l", weight: float = 1.0, name: str | None = None
    ) -> None:
        super().__init__(weight, name or kind)
        self.kind = kind

    def compare(self, completion: str, references: Sequence[str]) -> float:
        scorer = rouge_scorer(self.kind)
        return float(scorer.score_multi(references, completion)[ROUGE[self.kind]].fmeasure)


class MeteorReward(ReferenceReward):
    """METEOR (Lavie and Agarwal 2007) by nltk over words of any script, in [0, 1).

    Words match if they or their English stems are equal. Synonyms are left out: nltk would have to download WordNet.
    The penalty for fragments gives two equal one-word texts 0.5.

    Args:
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``.
    """

    def __init__(self, weight: float = 1.0, name: str = "meteor") -> None:
        super().__init__(weight, name)

    @cached_property
    def _meteor(self) -> Any:
        from nltk.translate.meteor_score import meteor_score  # here, because the import takes a second

        return meteor_score

    def compare(self, completion: str, references: Sequence[str]) -> float:
        return float(self._meteor([words(r) for r in references], words(completion), wordnet=_NoSynonyms()))


class _NoSynonyms:
    """Replaces WordNet, which nltk asks for synonyms."""

    def synsets(self, word: str) -> list[Any]:
        return []


class ChrfReward(ReferenceReward):
    """chrF2 (Popović 2015) by sacrebleu: F-score of letter n-grams up to 6, for any script; in [0, 1].

    Args:
        weight: Factor in the total reward.
        word_order: Length of the longest word n-grams that also count: 0 for chrF, 2 for chrF++.
        name: Name in the logs, ``reward/<name>``.
    """

    def __init__(self, weight: float = 1.0, word_order: int = 0, name: str = "chrf") -> None:
        super().__init__(weight, name)
        self.chrf = CHRF(word_order=word_order)

    def compare(self, completion: str, references: Sequence[str]) -> float:
        return min(float(self.chrf.sentence_score(completion, references).score) / 100, 1.0)


class ExactReward(ReferenceReward):
    """1 if the completion equals a reference, ignoring case, outer white space and a final full stop, else 0.

    Args:
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``.
    """

    def __init__(self, weight: float = 1.0, name: str = "exact") -> None:
        super().__init__(weight, name)

    def compare(self, completion: str, references: Sequence[str]) -> float:
        return float(matches(completion, references))


class ContainsReward(ReferenceReward):
    """1 if the completion contains the words of a reference in a row, ignoring case and punctuation, else 0.

    Beware: a completion that lists everything contains everything. Combine it with a length reward.

    Args:
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``.
    """

    def __init__(self, weight: float = 1.0, name: str = "contains") -> None:
        super().__init__(weight, name)

    def compare(self, completion: str, references: Sequence[str]) -> float:
        return float(any(contains(completion, reference) for reference in references))
