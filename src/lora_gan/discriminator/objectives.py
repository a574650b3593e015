"""Discriminator objectives: scores of targets, samples and worse completions → loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

from lora_gan.errors import LoraGANError
from lora_gan.tensors import davidson
from lora_gan.types import ACCURACY, DiscriminatorOutput, LossTerm

SAMPLED, TARGET, OPPONENT = "sampled", "target", "opponent"


class DiscriminatorObjective(ABC):
    """Turns the discriminator's outputs into its loss."""

    needs_auxiliary = False  # True: needs a model with an auxiliary head
    needs_comparison = False  # True: needs a model that compares completion and target
    needs_rewards = False  # True: learns from the rewards of the completions

    @abstractmethod
    def __call__(self, outputs: Mapping[str, DiscriminatorOutput]) -> LossTerm:
        """The loss of one update.

        Args:
            outputs: By kind: "target", "sampled", and in self-play "opponent"; all other kinds are negatives.
        """


class RewardRegression(DiscriminatorObjective):
    """Predict the reward: mean squared error; samples, targets and negatives weigh the same.

    Negatives are labelled by hand, because a similarity reward gives a fluent wrong completion nearly the target's
    score.

    Args:
        negative_reward: The label of negatives.
    """

    needs_rewards = True

    def __init__(self, negative_reward: float = 0.0) -> None:
        self.negative_reward = negative_reward

    def __call__(self, outputs: Mapping[str, DiscriminatorOutput]) -> LossTerm:
        worse = _all(outputs, negatives(outputs)).score
        losses = {kind: (x.score - reward)[known].square().mean() for kind, x, reward, known in _rewarded(outputs)}
        if len(worse):
            losses["negatives"] = (worse - self.negative_reward).square().mean()
        return _mean_of(outputs, losses, "discriminator/error_")


