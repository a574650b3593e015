"""What the discriminator's score is worth to the generator: the adversarial part of the reward."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_gan.errors import LoraGANError
from lora_gan.types import Judgement


class Payoff(ABC):
    """Turns the discriminator's scores of the sampled answers into a reward, (N,)."""

    needs_opponent = False  # True: an earlier generator has to answer the same prompts

    @abstractmethod
    def __call__(self, judgement: Judgement) -> Tensor:
        """(N,) what each sampled answer earns."""


class RawScore(Payoff):
    """D, the score itself: for discriminators that predict a reward, and for Bradley–Terry (arXiv 2511.10643)."""

    def __call__(self, judgement: Judgement) -> Tensor:
        return judgement.sampled


class Probability(Payoff):
    """σ(D), in [0, 1]."""

    def __call__(self, judgement: Judgement) -> Tensor:
        return judgement.sampled.sigmoid()


class LogProbability(Payoff):
    """log σ(D), at most 0: −log P(close) as a cost, the coupled loss of GPT2Twin (arXiv 1406.2661)."""

    def __call__(self, judgement: Judgement) -> Tensor:
        return logsigmoid(judgement.sampled)


class Surprise(Payoff):
    """−log(1 − σ(D)), at least 0, the reward of adversarial imitation (GAIL, arXiv 1606.03476)."""

    def __call__(self, judgement: Judgement) -> Tensor:
        return -logsigmoid(-judgement.sampled)


class AgainstTarget(Payoff):
    """σ(D(answer) − D(target)), in [0, 1]: the probability of a pair softmax (TextGAIL, arXiv 2004.13796)."""

    def __call__(self, judgement: Judgement) -> Tensor:
        if len(judgement.target) != len(judgement.per_prompt):
            raise LoraGANError("AgainstTarget compares with targets, and some prompts have none; choose another payoff")
        return (judgement.per_prompt - judgement.target[:, None]).sigmoid().flatten()


class Win(Payoff):
    """Self-play: the share of the opponent's answers to the same prompt that the discriminator ranks below this one.

    Ties count half. The opponent is the generator's last snapshot (``lora_gan.callbacks.Snapshot``).
    """

    needs_opponent = True

    def __call__(self, judgement: Judgement) -> Tensor:
        mine, theirs = judgement.per_prompt, judgement.opponent.view(-1, judgement.k)
        lead = mine[:, :, None] - theirs[:, None, :]  # (B, K, K)
        return (lead.sign() / 2 + 0.5).mean(-1).flatten()
