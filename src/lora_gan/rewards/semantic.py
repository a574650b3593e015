"""Semantic similarity to the target."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lora_gan.embedding import MINILM, sentence_encoder
from lora_gan.rewards.base import Reward
from lora_gan.types import PromptBatch, RewardContext


class SemanticReward(Reward):
    """Cosine of the sentence embeddings of answer and target, negative values cut to 0, so in [0, 1].

    It tells topic and junk well and truth badly: on TruthfulQA all-MiniLM-L6-v2 gives a fluent false answer 0.72 and
    another true answer 0.65. Where truth matters, put :class:`~lora_gan.rewards.TruthReward` (known wrong answers) or
    :class:`~lora_gan.rewards.RetrievalReward` (a corpus) beside it or in its place.

    Args:
        weight: Factor in the total reward.
        model: Sentence-transformers model: all-MiniLM-L6-v2 (works offline), another hub id, or a local folder.
        name: Name in the logs, ``reward/<name>``.
    """

    needs_target = True

    def __init__(self, weight: float = 0.7, model: str = MINILM, name: str = "semantic") -> None:
        super().__init__(weight, name)
        self.model = model

    def __call__(self, answers: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        targets = [batch.targets[n // context.k] for n in range(len(answers))]
        return sentence_encoder(self.model).similarity(answers, targets).clamp(0, 1)
