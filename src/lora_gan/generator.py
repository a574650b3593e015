"""The generator: how the policy learns from targets, advantages and the discriminator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lora_gan.backbone import GENERATOR, Backbone, LoraSettings, Predicted
from lora_gan.coefficients import CoefficientState
from lora_gan.discriminator import DiscriminatorModel, StraightThrough
from lora_gan.discriminator.objectives import SAMPLED, TARGET
from lora_gan.distributed import any_of, shares
from lora_gan.errors import LoraGANError
from lora_gan.losses import (
    POLICY_METRICS,
    RATIO_CAP,
    PolicyLoss,
    Reinforce,
    approx_kl,
    kl_loss,
    truncated_importance,
    value_loss,
)
from lora_gan.optimization import Optimization, adamw
from lora_gan.tensors import in_float32, join, masked_mean
from lora_gan.tree import PromptTree, grow_parts, grow_scored
from lora_gan.types import LossTerm, Minibatch, PromptBatch, Rollout

APPROX_KL = "policy/approx_kl"


@dataclass(frozen=True)
class GeneratorSettings:
    """The generator: its losses and how it is optimized.

    Args:
        policy_loss: How advantages become a loss; by default REINFORCE.
        straight_through: Relaxation of the samples through which the discriminator's gradient reaches the generator,
            where ``coefficients.coupled`` is not 0.
        value_clip: How far the value head's prediction may move in a step before its gradient is cut off.
        mask_truncated: Whether completions that the length limit cut off are left out of the policy's losses.
        supervised_minibatches: Optimizer steps in a training step without a policy loss, each on a part of the prompts.
            Few targets are learned better, and not by heart, one at a time.
        lora: Shape of its adapter.
        optimizer: Its optimizer; by default AdamW at a learning rate of 0.001, without weight decay.
        scheduler: Schedule of its learning rate, stepped once in each training step in which it learned.
        adapter: PEFT folder or hub id of the adapter from which it starts, of another run for example.
    """

    policy_loss: PolicyLoss | None = None
    straight_through: StraightThrough | None = None
    value_clip: float = 0.2
    mask_truncated: bool = False
    supervised_minibatches: int = 1
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerCallable = adamw
    scheduler: LRSchedulerCallable | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.supervised_minibatches < 1:
            raise LoraGANError(
                f"generator.supervised_minibatches must be at least 1, got {self.supervised_minibatches}"
            )
        if not self.value_clip > 0:
            raise LoraGANError(
                f"generator.value_clip must be > 0, got {self.value_clip}; a large one, 1e9, never clips"
            )


class Generator(nn.Module):
    """The policy's losses and updates; its LoRA matrices are the backbone's.

    Args:
        settings: Its parts; what is left out gets its default.
        value_head_size: Hidden size of the base, where the advantage needs a value head; 0: none is made.
        temperature: At which completions are sampled, so by which their log-probabilities are computed.
        max_new_tokens: Length limit of a completion.
        exact: Whether the policy that samples is the one that learns, but for rounding; else the importance ratios have
            a limit.

    Raises:
        LoraGANError: The given policy loss has none, and it is needed.
    """

    def __init__(
        self,
        settings: GeneratorSettings,
        value_head_size: int = 0,
        temperature: float = 1.0,
        max_new_tokens: int = 1,
        exact: bool = True,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.policy_loss = settings.policy_loss or Reinforce(ratio_cap=None if exact else RATIO_CAP)
        if not exact and isinstance(self.policy_loss, Reinforce) and self.policy_loss.ratio_cap is None:
            raise LoraGANError(
                "with sampling.base or an engine the policy that samples is not quite the one that learns: give "
                f"Reinforce a ratio_cap, such as {RATIO_CAP}, or leave them out"
            )
        self.policy_loss.max_new_tokens = max_new_tokens
        self.recomputes = not exact and self.policy_loss.recomputes and self.policy_loss.ratio_cap is not None
        self.straight_through = settings.straight_through or StraightThrough()
        self.value_head = nn.Linear(value_head_size, 1, dtype=torch.float32) if value_head_size else None
        self.temperature = {SAMPLED: temperature}
        self._losses: dict[str, Callable[[Mapping[str, Predicted], Minibatch], LossTerm]] = {
            "supervised": self._supervised_loss,
            "policy": self._policy_loss,
            "value": self._value_loss,
            "kl": self._kl_loss,
            "entropy": self._entropy_loss,
        }  # by the coefficient that is their weight; the coupled loss needs the discriminator, too

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps in a training step in which the policy learns."""
        return self.policy_loss.num_iterations * self.policy_loss.num_minibatches

    def trainable(self, backbone: Backbone) -> list[nn.Parameter]:
        """What its optimizer may change."""
        return backbone.parameters_of(GENERATOR) + list(self.value_head.parameters() if self.value_head else ())

    @torch.no_grad()
    def values(
        self, backbone: Backbone, rollout: Rollout, batch: PromptBatch, optimization: Optimization
    ) -> Tensor | None:
        """(N, T) of the value head before the update, 0 where nothing was sampled; None where there is no such head."""
        if self.value_head is None or len(rollout) == 0:
            return None
        branches, parts = {SAMPLED: rollout.by_prompt(len(batch))}, optimization.parts(len(batch))
        with backbone.generator():
            return join([self._values(backbone, tree) for tree in grow_parts(batch.prompt_ids, branches, parts)])

    def _values(self, backbone: Backbone, tree: PromptTree) -> Tensor:
        branches = tree.branches[SAMPLED]
        return self._value(backbone.hidden(tree)[branches.row[:, None], branches.parents])

    def update(
        self,
        backbone: Backbone,
        minibatch: Minibatch,
        prompts: Sequence[int],
        coefficients: CoefficientState,
        model: DiscriminatorModel,
        optimization: Optimization,
    ) -> dict[str, Tensor]:
        """Supervised loss on the targets and policy loss on the samples, in each optimizer step.

        Args:
            backbone: In any mode.
            minibatch: Everything that this training step can learn from.
            prompts: Which of its prompts count.
            coefficients: The weights of the losses.
            model: The discriminator's, for the coupled loss.
            optimization: Takes the optimizer steps.

        Returns:
            Metrics, the mean over the optimizer steps; empty where there was nothing to learn from.
        """
        reports: list[dict[str, Tensor]] = []
        corrected = _Corrected(minibatch, {})
        if self.recomputes and coefficients.policy and len(minibatch.rollout):
            corrected = self._corrected(backbone, minibatch, optimization)
            minibatch = corrected.minibatch
        for chosen in self._minibatches(prompts, bool(coefficients.policy)):
            part = minibatch.of(chosen)
            if not any_of(bool(self._weights(part, coefficients))):
                continue  # there is nothing to learn from
            with backbone.generator():
                reports.append(self._backward(backbone, part, coefficients, model, optimization))
                if "loss/generator" not in reports[-1]:
                    break
                optimization.step(GENERATOR)
        metrics = {name: torch.stack([m[name] for m in reports if name in m]).mean() for m in reports for name in m}
        if reports and coefficients.policy and self.updates_per_step > 1:
            metrics["policy/updates"] = torch.tensor(float(sum("loss/generator" in m for m in reports)))
            metrics[APPROX_KL] = reports[-1][APPROX_KL]
        return {**metrics, **corrected.metrics}

    @torch.no_grad()
    def _corrected(self, backbone: Backbone, minibatch: Minibatch, optimization: Optimization) -> _Corrected:
        """As if the policy that learns had sampled: its log-probabilities, and weighted advantages."""
        rollout, advantages, prompts = minibatch.rollout, minibatch.advantages, len(minibatch.batch)
        branches, parts = {SAMPLED: rollout.by_prompt(prompts)}, optimization.parts(prompts)
        with backbone.generator():
            found = backbone.logprobs_of(minibatch.batch.prompt_ids, branches, parts, self.temperature)
        logprobs = found[SAMPLED]
        assert self.policy_loss.ratio_cap is not None
        importance = truncated_importance(logprobs, rollout, self.policy_loss.ratio_cap)
        weighted = replace(advantages, per_token=importance.weights * advantages.per_token)
        learned = replace(minibatch, rollout=replace(rollout, logprobs=logprobs), advantages=weighted)
        return _Corrected(learned, importance.metrics)

    def _backward(
        self,
        backbone: Backbone,
        minibatch: Minibatch,
        coefficients: CoefficientState,
        model: DiscriminatorModel,
        optimization: Optimization,
    ) -> dict[str, Tensor]:
        """The gradient of one optimizer step, in one or several passes.

        Returns:
            Metrics; without "loss/generator" the policy has moved too far for another step, and there is no gradient.
        """
        weights, counts = self._weights(minibatch, coefficients), self._counts(minibatch)
        share = dict(zip(counts, shares(*counts.values()), strict=True))
        passes = optimization.micro_batches(len(minibatch.batch))
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for number, prompts in enumerate(passes, 1):
            part = minibatch.of(prompts)
            found = self.losses(backbone, part, coefficients, model)
            portion = {name: n / counts[name] if counts[name] else 1.0 for name, n in self._counts(part).items()}
            for metric, value in _weighted_metrics(found, portion).items():
                metrics[metric] = metrics.get(metric, 0) + value
            moved = metrics.get(APPROX_KL, torch.zeros(()))
            if number == len(passes) and any_of(bool(moved > self.policy_loss.target_kl)):
                optimization.discard(GENERATOR)
                return metrics
            weighted = {name: weights[name] * (share[name] * portion[name]) * term.loss for name, term in found.items()}
            losses.append(optimization.backward(GENERATOR, weighted))
        return {**metrics, "loss/generator": torch.stack(losses).sum()}

    def losses(
        self, backbone: Backbone, minibatch: Minibatch, coefficients: CoefficientState, model: DiscriminatorModel
    ) -> dict[str, LossTerm]:
        """The losses that count, before their weights, from one pass in the generator's mode; none without prompts."""
        weights, batch, rollout = self._weights(minibatch, coefficients), minibatch.batch, minibatch.rollout
        if not weights or not len(batch):
            return {}
        branches: dict[str, list[list[Tensor]]] = {}
        if weights.keys() - {"supervised"}:
            branches[SAMPLED] = rollout.by_prompt(len(batch))
        if "supervised" in weights:
            branches[TARGET] = batch.targets_by_prompt
        tree = grow_scored(batch.prompt_ids, branches)
        predicted = backbone.predict(tree, self.temperature, with_entropy="entropy" in weights)
        terms = {name: self._losses[name](predicted, minibatch) for name in weights if name != "coupled"}
        if "coupled" in weights:
            coupled = self.straight_through(backbone, model, predicted[SAMPLED], rollout, batch)
            terms["coupled"] = LossTerm(coupled, {})
        return terms

    def _weights(self, minibatch: Minibatch, coefficients: CoefficientState) -> dict[str, Tensor]:
        """The weights of the losses that count in this step."""
        weights = {name: getattr(coefficients, name) for name in (*self._losses, "coupled")}
        if not minibatch.batch.with_target:
            del weights["supervised"]
        if self.value_head is None or not coefficients.policy:
            del weights["value"]
        return {name: weight for name, weight in weights.items() if weight}

    def _counts(self, minibatch: Minibatch) -> dict[str, int]:
        """How many tokens, or completions, each loss is the mean of, and the metric for which it is another number.

        They weight the means of several passes and processes, so that together they are the mean of all.
        """
        batch, rollout = minibatch.batch, minibatch.rollout
        mask = self._counted(rollout).mask
        counts = dict.fromkeys((*self._losses, *POLICY_METRICS), int(mask.sum()))
        counts["policy"] = self.policy_loss.count(mask)
        counts["supervised"] = sum(len(batch.target_ids[b]) for b in batch.with_target)
        return {**counts, "coupled": len(rollout), APPROX_KL: int(rollout.mask.sum())}

    def _supervised_loss(self, predicted: Mapping[str, Predicted], minibatch: Minibatch) -> LossTerm:
        target = predicted[TARGET]
        return LossTerm(-masked_mean(target.logprobs, target.branches.mask), {})

    def _policy_loss(self, predicted: Mapping[str, Predicted], minibatch: Minibatch) -> LossTerm:
        logprobs = predicted[SAMPLED].logprobs
        policy = self.policy_loss(logprobs, self._counted(minibatch.rollout), minibatch.advantages)
        return LossTerm(policy.loss, {**policy.metrics, APPROX_KL: approx_kl(logprobs, minibatch.rollout)})

    def _value_loss(self, predicted: Mapping[str, Predicted], minibatch: Minibatch) -> LossTerm:
        values = self._value(predicted[SAMPLED].states)
        counted = self._counted(minibatch.rollout)
        return LossTerm(value_loss(values, counted, minibatch.advantages, self.settings.value_clip), {})

    def _kl_loss(self, predicted: Mapping[str, Predicted], minibatch: Minibatch) -> LossTerm:
        counted = self._counted(minibatch.rollout)
        return LossTerm(kl_loss(predicted[SAMPLED].logprobs, counted, minibatch.reference_logprobs), {})

    def _entropy_loss(self, predicted: Mapping[str, Predicted], minibatch: Minibatch) -> LossTerm:
        entropy = predicted[SAMPLED].entropy
        assert entropy is not None
        return LossTerm(-masked_mean(entropy, self._counted(minibatch.rollout).mask), {})

    def _value(self, states: Tensor) -> Tensor:
        """(N, T, H) → (N, T)."""
        assert self.value_head is not None
        return in_float32(self.value_head, states).squeeze(-1)

    def _counted(self, rollout: Rollout) -> Rollout:
        """The completions, truncated ones masked where they must not count."""
        if not self.settings.mask_truncated:
            return rollout
        return replace(rollout, mask=rollout.mask & ~rollout.truncated[:, None])

    def _minibatches(self, prompts: Sequence[int], policy: bool) -> Iterator[list[int]]:
        """Which prompts each optimizer step learns from."""
        iterations, parts = self.policy_loss.num_iterations, self.policy_loss.num_minibatches
        if not policy:
            iterations, parts = 1, self.settings.supervised_minibatches
        for _ in range(iterations):
            if parts == 1:
                yield list(prompts)
            else:
                order = torch.randperm(len(prompts)).tensor_split(min(parts, len(prompts)))
                yield from ([prompts[i] for i in part.tolist()] for part in order)


@dataclass(frozen=True)
class _Corrected:
    """What the policy learns from, where another one sampled it, and metrics of the difference."""

    minibatch: Minibatch
    metrics: Mapping[str, Tensor]


def _weighted_metrics(terms: Mapping[str, LossTerm], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """What the losses of a pass report, times the weight of the metric or else of the loss."""
    metrics = {}
    for name, term in terms.items():
        for metric, value in {**term.metrics, f"loss/{name}": term.loss}.items():
            metrics[metric] = weights.get(metric, weights[name]) * value.detach()
    return metrics


def easiest(returns: Tensor, share: float) -> list[int]:
    """The prompts whose completions the discriminator scores best on average.

    Args:
        returns: (B, K) scores of the completions.
        share: How many of the B prompts, as a share in (0, 1]; at least one.
    """
    kept = returns.mean(1).argsort(descending=True)[: max(1, math.ceil(share * len(returns)))]
    return sorted(kept.tolist())
