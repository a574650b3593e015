"""Likelihood rewards: how sure the policy is of the right answer after its own work; no verifier is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError, RewardError
from lora_gan.final_answer import FinalAnswer
from lora_gan.rewards.base import Reward, answers_of
from lora_gan.types import Policy, PromptBatch, RewardContext

BEHIND_WORK, DIRECT = "behind the work", "direct"


class ReferenceLikelihood(Reward):
    """Probability, under the policy, of the accepted answer in place of the completion's own, behind its work.

    A completion that reasons towards the right answer makes it likely, whatever it then says itself. So it rewards
    answers that no rule can compare, such as a sentence, and tells nearly right work from wrong work, where a verifier
    gives both 0. The first accepted answer counts. A completion without a final answer gets 0; prompts without accepted
    answers are left out.

    The gradient reaches the work through the policy loss only; VeriFree (arXiv 2505.21493) adds the one of the answer
    itself, as ``coefficients.supervised`` does for targets.

    Args:
        weight: Factor in the total reward.
        name: Name in the logs, ``reward/<name>``.
        whole: The probability of the whole answer (VeriFree) instead of the mean over its tokens (RLPR, arXiv
            2506.18254). A long answer is unlikely as a whole, so its rewards are nearly all 0.
        minus_direct: Subtract what the answer gets without any work, not below 0 (RLPR, eq. 4), so that answers which
            are likely anyway, such as yes, earn nothing.
    """

    asks_policy = True

    def __init__(
        self, weight: float = 1.0, name: str = "likelihood", whole: bool = False, minus_direct: bool = True
    ) -> None:
        super().__init__(weight, name)
        self.whole = whole
        self.minus_direct = minus_direct

    def check(self, final_answer: FinalAnswer | None) -> None:
        if final_answer is None:
            raise LoraGANError(
                f"the reward {self.name!r} puts the accepted answer behind the work of a completion, and nothing says "
                "where that ends: set model.final_answer, such as lora_gan.final_answer.AfterMarker"
            )

    def applies_in(self, batch: PromptBatch, context: RewardContext) -> list[bool]:
        return [bool(answers_of(example, context.final_answer)) for example in batch.examples]

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        if context.policy is None:
            raise RewardError(f"the reward {self.name!r} needs the policy, which the context does not give")
        self.check(context.final_answer)
        answered = _answered(completions, batch, context)
        scores = torch.zeros(len(completions), device=context.logprobs.device)
        if answered:
            scores[[one.row for one in answered]] = self._probabilities(answered, batch, context.policy)
        return scores

    def _probabilities(self, answered: Sequence[_Answered], batch: PromptBatch, policy: Policy) -> Tensor:
        """(R,) of the accepted answers of R completions."""
        behind = {BEHIND_WORK: [(one.work + one.lead, one.accepted) for one in answered]}
        if self.minus_direct:
            behind[DIRECT] = [(one.lead.lstrip(), one.accepted) for one in answered]
        prompts = [one.prompt for one in answered]
        tokens = {kind: _encode(pairs, policy) for kind, pairs in behind.items()}
        _check_length(tokens[BEHIND_WORK], prompts, batch, policy)
        chosen = sorted(set(prompts))
        branches = {
            kind: [[each.ids for each, b in zip(found, prompts, strict=True) if b == prompt] for prompt in chosen]
            for kind, found in tokens.items()
        }  # the completions come prompt by prompt, so the branches have the order of the completions
        device = batch.prompt_ids[0].device
        moved = {kind: [[ids.to(device) for ids in row] for row in rows] for kind, rows in branches.items()}
        logprobs = policy.logprobs([batch.prompt_ids[b] for b in chosen], moved)
        found = {kind: self._of_answers(logprobs[kind], tokens[kind]) for kind in tokens}
        if not self.minus_direct:
            return found[BEHIND_WORK]
        return (found[BEHIND_WORK] - found[DIRECT]).clamp(min=0)

    def _of_answers(self, logprobs: Tensor, tokens: Sequence[_Tokens]) -> Tensor:
        """(R,) from the log-probabilities (R, T) of lead and answer."""
        answers = [row[each.start : each.end] for row, each in zip(logprobs, tokens, strict=True)]
        return torch.stack([answer.sum().exp() if self.whole else answer.exp().mean() for answer in answers])


@dataclass(frozen=True)
class _Answered:
    """A completion that has a final answer, to a prompt that has an accepted one."""

    row: int
    prompt: int
    work: str
    lead: str  # up to the answer, white space included
    accepted: str


@dataclass(frozen=True)
class _Tokens:
    """A text that ends with an answer."""

    ids: Tensor  # (T,)
    start: int  # of the answer
    end: int


def _answered(completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> list[_Answered]:
    assert context.final_answer is not None
    found = []
    for row, completion in enumerate(completions):
        prompt = row // context.num_generations
        parts = context.final_answer.split(completion)
        if answer := parts.answer.strip():
            lead = parts.lead + parts.answer[: parts.answer.index(answer)]
            accepted = answers_of(batch.examples[prompt], context.final_answer)[0]
            found.append(_Answered(row, prompt, parts.work, lead, accepted))
    return found


def _encode(pairs: Sequence[tuple[str, str]], policy: Policy) -> list[_Tokens]:
    """Each text before an answer, and the answer; a token that belongs to both counts as the answer's."""
    (nothing,) = policy.encode([""])
    before = policy.encode([lead for lead, _ in pairs])
    whole = policy.encode([lead + answer for lead, answer in pairs])
    end = len(nothing)
    return [
        _Tokens(torch.tensor(ids), start=_shared(lead[: len(lead) - end], ids), end=len(ids) - end)
        for lead, ids in zip(before, whole, strict=True)
    ]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _check_length(tokens: Sequence[_Tokens], prompts: Sequence[int], batch: PromptBatch, policy: Policy) -> None:
    longest = max(len(each.ids) + len(batch.prompt_ids[b]) for each, b in zip(tokens, prompts, strict=True))
    if longest > policy.context_length:
        raise RewardError(
            f"prompt, work and accepted answer have {longest} tokens, and the context of the base "
            f"{policy.context_length}: lower sampling.max_new_tokens or data.max_prompt_tokens"
        )
