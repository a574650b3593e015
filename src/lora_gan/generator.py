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
from lora_gan.losses import PolicyLoss, Reinforce, approx_kl, kl_loss, value_loss
from lora_gan.optimization import adamw
from lora_gan.tensors import masked_mean
from lora_gan.tree import grow_scored
from lora_gan.types import LossTerm, Minibatch, Optimize, PromptBatch, Rollout


@dataclass(frozen=True)
class GeneratorSettings:
    """The generator: its losses and how it is optimized.

    Args:
        policy_loss: How advantages become a loss; by default REINFORCE.
        straight_through: Relaxation of the samples through which the discriminator's gradient reaches the generator,
            where ``coefficients.coupled`` is not 0.
        value_clip: How far the value head's prediction may move in a step before its gradient is cut off.
        mask_truncated: Whether completions that the length limit cut off are left out of the policy's losses.
        lora: Shape of its adapter.
        optimizer: Its optimizer; by default AdamW at a learning rate of 0.001, without weight decay.
        scheduler: Schedule of its learning rate, stepped once in each training step in which it learned.
        adapter: PEFT folder or hub id of the adapter from which it starts, of another run for example.
    """

    policy_loss: PolicyLoss | None = None
    straight_through: StraightThrough | None = None
    value_clip: float = 0.2
    mask_truncated: bool = False
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerCallable = adamw
    scheduler: LRSchedulerCallable | None = None
    adapter: str | None = None


