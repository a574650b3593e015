"""What the discriminator learns: its opinion of targets, samples and worse answers → its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, softplus

from lora_gan.errors import LoraGANError
from lora_gan.types import Judged, LossTerm

SAMPLED, TARGET, OPPONENT = "sampled", "target", "opponent"


class DiscriminatorObjective(ABC):
    """Turns the discriminator's opinions into its loss."""

    @abstractmethod
    def __call__(self, judged: Mapping[str, Judged]) -> LossTerm:
        """The loss of one update.

        Args:
            judged: Opinions by kind: "target", "sampled", in self-play "opponent"; every other kind is a negative.
        """


class RewardRegression(DiscriminatorObjective):
    """Predict the reward: mean squared error; samples, targets and negatives weigh the same.

    Negatives are labelled by hand, because a similarity reward gives a fluent wrong answer nearly the target's score.

    Args:
        junk_reward: What the discriminator shall predict for negatives.
    """

    def __init__(self, junk_reward: float = 0.0) -> None:
        self.junk_reward = junk_reward

    def __call__(self, judged: Mapping[str, Judged]) -> LossTerm:
        junk = _all(judged, negatives(judged)).score
        losses = {
            kind: (x.score - x.reward).square().mean()
            for kind, x in judged.items()
            if x.reward is not None and len(x.score)
        }
        if len(junk):
            losses["junk"] = (junk - self.junk_reward).square().mean()
        return _mean_of(judged, losses, "judge/error_")


class ClosenessYesNo(DiscriminatorObjective):
    """Is the answer as good as the target? Binary cross-entropy of σ(score), GPT2Twin's P(close).

    Targets are close, negatives are not; a sampled answer is where it is the target or its reward says so.

    Args:
        close_from: Smallest reward of a sampled answer that counts as close.
    """

    def __init__(self, close_from: float = 0.9) -> None:
        self.close_from = close_from

    def __call__(self, judged: Mapping[str, Judged]) -> LossTerm:
        labels = {
            kind: torch.ones_like(x.score) if kind == TARGET else (_closeness(x) >= self.close_from).float()
            for kind, x in judged.items()
        }
        return _each_kind(judged, labels, binary_cross_entropy_with_logits)


class ClosenessScore(DiscriminatorObjective):
    """How close is the answer to the target, from 0 to 1? Squared error of σ(score), GPT2Twin's regression.

    Targets are 1, negatives 0, sampled answers their reward, cut to [0, 1].
    """

    def __call__(self, judged: Mapping[str, Judged]) -> LossTerm:
        labels = {kind: torch.ones_like(x.score) if kind == TARGET else _closeness(x) for kind, x in judged.items()}
        return _each_kind(judged, labels, lambda score, label: (score.sigmoid() - label).square().mean())


class ClosenessGrades(DiscriminatorObjective):
    """Which of k ordered grades of closeness does the answer have? The cumulative-link model (McCullagh 1980).

    P(grade ≥ j) = σ(score − θ_j) with θ_j = logit(j/k): σ(score) is a closeness from 0 to 1 as in the other two, and
    the grade is the one of k equal parts of [0, 1] into which it falls. The loss is the negative log-likelihood.

    Args:
        grades: k, at least 2.
    """

    def __init__(self, grades: int = 5) -> None:
        if grades < 2:
            raise LoraGANError(f"grades must be at least 2, got {grades}")
        self.grades = grades

    def __call__(self, judged: Mapping[str, Judged]) -> LossTerm:
        labels = {kind: torch.ones_like(x.score) if kind == TARGET else _closeness(x) for kind, x in judged.items()}
        return _each_kind(judged, labels, self._likelihood)

    def _likelihood(self, score: Tensor, closeness: Tensor) -> Tensor:
        borders = (torch.arange(self.grades + 1, device=score.device) / self.grades).logit()  # θ_0 = −∞, θ_k = ∞
        grade = (closeness * self.grades).floor().clamp(max=self.grades - 1).long()
        low, high = borders[grade], borders[grade + 1]
        # σ(s − low) − σ(s − high) = σ(s − low)·σ(high − s)·(1 − exp(low − high)), which neither cancels nor saturates
        likelihood = logsigmoid(score - low) + logsigmoid(high - score) + (-(low - high).exp()).log1p()
        return -likelihood.mean()


