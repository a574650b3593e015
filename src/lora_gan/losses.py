"""Policy losses: log-probabilities of sampled tokens and their advantages → the generator's loss."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lora_gan.tensors import kl_k3, masked_mean
from lora_gan.types import Credit, LossTerm, Rollout


class PolicyLoss(ABC):
    """Raises the probability of tokens with positive advantage."""

    @abstractmethod
    def __call__(self, logprobs: Tensor, rollout: Rollout, credit: Credit) -> LossTerm:
        """The loss of one update.

        Args:
            logprobs: (N, T) log-probabilities of the sampled tokens now, with gradient.
            rollout: The sampled answers with their log-probabilities when they were sampled.
            credit: Advantages (N, T).
        """


class Reinforce(PolicyLoss):
    """−A·log π of the sampled tokens (Williams 1992), the mean over all sampled tokens of the batch."""

    def __call__(self, logprobs: Tensor, rollout: Rollout, credit: Credit) -> LossTerm:
        return LossTerm(-masked_mean(credit.advantages * logprobs, rollout.mask), {})


def kl_loss(logprobs: Tensor, rollout: Rollout, reference: Tensor) -> Tensor:
    """KL(π‖reference) over the sampled tokens (N, T), token mean, whose gradient is the reverse KL's.

    k3 alone has another gradient; times the importance ratio (1 in value when on-policy) it has the right one.
    """
    ratio = (logprobs - rollout.logprobs).exp()
    return masked_mean(ratio * kl_k3(logprobs, reference), rollout.mask)
