"""Best of n: of several completions sampled for a prompt, the one that agreement, likelihood or a score prefers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError
from lora_gan.final_answer import FinalAnswer, find_answer
from lora_gan.text_metrics import normalise
from lora_gan.types import PromptBatch

WAYS = ("agreement", "logprob", "discriminator", "reward")


@dataclass(frozen=True)
class BestOf:
    """How many completions are sampled for a prompt, and which of them is taken.

    Args:
        n: How many; 1 takes the only one.
        by: "agreement" (the final answer that most of them have: self-consistency, arXiv 2203.11171), "logprob" (the
            most likely), "discriminator" (its highest score) or "reward" (that of the run, as far as it needs no
            target). Among equals the most likely is taken.
    """

    n: int = 1
    by: str = "agreement"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise LoraGANError(f"best_of must be at least 1, got {self.n}")
        if self.by not in WAYS:
            raise LoraGANError(f"best_by must be {', '.join(WAYS[:-1])} or {WAYS[-1]}, got {self.by!r}")


def agreement(completions: Sequence[str], k: int, final_answer: FinalAnswer | None) -> Tensor:
    """(N,) share of the prompt's other k − 1 completions that have the same final answer, in [0, 1].

    Case, outer white space and a final full stop are ignored. A completion without a final answer agrees with none.

    Args:
        completions: N texts, k for each prompt.
        k: Completions for each prompt.
        final_answer: Finds it; None: the whole completion is the answer.
    """
    same = same_answer([find_answer(completion, final_answer) for completion in completions], k)
    return (same.sum(-1) - 1).clamp(min=0).flatten() / max(k - 1, 1)


def same_answer(answers: Sequence[str | None], k: int) -> Tensor:
    """(B, K, K) bool: which of the k completions to a prompt have the same final answer; None is no answer.

    Case, outer white space and a final full stop are ignored.
    """
    votes = [normalise(answer or "") for answer in answers]
    number = {vote: place for place, vote in enumerate(dict.fromkeys(votes), 1)}
    numbers = torch.tensor([number[vote] if vote else 0 for vote in votes], dtype=torch.long).view(-1, k)
    return (numbers[:, :, None] == numbers[:, None, :]) & (numbers > 0)[:, :, None]


def choose(scores: Tensor, logprobs: Tensor, n: int) -> list[int]:
    """For each prompt which of its n completions has the highest score; among equals, the most likely one.

    Args:
        scores: (N,) one for each completion.
        logprobs: (N,) log-probability of each completion.
        n: Completions for each prompt.
    """
    groups = scores.view(-1, n)
    best = groups == groups.amax(1, keepdim=True)
    places = torch.where(best, logprobs.to(scores.device).view(-1, n), -torch.inf).argmax(1)
    return [row * n + place for row, place in enumerate(places.tolist())]


def without_answers(batch: PromptBatch) -> PromptBatch:
    """The prompts alone, as they are where nothing is known about good completions."""
    asked = tuple(example.without_answer() for example in batch.examples)
    return PromptBatch(asked, batch.prompt_ids, batch.target_ids, ((),) * len(asked))