class RealGenerated(DiscriminatorObjective):
    """Tell targets from everything else: binary cross-entropy (GAN, arXiv 1406.2661; RLGAF, arXiv 2305.06176).

    Targets and the others weigh the same.

    Args:
        label_smoothing: Targets are labelled 1 − this, one-sided (arXiv 1606.03498).
    """

    def __init__(self, label_smoothing: float = 0.1) -> None:
        if not 0 <= label_smoothing < 0.5:
            raise LoraGANError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def __call__(self, judged: Mapping[str, Judged]) -> LossTerm:
        others = _all(judged, [kind for kind in judged if kind != TARGET]).score
        real = judged[TARGET].score
        losses = {}
        if len(real):
            label = torch.full_like(real, 1 - self.label_smoothing)
            losses["real"] = binary_cross_entropy_with_logits(real, label)
        if len(others):
            losses["generated"] = binary_cross_entropy_with_logits(others, torch.zeros_like(others))
        return _mean_of(judged, losses, "judge/error_")


class BradleyTerry(DiscriminatorObjective):
    """Target ≻ sample ≻ negative for the same prompt: −log σ(score of the better − score of the worse).

    As in Generative Adversarial Distillation (arXiv 2511.10643), with negatives below the samples. Pairs of one kind
    are averaged, and so are the kinds. A sample that is the target word for word is compared with negatives only.

    Args:
        samples_over_negatives: Whether samples are ranked above negatives. Where negatives are as good as the samples
            (wrong objects in a right sentence), leave it off.
    """

    def __init__(self, samples_over_negatives: bool = True) -> None:
        self.samples_over_negatives = samples_over_negatives

    def __call__(self, judged: Mapping[str, Judged]) -> LossTerm:
        generated = _all(judged, [kind for kind in (SAMPLED, OPPONENT) if kind in judged])
        worse = _all(judged, negatives(judged))
        margins = {
            "target_sampled": margin(judged[TARGET], generated),
            "target_negative": margin(judged[TARGET], worse),
        }
        if self.samples_over_negatives:
            margins["sampled_negative"] = margin(generated, worse)
        losses = {name: softplus(-m).mean() for name, m in margins.items() if len(m)}
        return _mean_of(judged, losses, "judge/error_")


class PairSoftmax(DiscriminatorObjective):
    """Find the target among the other answers to its prompt: cross-entropy of a softmax over all of their scores.

    With one other answer this is TextGAIL's pair (arXiv 2004.13796). Answers that are the target word for word are
    left out.
    """

    def __call__(self, judged: Mapping[str, Judged]) -> LossTerm:
        target = judged[TARGET]
        others = _all(judged, [kind for kind in judged if kind != TARGET])
        rival = (others.prompt[None, :] == target.prompt[:, None]) & ~others.is_target[None, :]  # (B, M)
        scores = torch.where(rival, others.score[None, :], -torch.inf)
        total = torch.cat([target.score[:, None], scores], 1).logsumexp(1)
        asked = rival.any(1)
        losses = (total - target.score)[asked]
        return _mean_of(judged, {"softmax": losses.mean()} if len(losses) else {}, "judge/error_")


class Auxiliary(DiscriminatorObjective):
    """Let the auxiliary head predict one part of the reward, perplexity say: mean squared error.

    Args:
        part: Name of the reward.
    """

    def __init__(self, part: str = "perplexity") -> None:
        self.part = part

    def __call__(self, judged: Mapping[str, Judged]) -> LossTerm:
        known = {kind: x for kind, x in judged.items() if x.reward is not None and len(x.score)}
        for x in known.values():
            if self.part not in x.parts:
                names = ", ".join(x.parts) or "none"
                raise LoraGANError(f"no reward is called {self.part!r}, so none can be predicted; there are: {names}")
        errors = {kind: (x.auxiliary - x.parts[self.part]).square().mean() for kind, x in known.items()}
        return _mean_of(judged, errors, "judge/auxiliary_error_")


class Combined(DiscriminatorObjective):
    """A weighted sum of objectives. A metric that several of them log gets the objective's number behind its name.

    Args:
        objectives: What is learned at once.
        weights: One for each; all 1 if not given.
    """

    def __init__(self, objectives: list[DiscriminatorObjective], weights: list[float] | None = None) -> None:
        self.objectives = objectives
        self.weights = weights or [1.0] * len(objectives)
        if not objectives or len(self.weights) != len(objectives):
            raise LoraGANError(
                f"{len(objectives)} objectives need as many weights, at least one; got {len(self.weights)}"
            )

    def __call__(self, judged: Mapping[str, Judged]) -> LossTerm:
        terms = [objective(judged) for objective in self.objectives]
        loss = torch.stack([w * term.loss for w, term in zip(self.weights, terms, strict=True)]).sum()
        metrics: dict[str, Tensor] = {}
        for number, term in enumerate(terms, 1):
            metrics |= {f"{name}_{number}" if name in metrics else name: x for name, x in term.metrics.items()}
        return LossTerm(loss, metrics)


