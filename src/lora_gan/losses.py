"""Policy losses: log-probabilities of sampled tokens and their advantages → the generator's loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError
from lora_gan.tensors import kl_k3, masked_mean, masked_row_mean
from lora_gan.types import Advantages, LossTerm, Rollout

MISMATCH_KL = "policy/mismatch_kl"  # between the policy that samples and the one that learns
POLICY_METRICS = ("policy/ratio", "policy/ratio_capped", "policy/clip_fraction", MISMATCH_KL)  # means over tokens
RATIO_CAP = 2.0  # where sampling.base makes the policy that samples another one
LOSS_TYPES = ("bnpo", "grpo", "dr_grpo")


class PolicyLoss(ABC):
    """Raises the probability of tokens with positive advantage; each metric is a mean over the tokens.

    The loss is a mean, too; ``loss_type`` says of what, by the names of TRL. "bnpo": over all tokens, so a long
    completion counts more. "grpo": over completions, of the mean over their tokens (arXiv 2402.03300, eq. 3), so a
    token of a long one counts less. "dr_grpo": over completions, of the sum over their tokens divided by the length
    limit (arXiv 2503.20783), which does not depend on any length.

    The completions of a step are used ``num_iterations`` times in ``num_minibatches`` parts, with one optimizer step
    for each part, until KL(policy that sampled‖current policy) exceeds ``target_kl``.
    """

    num_iterations = 1
    num_minibatches = 1
    target_kl = math.inf  # nats per token
    loss_type = "bnpo"
    ratio_cap: float | None = None  # upper limit of importance ratios
    recomputes = False  # True: wants the log-probabilities that the policy has before its first update of a step
    max_new_tokens = 1  # length limit of a completion; the generator sets it

    def __init__(self, loss_type: str = "bnpo") -> None:
        if loss_type not in LOSS_TYPES:
            raise LoraGANError(f"loss_type must be {', '.join(LOSS_TYPES[:-1])} or {LOSS_TYPES[-1]}, got {loss_type!r}")
        self.loss_type = loss_type

    def mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """The mean of ``x`` (N, T) where ``mask`` is True, by ``loss_type``; 0 if it is True nowhere."""
        if self.loss_type == "bnpo":
            return masked_mean(x, mask)
        totals = torch.where(mask, x, 0).sum(-1)
        lengths = mask.sum(-1).clamp(min=1) if self.loss_type == "grpo" else self.max_new_tokens
        return (totals / lengths).sum() / mask.any(-1).sum().clamp(min=1)

    def count(self, mask: Tensor) -> int:
        """How many tokens (N, T) or completions :meth:`mean` is a mean of."""
        return int((mask if self.loss_type == "bnpo" else mask.any(-1)).sum())

    @abstractmethod
    def __call__(self, logprobs: Tensor, rollout: Rollout, advantages: Advantages) -> LossTerm:
        """The loss of one update.

        Args:
            logprobs: (N, T) log-probabilities of the sampled tokens under the current policy, with gradient.
            rollout: The sampled completions, with their log-probabilities from when they were sampled.
            advantages: Advantages (N, T).
        """


class Reinforce(PolicyLoss):
    """−A·log π of the sampled tokens (Williams 1992).

    Args:
        loss_type: What the loss is a mean of, see :class:`PolicyLoss`.
        ratio_cap: Upper limit of the importance ratios that weight the tokens when the policy is not the one that
            sampled, see :func:`truncated_importance`; null leaves the weights at 1.
    """

    def __init__(self, ratio_cap: float | None = None, loss_type: str = "bnpo") -> None:
        super().__init__(loss_type)
        self.ratio_cap = _checked_cap(ratio_cap)

    def __call__(self, logprobs: Tensor, rollout: Rollout, advantages: Advantages) -> LossTerm:
        if self.ratio_cap is None:
            return LossTerm(-self.mean(advantages.per_token * logprobs, rollout.mask), {})
        importance = truncated_importance(logprobs, rollout, self.ratio_cap)
        weighted = importance.weights * advantages.per_token * logprobs
        return LossTerm(-self.mean(weighted, rollout.mask), importance.metrics)


class ClippedPPO(PolicyLoss):
    """Proximal policy optimization: −min(r·A, clip(r, 1 − ε, 1 + ε′)·A), r the importance ratio (arXiv 1707.06347).

    Args:
        epsilon: ε, the clip range below a ratio of 1.
        epsilon_high: ε′, the clip range above a ratio of 1; by default ε. A larger one keeps up exploration (DAPO,
            arXiv 2503.14476).
        num_iterations: Passes over the completions of a step.
        num_minibatches: Parts of the batch of prompts, with one optimizer step each.
        target_kl: KL in nats per token between the policy that sampled and the current one above which the updates of a
            step stop; null never stops them.
        loss_type: What the loss is a mean of, see :class:`PolicyLoss`.
        importance_sampling_level: "token", or "sequence": one ratio for a completion, the geometric mean of its tokens'
            (GSPO, arXiv 2507.18071, eq. 7, with loss_type grpo and an ε of about 3e-4).
        dual_clip: Largest ratio that counts for a token with a negative advantage, above 1 + ε′: max(…, c·A) (arXiv
            1912.09729, eq. 5; often 3). Without it, such a token pulls the harder the likelier it has become. null sets
            no limit.
        ratio_cap: Where ``sampling.base`` samples with another policy: r compares with the policy before the first
            update, which takes one more pass, and :func:`truncated_importance` of that policy, up to this limit,
            weights each token. null compares with the policy that sampled.
    """

    recomputes = True

    def __init__(
        self,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        num_iterations: int = 4,
        num_minibatches: int = 1,
        target_kl: float | None = None,
        loss_type: str = "bnpo",
        importance_sampling_level: str = "token",
        dual_clip: float | None = None,
        ratio_cap: float | None = RATIO_CAP,
    ) -> None:
        super().__init__(loss_type)
        self.ratio_cap = _checked_cap(ratio_cap)
        if not 0 < epsilon < 1 or (epsilon_high is not None and not epsilon_high > 0):
            raise LoraGANError(f"epsilon must be in (0, 1) and epsilon_high > 0, got {epsilon} and {epsilon_high}")
        if num_iterations < 1 or num_minibatches < 1:
            raise LoraGANError(
                f"num_iterations and num_minibatches must be at least 1, got {num_iterations} and {num_minibatches}"
            )
        if target_kl is not None and not target_kl > 0:
            raise LoraGANError(f"target_kl must be > 0 or null, got {target_kl}")
        if importance_sampling_level not in ("token", "sequence"):
            raise LoraGANError(
                f"importance_sampling_level must be token or sequence, got {importance_sampling_level!r}"
            )
        self.low, self.high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
        if dual_clip is not None and not dual_clip > self.high:
            raise LoraGANError(
                f"dual_clip must be above {self.high:g}, where the clip range ends, or null; got {dual_clip}"
            )
        self.by_sequence = importance_sampling_level == "sequence"
        self.dual_clip = math.inf if dual_clip is None else dual_clip
        self.num_iterations = num_iterations
        self.num_minibatches = num_minibatches
        self.target_kl = math.inf if target_kl is None else target_kl

    def __call__(self, logprobs: Tensor, rollout: Rollout, advantages: Advantages) -> LossTerm:
        moved = logprobs - rollout.logprobs
        if self.by_sequence:
            moved = masked_row_mean(moved, rollout.mask)[:, None].expand_as(moved)
        ratio = moved.exp()
        given, clipped = advantages.per_token, ratio.clamp(self.low, self.high)
        counted = torch.where(given < 0, ratio.clamp(max=self.dual_clip), ratio)
        gain = torch.minimum(counted * given, clipped * given)
        unused = ((counted * given > clipped * given) | (counted < ratio)).float()
        metrics = {
            "policy/ratio": masked_mean(ratio.detach(), rollout.mask),
            "policy/clip_fraction": masked_mean(unused, rollout.mask),
        }
        return LossTerm(-self.mean(gain, rollout.mask), metrics)


@dataclass(frozen=True)
class Importance:
    """How much tokens count which another policy sampled."""

    weights: Tensor  # (N, T), no gradient
    metrics: Mapping[str, Tensor]


def truncated_importance(logprobs: Tensor, rollout: Rollout, ratio_cap: float) -> Importance:
    """min(π/π that sampled, ``ratio_cap``) of each token (N, T) (truncated importance sampling, arXiv 1802.01561)."""
    ratio = (logprobs.detach() - rollout.logprobs).exp()
    capped = masked_mean((ratio > ratio_cap).float(), rollout.mask)
    metrics = {"policy/ratio_capped": capped, MISMATCH_KL: approx_kl(logprobs, rollout)}
    return Importance(ratio.clamp(max=ratio_cap), metrics)


def _checked_cap(ratio_cap: float | None) -> float | None:
    if ratio_cap is not None and not ratio_cap > 0:
        raise LoraGANError(f"ratio_cap must be > 0 or null, got {ratio_cap}")
    return ratio_cap


def kl_loss(logprobs: Tensor, rollout: Rollout, reference: Tensor) -> Tensor:
    """KL(π‖reference) over the sampled tokens (N, T), token mean, whose gradient is the reverse KL's.

    The gradient of k3 alone is another one; times the importance ratio (of value 1 when on-policy) it is correct.
    """
    ratio = (logprobs - rollout.logprobs).exp()
    return masked_mean(ratio * kl_k3(logprobs, reference), rollout.mask)


def approx_kl(logprobs: Tensor, rollout: Rollout) -> Tensor:
    """k3 estimate of KL(policy that sampled‖current policy), in nats per token."""
    return masked_mean(kl_k3(rollout.logprobs, logprobs.detach()), rollout.mask)


def value_loss(values: Tensor, rollout: Rollout, advantages: Advantages, epsilon: float) -> Tensor:
    """½·max((V − R)², (V_clipped − R)²), V_clipped within ``epsilon`` of the old value; token mean (arXiv 2005.12729).

    Args:
        values: (N, T) current outputs of the value head, with gradient.
        rollout: The sampled completions.
        advantages: Advantages with returns R and old values, (N, T).
        epsilon: Clip range around the old value.
    """
    assert advantages.returns is not None and advantages.values is not None
    near = advantages.values + (values - advantages.values).clamp(-epsilon, epsilon)
    errors = torch.maximum((values - advantages.returns).square(), (near - advantages.returns).square())
    return 0.5 * masked_mean(errors, rollout.mask)


def straight_through(logits: Tensor, ids: Tensor, temperature: float, uniform: Tensor, slope: Tensor) -> Tensor:
    """Gradient at ``logits`` (n, V) through one-hot samples, which is passed on as a Gumbel-softmax's → (n, V).

    The noise is drawn conditional on the sampled token, so that the relaxation belongs to the completion that was
    sampled (estimator of arXiv 1611.01144).

    Args:
        logits: In float32.
        ids: (n,) the sampled tokens.
        temperature: Temperature of the softmax; a lower one is closer to the discrete choice and noisier.
        uniform: (n, V) numbers in (0, 1).
        slope: (n, V) gradient at the samples.
    """
    logp = logits.log_softmax(-1)
    soft = ((logp + gumbel_noise(logp, ids, uniform)) / temperature).softmax(-1)
    return soft * (slope - (soft * slope).sum(-1, keepdim=True)) / temperature


def gumbel_noise(logp: Tensor, ids: Tensor, uniform: Tensor) -> Tensor:
    """Gumbel noise (n, V) given that ``logp`` (n, V) plus it is largest at ``ids`` (n,) (arXiv 1411.0030, 3.1)."""
    exponential = -uniform.log()
    top = -exponential.gather(1, ids[:, None]).log()  # the largest perturbed logit is Gumbel(0): Σ exp(logp) is 1
    others = -torch.logaddexp(exponential.log() - logp, -top)
    return others.scatter(1, ids[:, None], top) - logp