class ClosenessBCE(DiscriminatorObjective):
    """Is the completion as good as the target? Binary cross-entropy of σ(score), GPT2Twin's P(close).

    Targets are close, negatives are not; a sampled one is if it equals the target or has a high enough reward.

    Args:
        close_from: Smallest reward of a sampled completion that counts as close.
    """

    needs_rewards = True

    def __init__(self, close_from: float = 0.9) -> None:
        self.close_from = close_from

    def __call__(self, outputs: Mapping[str, DiscriminatorOutput]) -> LossTerm:
        return _each_kind(outputs, self._loss)

    def _loss(self, score: Tensor, closeness: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(score, (closeness >= self.close_from).float())


class ClosenessRegression(DiscriminatorObjective):
    """How close is the completion to the target, from 0 to 1? Squared error of σ(score), GPT2Twin's regression.

    Targets are 1, negatives 0, sampled completions their reward, clipped to [0, 1].
    """

    needs_rewards = True

    def __call__(self, outputs: Mapping[str, DiscriminatorOutput]) -> LossTerm:
        return _each_kind(outputs, lambda score, closeness: (score.sigmoid() - closeness).square().mean())


class ClosenessOrdinal(DiscriminatorObjective):
    """Which of k ordered grades of closeness does the completion have? The cumulative-link model (McCullagh 1980).

    P(grade ≥ j) = σ(score − θ_j) with θ_j = logit(j/k): σ(score) is a closeness from 0 to 1 as in the other two, and
    the grade is the interval, among k equal ones of [0, 1], that contains it. The loss is the negative log-likelihood.

    Args:
        grades: k, at least 2.
    """

    needs_rewards = True

    def __init__(self, grades: int = 5) -> None:
        if grades < 2:
            raise LoraGANError(f"grades must be at least 2, got {grades}")
        self.grades = grades

    def __call__(self, outputs: Mapping[str, DiscriminatorOutput]) -> LossTerm:
        return _each_kind(outputs, self._likelihood)

    def _likelihood(self, score: Tensor, closeness: Tensor) -> Tensor:
        borders = (torch.arange(self.grades + 1, device=score.device) / self.grades).logit()  # θ_0 = −∞, θ_k = ∞
        grade = (closeness * self.grades).floor().clamp(max=self.grades - 1).long()
        low, high = borders[grade], borders[grade + 1]
        # σ(s − low) − σ(s − high) = σ(s − low)·σ(high − s)·(1 − exp(low − high)), which neither cancels nor saturates
        likelihood = logsigmoid(score - low) + logsigmoid(high - score) + (-(low - high).exp()).log1p()
        return -likelihood.mean()


class GanBCE(DiscriminatorObjective):
    """Tell targets from everything else: binary cross-entropy (GAN, arXiv 1406.2661; RLGAF, arXiv 2305.06176).

    Targets and all other completions together weigh the same.

    Args:
        label_smoothing: Targets get the label 1 − label_smoothing; one-sided (arXiv 1606.03498).
    """

    def __init__(self, label_smoothing: float = 0.1) -> None:
        if not 0 <= label_smoothing < 0.5:
            raise LoraGANError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def __call__(self, outputs: Mapping[str, DiscriminatorOutput]) -> LossTerm:
        others = _all(outputs, [kind for kind in outputs if kind != TARGET]).score
        real = outputs[TARGET].score
        losses = {}
        if len(real):
            label = torch.full_like(real, 1 - self.label_smoothing)
            losses["real"] = binary_cross_entropy_with_logits(real, label)
        if len(others):
            losses["generated"] = binary_cross_entropy_with_logits(others, torch.zeros_like(others))
        return _mean_of(outputs, losses, "discriminator/error_")


class BradleyTerry(DiscriminatorObjective):
    """Target ≻ sample ≻ negative for the same prompt: −log σ(score of the better − score of the worse).

    As in Generative Adversarial Distillation (arXiv 2511.10643), with negatives below the samples. The loss is the
    mean over the kinds of pairs of their mean losses. A sample that equals the target is compared with negatives only.

    Args:
        samples_over_negatives: Whether samples are ranked above negatives. Set false if negatives may be as good as
            samples (wrong objects in a correct sentence).
        max_length_ratio: Pairs are left out in which one is more than so many times as long as the other, in tokens,
            so that the discriminator does not learn that longer is better, or shorter; such as 1.2. null keeps all.
    """

    def __init__(self, samples_over_negatives: bool = True, max_length_ratio: float | None = None) -> None:
        if max_length_ratio is not None and not max_length_ratio >= 1:
            raise LoraGANError(f"max_length_ratio must be at least 1 or null, got {max_length_ratio}")
        self.samples_over_negatives = samples_over_negatives
        self.max_length_ratio = math.inf if max_length_ratio is None else max_length_ratio

    def __call__(self, outputs: Mapping[str, DiscriminatorOutput]) -> LossTerm:
        generated = _all(outputs, [kind for kind in (SAMPLED, OPPONENT) if kind in outputs])
        worse = _all(outputs, negatives(outputs))
        ratio = self.max_length_ratio
        margins = {
            "target_sampled": margin(outputs[TARGET], generated, ratio),
            "target_negative": margin(outputs[TARGET], worse, ratio),
        }
        if self.samples_over_negatives:
            margins["sampled_negative"] = margin(generated, worse, ratio)
        losses = {name: softplus(-m).mean() for name, m in margins.items() if len(m)}
        return _mean_of(outputs, losses, "discriminator/error_")


class RewardRanking(DiscriminatorObjective):
    """Rank the completions of a prompt by their reward: mean of −log σ(score of the better − score of the worse).

    The pair loss of reward models (arXiv 2203.02155, eq. 1) on samples and targets. What all completions of a prompt
    have in common, such as the prompt's difficulty or the length of its answers, cannot help to tell them apart, as it
    can where every completion is judged by itself (:class:`ClosenessBCE`).
    """

    needs_rewards = True

    def __call__(self, outputs: Mapping[str, DiscriminatorOutput]) -> LossTerm:
        rewarded = [(x, reward, known) for _, x, reward, known in _rewarded(outputs)]
        if not rewarded:
            return _mean_of(outputs, {}, "discriminator/error_")
        score, prompt, reward = (
            torch.cat(values)
            for values in zip(*((x.score[known], x.prompt[known], r[known]) for x, r, known in rewarded), strict=True)
        )
        better = (prompt[:, None] == prompt[None, :]) & (reward[:, None] > reward[None, :])
        losses = softplus(score[None, :] - score[:, None])[better]
        return _mean_of(outputs, {"ranking": losses.mean()} if len(losses) else {}, "discriminator/error_")


class ListwiseSoftmax(DiscriminatorObjective):
    """Find the target among the other completions to its prompt: cross-entropy of a softmax over all of their scores.

    With one other completion this is the pair loss of TextGAIL (arXiv 2004.13796). Completions that equal the target
    are left out.
    """

    def __call__(self, outputs: Mapping[str, DiscriminatorOutput]) -> LossTerm:
        target = outputs[TARGET]
        others = _all(outputs, [kind for kind in outputs if kind != TARGET])
        rival = (others.prompt[None, :] == target.prompt[:, None]) & ~others.is_target[None, :]  # (B, M)
        scores = torch.where(rival, others.score[None, :], -torch.inf)
        total = torch.cat([target.score[:, None], scores], 1).logsumexp(1)
        asked = rival.any(1)
        losses = (total - target.score)[asked]
        return _mean_of(outputs, {"softmax": losses.mean()} if len(losses) else {}, "discriminator/error_")


class PairwisePayoff(DiscriminatorObjective):
    """Name the target among two: the expected payoff, 1 if it is named and ``tie`` for a tie (RARO, arXiv 2511.21667).

    RARO estimates its gradient from sampled verdicts; three probabilities give it exactly. The loss is
    −mean(payoff + entropy·H) over all pairs of a target and another completion to its prompt, with the entropy H of
    the three outcomes. A completion that equals the target is left out: there is nothing to tell apart, and a ``tie``
    below ½ would teach that such a pair is none.

    Args:
        tie: What a tie pays, in [0, 1]; above ½ it pays to call a tie when in doubt.
        entropy: Weight of H, at least 0. Before anything is learned, a tie above ½ pays best; with 0 it soon has all of
            the probability, and there the payoff has no slope.
    """

    needs_comparison = True

    def __init__(self, tie: float = 0.55, entropy: float = 0.2) -> None:
        if not 0 <= tie <= 1:
            raise LoraGANError(f"tie of PairwisePayoff must be in [0, 1], got {tie}")
        if not 0 <= entropy < math.inf:
            raise LoraGANError(f"entropy of PairwisePayoff must be at least 0 and finite, got {entropy}")
        self.tie, self.entropy = tie, entropy

    def __call__(self, outputs: Mapping[str, DiscriminatorOutput]) -> LossTerm:
        others = [x for kind, x in outputs.items() if kind != TARGET]
        paired = [torch.isin(x.prompt, outputs[TARGET].prompt) & ~x.is_target for x in others]
        if not any(pairs.any() for pairs in paired):
            return _mean_of(outputs, {}, "")
        of_pairs = [davidson(-x.score[pairs], x.auxiliary[pairs]) for x, pairs in zip(others, paired, strict=True)]
        outcomes = torch.cat(of_pairs, 1)  # (3, M)
        named, _, tied = outcomes
        payoff, entropy = (named + self.tie * tied).mean(), torch.special.entr(outcomes).sum(0).mean()
        found = {"discriminator/payoff": payoff.detach(), "discriminator/ties": tied.detach().mean()}
        return LossTerm(-payoff - self.entropy * entropy, found)


class Auxiliary(DiscriminatorObjective):
    """Predict one part of the reward, such as perplexity, with the auxiliary head: mean squared error.

    Args:
        part: Name of the reward.
    """

    needs_auxiliary = True
    needs_rewards = True

    def __init__(self, part: str = "perplexity") -> None:
        self.part = part

    def __call__(self, outputs: Mapping[str, DiscriminatorOutput]) -> LossTerm:
        rewarded = list(_rewarded(outputs))
        for _, x, _, _ in rewarded:
            if self.part not in x.parts:
                names = ", ".join(x.parts) or "none"
                raise LoraGANError(f"no reward is named {self.part!r}; set part: to one of: {names}")
        errors = {kind: (x.auxiliary - x.parts[self.part])[known].square().mean() for kind, x, _, known in rewarded}
        return _mean_of(outputs, errors, "discriminator/auxiliary_error_")


class Combined(DiscriminatorObjective):
    """Weighted sum of objectives. A metric that several of them log gets the number of its objective as a suffix.

    Args:
        objectives: The objectives, at least one.
        weights: One weight for each; by default all 1.
    """

    def __init__(self, objectives: list[DiscriminatorObjective], weights: list[float] | None = None) -> None:
        self.objectives = objectives
        self.weights = weights or [1.0] * len(objectives)
        self.needs_auxiliary = any(objective.needs_auxiliary for objective in objectives)
        self.needs_comparison = any(objective.needs_comparison for objective in objectives)
        self.needs_rewards = any(objective.needs_rewards for objective in objectives)
        if not objectives or len(self.weights) != len(objectives):
            raise LoraGANError(
                f"need at least one objective and a weight for each, got {len(objectives)} objectives and "
                f"{len(self.weights)} weights"
            )

    def __call__(self, outputs: Mapping[str, DiscriminatorOutput]) -> LossTerm:
        terms = [objective(outputs) for objective in self.objectives]
        loss = torch.stack([w * term.loss for w, term in zip(self.weights, terms, strict=True)]).sum()
        metrics: dict[str, Tensor] = {}
        for number, term in enumerate(terms, 1):
            metrics |= {f"{name}_{number}" if name in metrics else name: x for name, x in term.metrics.items()}
        return LossTerm(loss, metrics)


class _Scored(NamedTuple):
    """Scores of several kinds together."""

    score: Tensor
    prompt: Tensor
    is_target: Tensor
    length: Tensor


def negatives(outputs: Mapping[str, DiscriminatorOutput]) -> list[str]:
    """Kinds of completions that are neither targets nor generated."""
    return [kind for kind in outputs if kind not in (TARGET, SAMPLED, OPPONENT)]


def margin(
    better: DiscriminatorOutput | _Scored, worse: DiscriminatorOutput | _Scored, max_length_ratio: float = math.inf
) -> Tensor:
    """Score of the better minus that of the worse, for all pairs of completions of the same prompt.

    Pairs of a target with itself do not count, nor those whose lengths differ more than ``max_length_ratio`` times.
    """
    same = better.prompt[:, None] == worse.prompt[None, :]
    near = (better.length[:, None] / worse.length[None, :]).log().abs() <= math.log(max_length_ratio)
    pairs = same & near & ~(better.is_target[:, None] & worse.is_target[None, :])
    return (better.score[:, None] - worse.score[None, :])[pairs]


def discriminator_metrics(outputs: Mapping[str, DiscriminatorOutput]) -> dict[str, Tensor]:
    """Metrics of the discriminator on completions that it has not learned from.

    ``discriminator/accuracy`` is the share of pairs in which it scores the target above another completion to the same
    prompt, and ``discriminator/accuracy_<kind>`` that of one kind. ``discriminator/length_accuracy`` is the
    accuracy, on the same pairs, of the better of the two rules "the longer one is the target" and "the shorter one".
    """
    metrics = {f"discriminator/score_{kind}": x.score.mean() for kind, x in outputs.items() if len(x.score)}
    target = outputs[TARGET]
    others = {kind: x for kind, x in outputs.items() if kind != TARGET}
    margins = {kind: margin(target, x) for kind, x in others.items()}
    metrics |= {f"discriminator/accuracy_{kind}": share_won(m) for kind, m in margins.items() if len(m)}
    together = torch.cat(list(margins.values()))
    if len(together):
        metrics[ACCURACY] = share_won(together)
        longer = share_won(torch.cat([margin(_by_length(target), _by_length(x)) for x in others.values()]))
        metrics["discriminator/length_accuracy"] = torch.maximum(longer, 1 - longer)
    sampled = outputs[SAMPLED]
    known = sampled.score[:0].bool() if sampled.reward is None else sampled.reward.isfinite()
    if sampled.reward is not None and known.sum() > 1:
        metrics["discriminator/correlation"] = _correlation(sampled.score[known], sampled.reward[known])
    return metrics


def share_won(margins: Tensor) -> Tensor:
    """Share of positive margins; ties count half."""
    return ((margins > 0).float() + (margins == 0).float() / 2).mean()


def _by_length(outputs: DiscriminatorOutput) -> _Scored:
    return _Scored(outputs.length.float(), outputs.prompt, outputs.is_target, outputs.length)


def _all(outputs: Mapping[str, DiscriminatorOutput], kinds: Sequence[str]) -> _Scored:
    """The completions of several kinds together."""
    chosen = [outputs[kind] for kind in kinds]
    if not chosen:
        none = outputs[TARGET].prompt[:0]
        return _Scored(outputs[TARGET].score[:0], none, none.bool(), none)
    fields = zip(*((x.score, x.prompt, x.is_target, x.length) for x in chosen), strict=True)
    return _Scored(*(torch.cat(field) for field in fields))


def _rewarded(
    outputs: Mapping[str, DiscriminatorOutput],
) -> Iterator[tuple[str, DiscriminatorOutput, Tensor, Tensor]]:
    """The kinds that have rewards, with the rewards (M,) and where one applies; elsewhere nothing can be learned."""
    for kind, x in outputs.items():
        if x.reward is not None and (known := x.reward.isfinite()).any():
            yield kind, x, x.reward, known


def _closeness(outputs: DiscriminatorOutput) -> Tensor:
    """(M,) in [0, 1]: 1 for the target itself, the reward where one applies and else NaN, 0 for negatives."""
    known = torch.zeros_like(outputs.score) if outputs.reward is None else outputs.reward.clamp(0, 1)
    return torch.where(outputs.is_target, 1.0, known).detach()


def _each_kind(outputs: Mapping[str, DiscriminatorOutput], loss: Callable[[Tensor, Tensor], Tensor]) -> LossTerm:
    """Mean over the kinds of the loss of score and closeness, where the closeness is known."""
    losses = {}
    for kind, x in outputs.items():
        closeness = torch.ones_like(x.score) if kind == TARGET else _closeness(x)
        known = closeness.isfinite()
        if known.any() and (kind != OPPONENT or x.reward is not None):
            losses[kind] = loss(x.score[known], closeness[known])
    return _mean_of(outputs, losses, "discriminator/error_")


def _mean_of(outputs: Mapping[str, DiscriminatorOutput], losses: Mapping[str, Tensor], prefix: str) -> LossTerm:
    """Unweighted mean of the losses; 0 if there are none."""
    metrics = {f"{prefix}{name}": loss.detach() for name, loss in losses.items()}
    nothing = outputs[TARGET].score.new_zeros((), requires_grad=True)
    total = torch.stack(list(losses.values())).mean() if losses else nothing
    return LossTerm(total, metrics)


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson correlation; 0 if one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    return torch.nn.functional.cosine_similarity(x, y, dim=0)
