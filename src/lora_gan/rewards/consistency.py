"""Consistency rewards: agreement among a prompt's completions; they need no target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_gan.best_of import agreement
from lora_gan.rewards.base import Reward, answers_of
from lora_gan.sentence_encoder import MINILM, sentence_encoder
from lora_gan.tensors import leaders
from lora_gan.types import PromptBatch, RewardContext


class SelfConsistency(Reward):
    """Share of the prompt's other k − 1 completions that equal this one, in [0, 1] (Wang et al. 2022, as a reward).

    Case, outer white space and a final full stop are ignored; an empty completion equals none. Where the module has a
    ``final_answer``, final answers are compared, and a completion without one equals none. Does not apply if k is 1.
    Beware: a policy that gives every prompt the same completion gets 1; ``lora_gan.callbacks.CollapseMonitor``
    detects it.

    Args:
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``.
        unanswered: Leave out the prompts of which an answer is known, for example to ``AnswerReward``.
        majority: 1 for the completions with the most frequent answer and 0 for the others, in place of the share
            (TTRL, arXiv 2504.16084). If several answers are as frequent, all of them get 1; an answer given once gets
            0.
    """

    def __init__(
        self, weight: float = 1.0, name: str = "consistency", unanswered: bool = False, majority: bool = False
    ) -> None:
        super().__init__(weight, name)
        self.unanswered = unanswered
        self.majority = majority

    def applies_in(self, batch: PromptBatch, context: RewardContext) -> list[bool]:
        wanted = context.num_generations > 1
        return [wanted and not (self.unanswered and answers_of(e, context.final_answer)) for e in batch.examples]

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        shares = agreement(completions, context.num_generations, context.final_answer)
        return leaders(shares.view(-1, context.num_generations)).flatten() if self.majority else shares


class SemanticConsistency(Reward):
    """Mean cosine of the completion's sentence embedding with those of the prompt's other k − 1 completions, in [0, 1].

    For completions that are too long to be equal; negative cosines count as 0. Like :class:`SelfConsistency`, it does
    not apply if k is 1, and it is 1 for a policy that gives every prompt the same completion.

    Args:
        weight: Factor in the total reward.
        model: Sentence-transformers model: all-MiniLM-L6-v2 (works offline), another hub id, or a local folder.
        name: Name in the logs, ``reward/<name>``.
    """

    def __init__(self, weight: float = 1.0, model: str = MINILM, name: str = "semantic_consistency") -> None:
        super().__init__(weight, name)
        self.model = model

    def applies(self, batch: PromptBatch, k: int) -> list[bool]:
        return [k > 1] * len(batch)

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        if not completions:
            return torch.zeros(0)
        groups = sentence_encoder(self.model).encode(completions).view(len(batch), context.num_generations, -1)
        cosines = (groups @ groups.mT).clamp(0, 1)
        others = cosines.sum(-1) - cosines.diagonal(dim1=1, dim2=2)
        there = torch.tensor([bool(completion.strip()) for completion in completions])
        return (others / max(context.num_generations - 1, 1)).flatten().clamp(0, 1) * there
