"""Semantic reward: similarity in meaning to the target."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lora_gan.rewards.base import Reward
from lora_gan.sentence_encoder import MINILM, sentence_encoder
from lora_gan.types import PromptBatch, RewardContext


class SemanticReward(Reward):
    """Cosine similarity of the sentence embeddings of completion and target, clipped to [0, 1].

    It detects a wrong topic and nonsense well, and untruth badly: on TruthfulQA all-MiniLM-L6-v2 gives a fluent false
    completion 0.72 and another true completion 0.65. If truth matters, add or use instead
    :class:`~lora_gan.rewards.TruthReward` (known incorrect answers) or :class:`~lora_gan.rewards.RetrievalReward` (a
    corpus).

    Args:
        weight: Factor in the total reward.
        model: Sentence-transformers model: all-MiniLM-L6-v2 (works offline), another hub id, or a local folder.
        name: Name in the logs, ``reward/<name>``.
    """

    needs_target = True

    def __init__(self, weight: float = 0.7, model: str = MINILM, name: str = "semantic") -> None:
        super().__init__(weight, name)
        self.model = model

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        targets = [batch.targets[n // context.num_generations] for n in range(len(completions))]
        return sentence_encoder(self.model).similarity(completions, targets).clamp(0, 1)
