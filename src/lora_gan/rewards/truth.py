"""Truth reward: similarity to known correct and incorrect answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_gan.rewards.base import Reward, references_of
from lora_gan.sentence_encoder import MINILM, sentence_encoder
from lora_gan.types import Example, PromptBatch, RewardContext


class TruthReward(Reward):
    """Largest similarity to a correct answer minus the largest to an incorrect one, in [−1, 1].

    The measure of TruthfulQA (Lin et al. 2022) with sentence embeddings: correct answers are the example's references,
    incorrect ones its negatives; negative cosines count as 0. For an example without negatives the reward
    distinguishes true from false no better than the semantic one.

    Args:
        weight: Factor in the total reward.
        model: Sentence-transformers model: all-MiniLM-L6-v2 (works offline), another hub id, or a local folder.
        name: Name in the logs, ``reward/<name>``.
    """

    needs_target = True

    def __init__(self, weight: float = 1.0, model: str = MINILM, name: str = "truth") -> None:
        super().__init__(weight, name)
        self.model = model

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        return truth(completions, batch.examples, self.model)


def truth(answers: Sequence[str], examples: Sequence[Example], model: str = MINILM) -> Tensor:
    """:class:`TruthReward` of N answers to B examples, N/B consecutive ones for each example: (N,)."""
    if not answers:
        return torch.zeros(0)
    encoder = sentence_encoder(model)
    groups = encoder.encode(answers).view(len(examples), len(answers) // len(examples), -1)

    def closest(vectors: Tensor, texts: Sequence[str]) -> Tensor:
        """Largest cosine of each vector with one of the texts."""
        if not texts:
            return torch.zeros(len(vectors))
        return (vectors @ encoder.encode(texts, keep=True).T).amax(1).clamp(0, 1)

    return torch.cat(
        [
            closest(group, references_of(example)) - closest(group, [negative.text for negative in example.negatives])
            for group, example in zip(groups, examples, strict=True)
        ]
    )
