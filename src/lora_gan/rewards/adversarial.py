"""Adversarial rewards: the discriminator's score as a reward for the generator."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_gan.best_of import same_answer
from lora_gan.errors import LoraGANError
from lora_gan.tensors import davidson, leaders
from lora_gan.types import DiscriminatorScores


class AdversarialReward(ABC):
    """Turns the discriminator's scores of the sampled completions into a reward, (N,)."""

    needs_opponent = False  # True: needs completions of an earlier generator to the same prompts
    needs_target = False  # True: needs a target for each prompt
    needs_comparison = False  # True: needs a discriminator that compares completion and target

    @abstractmethod
    def __call__(self, disc_scores: DiscriminatorScores) -> Tensor:
        """The reward of each sampled completion, (N,)."""


class Logit(AdversarialReward):
    """The score D itself: for discriminators that predict a reward, and for Bradley–Terry (arXiv 2511.10643)."""

    def __call__(self, disc_scores: DiscriminatorScores) -> Tensor:
        return disc_scores.sampled


class Probability(AdversarialReward):
    """σ(D), in [0, 1]."""

    def __call__(self, disc_scores: DiscriminatorScores) -> Tensor:
        return disc_scores.sampled.sigmoid()


class LogProbability(AdversarialReward):
    """log σ(D), at most 0: −log P(close) as a cost, the coupled loss of GPT2Twin (arXiv 1406.2661)."""

    def __call__(self, disc_scores: DiscriminatorScores) -> Tensor:
        return logsigmoid(disc_scores.sampled)


class GailReward(AdversarialReward):
    """−log(1 − σ(D)), at least 0, the reward of adversarial imitation (GAIL, arXiv 1606.03476)."""

    def __call__(self, disc_scores: DiscriminatorScores) -> Tensor:
        return -logsigmoid(-disc_scores.sampled)


class AgainstTarget(AdversarialReward):
    """σ(D(completion) − D(target)), in [0, 1]: the probability of a pair softmax (TextGAIL, arXiv 2004.13796)."""

    needs_target = True

    def __call__(self, disc_scores: DiscriminatorScores) -> Tensor:
        _require_targets(self, disc_scores)
        return (disc_scores.per_prompt - disc_scores.target[:, None]).sigmoid().flatten()


class Payoff(AdversarialReward):
    """P(the completion is named as the target) + ``tie``·P(tie), in [0, 1] (RARO, arXiv 2511.21667).

    Args:
        tie: What a tie pays, in [0, 1].
    """

    needs_target = True
    needs_comparison = True

    def __init__(self, tie: float = 0.55) -> None:
        if not 0 <= tie <= 1:
            raise LoraGANError(f"tie of Payoff must be in [0, 1], got {tie}")
        self.tie = tie

    def __call__(self, disc_scores: DiscriminatorScores) -> Tensor:
        _require_targets(self, disc_scores)
        if disc_scores.tie_logit is None:
            raise LoraGANError("Payoff needs the logits of ties, which PairwiseDiscriminator gives; got none")
        named, _, tied = davidson(disc_scores.sampled, disc_scores.tie_logit)
        payoff: Tensor = named + self.tie * tied
        return payoff


class WeightedVote(AdversarialReward):
    """Share of the prompt's σ(D) that stands behind the completion's final answer: a vote by credibility.

    In [0, 1]: agreement as in :class:`~lora_gan.rewards.SelfConsistency`, in which a completion counts as much as the
    discriminator believes it (the verifier-weighted vote of DiVeRSe, arXiv 2206.02336, as a reward). So the
    discriminator can outvote a wrong majority, and its mistakes about single completions average out. A completion
    without a final answer gets 0.

    Args:
        majority: 1 for the completions with the answer of the greatest share, 0 for the others, in place of the share.
    """

    def __init__(self, majority: bool = False) -> None:
        self.majority = majority

    def __call__(self, disc_scores: DiscriminatorScores) -> Tensor:
        same = same_answer(disc_scores.answers, disc_scores.num_generations).to(disc_scores.sampled.device)
        weight = disc_scores.per_prompt.sigmoid()
        shares = (same * weight[:, None, :]).sum(-1) / weight.sum(-1, keepdim=True)
        return (leaders(shares) if self.majority else shares).flatten()


class WithoutLength(AdversarialReward):
    """Another adversarial reward without what the length of the completion explains of it.

    A score of preferences tends to grow with length, and a policy that learns from it writes ever more. Here the line
    is subtracted that fits the reward to the length in tokens, by least squares over the step's completions, each
    compared with the mean of its prompt. Adding any multiple of the length to the score changes nothing.

    Args:
        reward: The adversarial reward; by default the score itself.
    """

    def __init__(self, reward: AdversarialReward | None = None) -> None:
        self.reward = reward or Logit()
        self.needs_opponent = self.reward.needs_opponent
        self.needs_target = self.reward.needs_target
        self.needs_comparison = self.reward.needs_comparison

    def __call__(self, disc_scores: DiscriminatorScores) -> Tensor:
        reward, k = self.reward(disc_scores), disc_scores.num_generations
        if disc_scores.length is None:
            raise LoraGANError("WithoutLength needs the lengths of the completions, and the scores come without them")
        length = disc_scores.length.to(reward)
        longer, better = (x.view(-1, k) - x.view(-1, k).mean(1, keepdim=True) for x in (length, reward))
        spread = longer.square().sum()
        slope = (longer * better).sum() / spread.where(spread > 0, 1.0)
        return reward - slope * (length - length.mean())


class WinRate(AdversarialReward):
    """Share of the opponent's completions to the same prompt that the discriminator scores lower (self-play).

    In [0, 1]; ties count half. The opponent is the generator's last snapshot (``lora_gan.callbacks.Snapshot``).
    """

    needs_opponent = True

    def __call__(self, disc_scores: DiscriminatorScores) -> Tensor:
        mine, theirs = disc_scores.per_prompt, disc_scores.opponent.view(-1, disc_scores.num_generations)
        lead = mine[:, :, None] - theirs[:, None, :]  # (B, K, K)
        return (lead.sign() / 2 + 0.5).mean(-1).flatten()


def _require_targets(reward: AdversarialReward, disc_scores: DiscriminatorScores) -> None:
    if len(disc_scores.target) != len(disc_scores.per_prompt):
        raise LoraGANError(
            f"{type(reward).__name__} needs a target for each prompt, got {len(disc_scores.target)} targets for "
            f"{len(disc_scores.per_prompt)} prompts; choose another adversarial reward"
        )