class _Opinions(NamedTuple):
    """Scores of several kinds together."""

    score: Tensor
    prompt: Tensor
    is_target: Tensor


def negatives(judged: Mapping[str, Judged]) -> list[str]:
    """The kinds that nobody generated and nobody wants."""
    return [kind for kind in judged if kind not in (TARGET, SAMPLED, OPPONENT)]


def margin(better: Judged | _Opinions, worse: Judged | _Opinions) -> Tensor:
    """Score of the better less that of the worse, for all pairs that answer the same prompt.

    Pairs of a target with itself do not count.
    """
    same = better.prompt[:, None] == worse.prompt[None, :]
    pairs = same & ~(better.is_target[:, None] & worse.is_target[None, :])
    return (better.score[:, None] - worse.score[None, :])[pairs]


def judge_metrics(judged: Mapping[str, Judged]) -> dict[str, Tensor]:
    """How good the discriminator was on answers that it had not learned from.

    ``judge/accuracy`` is the share of pairs in which it scores the target above another answer to the same prompt, and
    ``judge/accuracy_<kind>`` that of one kind. ``judge/length_accuracy`` is what the better of the two rules "the
    longer" and "the shorter one is the target" reaches on the same pairs.
    """
    metrics = {f"judge/score_{kind}": x.score.mean() for kind, x in judged.items() if len(x.score)}
    target = judged[TARGET]
    others = {kind: x for kind, x in judged.items() if kind != TARGET}
    margins = {kind: margin(target, x) for kind, x in others.items()}
    metrics |= {f"judge/accuracy_{kind}": _share_won(m) for kind, m in margins.items() if len(m)}
    together = torch.cat(list(margins.values()))
    if len(together):
        metrics["judge/accuracy"] = _share_won(together)
        longer = _share_won(torch.cat([margin(_by_length(target), _by_length(x)) for x in others.values()]))
        metrics["judge/length_accuracy"] = torch.maximum(longer, 1 - longer)
    sampled = judged[SAMPLED]
    if sampled.reward is not None and len(sampled.reward) > 1:
        metrics["judge/correlation"] = _correlation(sampled.score, sampled.reward)
    return metrics


def _share_won(margins: Tensor) -> Tensor:
    """Share of positive margins; ties count half."""
    return ((margins > 0).float() + (margins == 0).float() / 2).mean()


def _by_length(judged: Judged) -> _Opinions:
    return _Opinions(judged.length.float(), judged.prompt, judged.is_target)


def _all(judged: Mapping[str, Judged], kinds: Sequence[str]) -> _Opinions:
    """The answers of several kinds together."""
    chosen = [judged[kind] for kind in kinds]
    if not chosen:
        none = judged[TARGET].prompt[:0]
        return _Opinions(judged[TARGET].score[:0], none, none.bool())
    fields = zip(*((x.score, x.prompt, x.is_target) for x in chosen), strict=True)
    return _Opinions(*(torch.cat(field) for field in fields))


def _closeness(judged: Judged) -> Tensor:
    """(M,) in [0, 1]: 1 for the target itself, the reward where it is known, 0 for negatives."""
    known = torch.zeros_like(judged.score) if judged.reward is None else judged.reward.clamp(0, 1)
    return torch.where(judged.is_target, 1.0, known).detach()


def _each_kind(judged: Mapping[str, Judged], labels: Mapping[str, Tensor], loss: object) -> LossTerm:
    assert callable(loss)
    kinds = [kind for kind, x in judged.items() if len(x.score) and (kind != OPPONENT or x.reward is not None)]
    losses = {kind: loss(judged[kind].score, labels[kind]) for kind in kinds}
    return _mean_of(judged, losses, "judge/error_")


def _mean_of(judged: Mapping[str, Judged], losses: Mapping[str, Tensor], prefix: str) -> LossTerm:
    """The losses weigh the same; 0 where there are none."""
    metrics = {f"{prefix}{name}": loss.detach() for name, loss in losses.items()}
    nothing = judged[TARGET].score.new_zeros((), requires_grad=True)
    total = torch.stack(list(losses.values())).mean() if losses else nothing
    return LossTerm(total, metrics)


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's; 0 where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    return torch.nn.functional.cosine_similarity(x, y, dim=0)