class Generator(nn.Module):
    """The policy's losses and updates; its LoRA matrices are the backbone's.

    Args:
        settings: Its parts; what is left out gets its default.
        value_head_size: Hidden size of the base, where the advantage needs a value head; 0: none is made.
        temperature: At which completions are sampled, so by which their log-probabilities are computed.
    """

    def __init__(self, settings: GeneratorSettings, value_head_size: int = 0, temperature: float = 1.0) -> None:
        super().__init__()
        self.settings = settings
        self.policy_loss = settings.policy_loss or Reinforce()
        self.straight_through = settings.straight_through or StraightThrough()
        self.value_head = nn.Linear(value_head_size, 1) if value_head_size else None
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
    def values(self, backbone: Backbone, rollout: Rollout, batch: PromptBatch) -> Tensor | None:
        """(N, T) of the value head before the update; None where there is none."""
        if self.value_head is None or len(rollout) == 0:
            return None
        tree = grow_scored(batch.prompt_ids, {SAMPLED: rollout.by_prompt(len(batch))})
        branches = tree.branches[SAMPLED]
        with backbone.generator():
            return self._value(backbone.hidden(tree)[branches.row[:, None], branches.parents])

    def update(
        self,
        backbone: Backbone,
        minibatch: Minibatch,
        prompts: Sequence[int],
        coefficients: CoefficientState,
        model: DiscriminatorModel,
        optimize: Optimize,
    ) -> dict[str, Tensor]:
        """Supervised loss on the targets and policy loss on the samples, one forward and backward per optimizer step.

        Args:
            backbone: In any mode.
            minibatch: Everything that this training step can learn from.
            prompts: Which of its prompts count.
            coefficients: The weights of the losses.
            model: The discriminator's, for the coupled loss.
            optimize: Takes one optimizer step on the named terms of a loss.

        Returns:
            Metrics, the mean over the optimizer steps; empty where there was nothing to learn from.
        """
        reports: list[dict[str, Tensor]] = []
        for part in self._minibatches(prompts, bool(coefficients.policy)):
            with backbone.generator():
                terms, metrics = self.losses(backbone, minibatch.of(part), coefficients, model)
                if not any_of(bool(terms)):
                    return {}
                reports.append(metrics)
                moved = metrics.get("policy/approx_kl", torch.zeros(()))
                if any_of(bool(moved > self.policy_loss.target_kl)):
                    break
                terms = terms or {"nothing": 0 * backbone.parameters_of(GENERATOR)[0].sum()}  # others have some
                optimize(terms)
                metrics["loss/generator"] = torch.stack(list(terms.values())).sum()
        metrics = {name: torch.stack([m[name] for m in reports if name in m]).mean() for m in reports for name in m}
        if coefficients.policy and self.updates_per_step > 1:
            metrics["policy/updates"] = torch.tensor(float(sum("loss/generator" in m for m in reports)))
            metrics["policy/approx_kl"] = reports[-1]["policy/approx_kl"]
        return {name: value.detach() for name, value in metrics.items()}

    def losses(
        self, backbone: Backbone, minibatch: Minibatch, coefficients: CoefficientState, model: DiscriminatorModel
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weighted terms of the loss, with gradient, and metrics about them; in the generator's mode."""
        weights, share = self._weights(minibatch, coefficients), self._shares(minibatch)
        batch, rollout = minibatch.batch, minibatch.rollout
        branches: dict[str, list[list[Tensor]]] = {}
        if weights.keys() - {"supervised"}:
            branches[SAMPLED] = rollout.by_prompt(len(batch))
        if "supervised" in weights:
            branches[TARGET] = batch.targets_by_prompt
        if not branches:
            return {}, {}
        predicted = backbone.predict(grow_scored(batch.prompt_ids, branches), self.temperature)
        terms = {name: loss(predicted, minibatch) for name, loss in self._losses.items() if name in weights}
        if "coupled" in weights:
            coupled = self.straight_through(backbone, model, predicted[SAMPLED], rollout, batch)
            terms["coupled"] = LossTerm(coupled, {})
        metrics = {name: value for term in terms.values() for name, value in term.metrics.items()}
        metrics |= {f"loss/{name}": term.loss.detach() for name, term in terms.items()}
        return {name: weight * share[name] * terms[name].loss for name, weight in weights.items()}, metrics

    def _weights(self, minibatch: Minibatch, coefficients: CoefficientState) -> dict[str, Tensor]:
        """The weights of the losses that count in this step."""
        weights = {name: getattr(coefficients, name) for name in (*self._losses, "coupled")}
        if not minibatch.batch.with_target:
            del weights["supervised"]
        if self.value_head is None or not coefficients.policy:
            del weights["value"]
        return {name: weight for name, weight in weights.items() if weight}

    def _shares(self, minibatch: Minibatch) -> dict[str, float]:
        """By loss, the factor that makes the mean of all processes' gradients the mean over all of their tokens."""
        batch, rollout = minibatch.batch, minibatch.rollout
        wanted = sum(len(batch.target_ids[b]) for b in batch.with_target)
        target, sampled, completions = shares(wanted, int(self._counted(rollout).mask.sum()), len(rollout))
        return dict.fromkeys(self._losses, sampled) | {"supervised": target, "coupled": completions}

    def _supervised_loss(self, predicted: Mapping[str, Predicted], minibatch: Minibatch) -> LossTerm:
        target = predicted[TARGET]
        return LossTerm(-masked_mean(target.logprobs, target.branches.mask), {})

    def _policy_loss(self, predicted: Mapping[str, Predicted], minibatch: Minibatch) -> LossTerm:
        logprobs = predicted[SAMPLED].logprobs
        policy = self.policy_loss(logprobs, self._counted(minibatch.rollout), minibatch.advantages)
        return LossTerm(policy.loss, {**policy.metrics, "policy/approx_kl": approx_kl(logprobs, minibatch.rollout)})

    def _value_loss(self, predicted: Mapping[str, Predicted], minibatch: Minibatch) -> LossTerm:
        values = self._value(predicted[SAMPLED].states)
        counted = self._counted(minibatch.rollout)
        return LossTerm(value_loss(values, counted, minibatch.advantages, self.settings.value_clip), {})

    def _kl_loss(self, predicted: Mapping[str, Predicted], minibatch: Minibatch) -> LossTerm:
        counted = self._counted(minibatch.rollout)
        return LossTerm(kl_loss(predicted[SAMPLED].logprobs, counted, minibatch.reference_logprobs), {})

    def _entropy_loss(self, predicted: Mapping[str, Predicted], minibatch: Minibatch) -> LossTerm:
        return LossTerm(-masked_mean(predicted[SAMPLED].entropy, self._counted(minibatch.rollout).mask), {})

    def _value(self, states: Tensor) -> Tensor:
        """(N, T, H) → (N, T)."""
        assert self.value_head is not None
        values: Tensor = self.value_head(states.float()).squeeze(-1)
        return values

    def _counted(self, rollout: Rollout) -> Rollout:
        """The completions, truncated ones masked where they must not count."""
        if not self.settings.mask_truncated:
            return rollout
        return replace(rollout, mask=rollout.mask & ~rollout.truncated[:, None])

    def _minibatches(self, prompts: Sequence[int], policy: bool) -> Iterator[list[int]]:
        """Which prompts each optimizer step learns from."""
        iterations, parts = self.policy_loss.num_iterations, self.policy_loss.num_minibatches
        if not policy:
            iterations = parts = 1
        for _ in range(iterations):
            if parts == 1:
                yield list(prompts)
            else:
                order = torch.randperm(len(prompts)).tensor_split(min(parts, len(prompts)))
                yield from ([prompts[i] for i in part.tolist()] for part in order)


def easiest(returns: Tensor, share: float) -> list[int]:
    """The prompts whose completions the discriminator scores best on average.

    Args:
        returns: (B, K) scores of the completions.
        share: How many of the B prompts, as a share in (0, 1]; at least one.
    """
    kept = returns.mean(1).argsort(descending=True)[: max(1, math.ceil(share * len(returns)))]
    return sorted(kept.tolist())
