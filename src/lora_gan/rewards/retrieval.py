"""Retrieval reward: truth according to a corpus of passages; it needs no target."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import regex
import torch
from torch import Tensor

from lora_gan.errors import DataError, LoraGANError
from lora_gan.rewards.base import Reward
from lora_gan.rewards.model import Classifier
from lora_gan.sentence_encoder import MINILM, sentence_encoder
from lora_gan.text_metrics import words
from lora_gan.types import PromptBatch, RewardContext

HEADINGS = regex.compile(r"(?m)^#+ .*:\s*$")  # such as "### Response:" in a prompt template


@dataclass(frozen=True)
class Claim:
    """A completion to verify, with its question."""

    question: str
    completion: str

    @property
    def text(self) -> str:
        return f"{self.question} {self.completion}"


@dataclass(frozen=True)
class Evidence:
    """Passages found for a completion, and the verdict."""

    completion: str
    passages: tuple[str, ...]  # most similar first
    similarity: tuple[float, ...]
    verdict: float  # −1 contradicted … 0 not covered … 1 supported


class PassageVerifier(ABC):
    """Decides whether passages support or contradict claims."""

    def read(self, corpus: Sequence[str]) -> None:  # noqa: B027 — optional
        """Read the whole corpus; called once, before the first claim."""

    @abstractmethod
    def __call__(self, claims: Sequence[Claim], passages: Sequence[str], device: torch.device) -> Tensor:
        """Verdicts (N,) from −1, contradicted, to 1, supported; 0 if the passage decides nothing."""


class AddedWords(PassageVerifier):
    """Share of the words added by the completion to its question that the passage contains, weighted by rarity.

    The verdict is 2 · share − 1 if the passage is about the question, else 0. Synonyms and negation are not recognised.

    Args:
        about: Smallest share of the question's words, weighted by rarity, in a passage that is about the question;
            words missing from the corpus do not count.
    """

    def __init__(self, about: float = 0.7) -> None:
        if not 0 <= about <= 1:
            raise LoraGANError(f"about must be in [0, 1], got {about}")
        self.about = about
        self._passages = 0
        self._found: Counter[str] = Counter()

    def read(self, corpus: Sequence[str]) -> None:
        self._passages = len(corpus)
        self._found = Counter(word for passage in corpus for word in set(words(passage)))

    def __call__(self, claims: Sequence[Claim], passages: Sequence[str], device: torch.device) -> Tensor:
        verdicts = [self._verify(claim, set(words(passage))) for claim, passage in zip(claims, passages, strict=True)]
        return torch.tensor(verdicts, dtype=torch.float32)

    def _verify(self, claim: Claim, passage: set[str]) -> float:
        asked = set(words(claim.question))
        added = set(words(claim.completion)) - asked
        known = {word for word in asked if word in self._found}
        if not added or (known and self._share(known, passage) < self.about):
            return 0.0
        return 2 * self._share(added, passage) - 1

    def _share(self, some: Iterable[str], passage: set[str]) -> float:
        rarity = {word: math.log((self._passages + 2) / (self._found[word] + 1)) for word in some}
        return sum(rarity[word] for word in rarity if word in passage) / sum(rarity.values())


class Entailment(PassageVerifier):
    """Probability of entailment minus that of contradiction, by a natural language inference model.

    Args:
        model: Hub id or local folder of a sequence-classification model with these two labels.
        entailment: Its label for "the passage implies the claim".
        contradiction: Its label for "the passage excludes the claim".
        batch_size: Claims per forward pass.
    """

    def __init__(
        self,
        model: str,
        entailment: str = "entailment",
        contradiction: str = "contradiction",
        batch_size: int = 32,
    ) -> None:
        self.classifier = Classifier(model, batch_size)
        self.entailment = entailment
        self.contradiction = contradiction

    def __call__(self, claims: Sequence[Claim], passages: Sequence[str], device: torch.device) -> Tensor:
        probabilities = self.classifier.logits(passages, [claim.text for claim in claims], device).softmax(-1)
        yes, no = (self.classifier.index_of(label) for label in (self.entailment, self.contradiction))
        return probabilities[:, yes] - probabilities[:, no]


class RetrievalReward(Reward):
    """Verdict on the completion by the nearest passage of a local corpus, times its similarity, in [−1, 1].

    The nearest passage has the sentence embedding most similar to that of question and completion together. The reward
    is 0 for an empty completion and if no passage is near. ``evidence`` holds the passages found in the latest call;
    ``lora_gan.callbacks.TextMetrics`` shows them at every validation.

    On the built-in world, with its statements as corpus, the default verifier scores true completions above false ones
    in 0.99 of the pairs. If the corpus lacks the fact, it gives 0 in six of ten cases and guesses in the others.

    Args:
        corpus: File of passages: .txt with one per line, or .jsonl with a field "text".
        verifier: Decides between supported and contradicted; by default :class:`AddedWords`.
        least: Smallest cosine similarity of a passage that is near.
        top: Number of passages kept as evidence.
        weight: Factor in the total reward.
        model: Sentence-transformers model: all-MiniLM-L6-v2 (works offline), another hub id, or a local folder.
        name: Name in the logs, ``reward/<name>``.
    """

    def __init__(
        self,
        corpus: str,
        verifier: PassageVerifier | None = None,
        least: float = 0.4,
        top: int = 3,
        weight: float = 1.0,
        model: str = MINILM,
        name: str = "retrieval",
    ) -> None:
        super().__init__(weight, name)
        if top < 1:
            raise LoraGANError(f"top must be at least 1, got {top}")
        self.passages = read_passages(corpus)
        self.verifier = verifier or AddedWords()
        self.verifier.read(self.passages)
        self.least = least
        self.top = min(top, len(self.passages))
        self.model = model
        self.evidence: tuple[Evidence, ...] = ()

    @cached_property
    def index(self) -> Tensor:
        """Unit vectors of the passages, (passages, H)."""
        return sentence_encoder(self.model).encode(self.passages, keep=True)

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        if not completions:
            return torch.zeros(0)
        questions = [" ".join(HEADINGS.sub("", example.prompt).split()) for example in batch.examples]
        claims = [
            Claim(questions[n // context.num_generations], completion) for n, completion in enumerate(completions)
        ]
        cosines = sentence_encoder(self.model).encode([claim.text for claim in claims]) @ self.index.T
        near, which = cosines.topk(self.top)
        best = [self.passages[i] for i in which[:, 0].tolist()]
        verdicts = self.verifier(claims, best, context.logprobs.device).cpu()
        there = torch.tensor([bool(completion.strip()) for completion in completions]) & (near[:, 0] >= self.least)
        scores = torch.where(there, verdicts * near[:, 0], 0.0).clamp(-1, 1)
        found = zip(completions, which.tolist(), near.tolist(), scores.tolist(), strict=True)
        self.evidence = tuple(
            Evidence(completion, tuple(self.passages[i] for i in rows), tuple(similarity), score)
            for completion, rows, similarity, score in found
        )
        return scores


def read_passages(path: str) -> tuple[str, ...]:
    """Read the passages of a .txt (one per line) or .jsonl (field "text") file, without empty and repeated ones.

    Raises:
        DataError: There is no such file, it is malformed, or it has no passages.
    """
    file = Path(path)
    if file.suffix not in (".txt", ".jsonl"):
        raise DataError(
            f'corpus {path!r} must be a .txt file with one passage per line or a .jsonl file with a field "text"'
        )
    if not file.is_file():
        raise DataError(f"no corpus at {path!r}; give the path of a local .txt or .jsonl file")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    texts = (
        [_text(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line]
        if file.suffix == ".jsonl"
        else lines
    )
    passages = tuple(dict.fromkeys(text for text in texts if text))
    if not passages:
        raise DataError(f"corpus {path!r} has no passages; it needs at least one")
    return passages


def _text(line: str, where: str) -> str:
    try:
        return str(json.loads(line)["text"]).strip()
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f'{where}: not a JSON object with a field "text" ({error!r})') from error
