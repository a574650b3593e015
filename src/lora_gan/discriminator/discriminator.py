"""Discriminator: its settings, its batch, and its update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_gan.backbone import DISCRIMINATOR, Backbone, LoraSettings
from lora_gan.discriminator.models import AdapterDiscriminator, DiscriminatorModel
from lora_gan.discriminator.negatives import HardNegatives, Negatives
from lora_gan.discriminator.objectives import (
    OPPONENT,
    SAMPLED,
    TARGET,
    DiscriminatorObjective,
    RewardRegression,
    discriminator_metrics,
)
from lora_gan.discriminator.replay import Episode, Replay
from lora_gan.discriminator.restored import score
from lora_gan.distributed import any_of
from lora_gan.errors import LoraGANError
from lora_gan.optimization import Optimization, adamw
from lora_gan.types import (
    DiscriminatorBatch,
    DiscriminatorOutput,
    DiscriminatorScores,
    PromptBatch,
    Rollout,
    Scores,
)


@dataclass(frozen=True)
class DiscriminatorSettings:
    """The discriminator: its architecture, its objective, and how it is optimized.

    Args:
        model: Its architecture; by default the second adapter on the shared base.
        objective: What it learns; by default to predict the reward.
        negatives: Worse completions that it learns from; by default one hard negative for each prompt.
        replay: Buffer of old samples that it learns from again; by default none.
        samples: Whether completions are sampled for it alone, in a step in which the generator needs none. False: it
            learns from targets and negatives then, as a reward model learns from preferences.
        lora: Shape of its adapter.
        optimizer: Its optimizer; by default AdamW at a learning rate of 0.001, without weight decay.
        scheduler: Schedule of its learning rate, stepped once in each training step in which it learns.
        adapter: Folder of the adapter and head from which it starts.
    """

    model: DiscriminatorModel | None = None
    objective: DiscriminatorObjective | None = None
    negatives: list[Negatives] | None = None
    replay: Replay | None = None
    samples: bool = True
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerCallable = adamw
    scheduler: LRSchedulerCallable | None = None
    adapter: str | None = None


class Discriminator(nn.Module):
    """Scores completions and learns from them by its objective.

    Args:
        settings: Its parts and their defaults.
    """

    def __init__(self, settings: DiscriminatorSettings = DiscriminatorSettings()) -> None:
        super().__init__()
        self.settings = settings
        self.model = settings.model or AdapterDiscriminator()
        self.objective = settings.objective or RewardRegression()
        self.negatives = [HardNegatives()] if settings.negatives is None else list(settings.negatives)
        self.replay = settings.replay or Replay()
        if self.objective.needs_auxiliary and not self.model.has_auxiliary:
            raise LoraGANError(
                f"{type(self.model).__name__} has no auxiliary head for the objective Auxiliary; choose another "
                "discriminator, such as AdapterDiscriminator, or another objective"
            )
        if self.objective.needs_comparison and not self.model.compares:
            raise LoraGANError(
                f"{type(self.model).__name__} does not compare a completion with its target, as the objective "
                "PairwisePayoff needs; choose PairwiseDiscriminator, or another objective"
            )
        kinds = [source.kind for source in self.negatives]
        twice = {kind for kind in kinds if kinds.count(kind) > 1}
        if twice:
            raise LoraGANError(f"negatives of kind {min(twice)!r} are given twice; give them once and raise per_prompt")

    def trainable(self, backbone: Backbone) -> list[nn.Parameter]:
        """Parameters that its optimizer updates."""
        return self.model.trainable(backbone)

    def update(
        self,
        backbone: Backbone,
        batch: PromptBatch,
        rollout: Rollout,
        opponent: Rollout,
        scores: Scores,
        updates: int,
        optimization: Optimization,
    ) -> DiscriminatorScores:
        """Score the fresh completions, then learn from them.

        Args:
            backbone: The backbone, in any mode.
            batch: The prompts of this step.
            rollout: Their sampled completions.
            opponent: Completions of an earlier generator in self-play, or an empty rollout.
            scores: The rewards of the sampled completions and of the targets.
            updates: Optimizer steps; 0 scores only.
            optimization: Takes the optimizer steps.

        Returns:
            The scores from before the first update.
        """
        shown = self.make_batch(backbone.tokenizer, batch, rollout, opponent, scores)
        parts = [shown.of(prompts) for prompts in optimization.micro_batches(len(shown.prompts))]
        with self.model.mode(backbone), torch.set_grad_enabled(updates > 0):
            scored = self._scored(backbone, parts)
            outputs = self._outputs(shown, scored)
            term = self.objective(outputs)
            fresh = {kind: output.where(output.prompt < shown.fresh) for kind, output in outputs.items()}
            metrics = {"loss/discriminator": term.loss.detach(), **term.metrics, **discriminator_metrics(fresh)}
            for update in range(updates):
                if update:
                    scored = self._scored(backbone, parts)
                    term = self.objective(self._outputs(shown, scored))
                self._backward(backbone, parts, scored, term.loss, optimization)
                optimization.step(DISCRIMINATOR)
        self.remember(shown)
        theirs = fresh[OPPONENT].score if OPPONENT in fresh else scores.total[:0]
        sampled = fresh[SAMPLED]
        return DiscriminatorScores(
            sampled=sampled.score,
            target=fresh[TARGET].score,
            opponent=theirs,
            num_generations=rollout.num_generations,
            metrics=metrics,
            tie_logit=sampled.auxiliary if self.model.compares else None,
            length=sampled.length,
        )

    def can_judge(self, backbone: Backbone) -> bool:
        """Whether it has learned, and can score a completion of which no target is known."""
        return self.model.has_learned(backbone) and not self.model.input_format.reads_target

    def judge(self, backbone: Backbone, batch: PromptBatch, rollout: Rollout, parts: Sequence[Sequence[int]]) -> Tensor:
        """(N,) scores of the sampled completions.

        Args:
            backbone: The backbone, in any mode.
            batch: B prompts.
            rollout: Their completions.
            parts: The prompts of each pass.
        """
        ended = rollout.ended(len(batch), backbone.tokenizer.eos_token_id)
        scored = [
            score(self.model, backbone, [batch.prompt_ids[b] for b in part], [ended[b] for b in part])
            for part in parts
            if part
        ]
        return torch.cat(scored)

    def make_batch(
        self,
        tokenizer: PreTrainedTokenizerBase,
        batch: PromptBatch,
        rollout: Rollout,
        opponent: Rollout,
        scores: Scores,
    ) -> DiscriminatorBatch:
        """Targets, samples, negatives, the opponent's completions and some old samples, all ending in EOS."""
        old = [episode.to(rollout.ids.device) for episode in self.replay.draw()]
        eos, nothing = tokenizer.eos_token_id, [list[Tensor]() for _ in old]
        completions = {
            SAMPLED: [*rollout.ended(len(batch), eos), *(list(e.completions) for e in old)],
            TARGET: [*batch.targets_by_prompt, *([e.target] for e in old)],
        }
        if len(opponent):
            completions[OPPONENT] = opponent.ended(len(batch), eos) + nothing
        for source in self.negatives:
            completions[source.kind] = source.draw(batch, tokenizer) + nothing
        sampled_parts = {n: torch.cat([x, *(e.parts[n] for e in old)]) for n, x in scores.parts.items()}
        target_parts = {
            n: torch.cat([x, *(e.target_parts[n][None] for e in old)]) for n, x in scores.target_parts.items()
        }
        return DiscriminatorBatch(
            prompts=(*batch.prompt_ids, *(e.prompt for e in old)),
            targets=(*batch.target_ids, *(e.target for e in old)),
            completions=completions,
            rewards={
                SAMPLED: torch.cat([scores.known, *(e.reward for e in old)]),
                TARGET: torch.cat([scores.target_known, *(e.target_reward[None] for e in old)]),
            },
            parts={SAMPLED: sampled_parts, TARGET: target_parts},
            fresh=len(batch),
        )

    def _scored(self, backbone: Backbone, parts: Sequence[DiscriminatorBatch]) -> list[dict[str, Tensor]]:
        """What the model makes of each part, by kind: (M, 2); from several parts without the gradient of the passes."""
        if len(parts) == 1:
            return [self.model(backbone, parts[0])]
        with torch.no_grad():
            scored = [self.model(backbone, part) if part.prompts else {} for part in parts]
        return [{kind: values.requires_grad_() for kind, values in part.items()} for part in scored]

    def _backward(
        self,
        backbone: Backbone,
        parts: Sequence[DiscriminatorBatch],
        scored: Sequence[dict[str, Tensor]],
        loss: Tensor,
        optimization: Optimization,
    ) -> None:
        """The gradient of one optimizer step.

        An objective may couple all completions of the batch. So with several parts the gradient of the loss at their
        scores comes first, then each part is passed once more and goes on from there (GradCache, arXiv 2101.06983).
        """
        if len(parts) == 1:
            optimization.backward(DISCRIMINATOR, {"discriminator": loss})
            return
        cached = [values for part in scored for values in part.values()]
        slopes = torch.autograd.grad(loss, cached, materialize_grads=True)  # of float32 scores, so without a scale
        if not any_of(any(bool(slope.any()) for slope in slopes)):
            return
        remaining = iter(slopes)
        for part in parts:
            again = self.model(backbone, part) if part.prompts else {}
            products = {f"discriminator_{kind}": (values * next(remaining)).sum() for kind, values in again.items()}
            optimization.backward(DISCRIMINATOR, products)

    def _outputs(
        self, batch: DiscriminatorBatch, scored: Sequence[dict[str, Tensor]]
    ) -> dict[str, DiscriminatorOutput]:
        """What is known about all completions, by kind, from the scores of the batch's parts."""
        result = {}
        for kind in batch.completions:
            values = torch.cat([part[kind] for part in scored if part])
            prompt = batch.prompt_of(kind)
            completions = [completion for row in batch.completions[kind] for completion in row]
            result[kind] = DiscriminatorOutput(
                score=values[:, 0],
                auxiliary=values[:, 1],
                prompt=prompt,
                length=prompt.new_tensor([len(completion) for completion in completions]),
                is_target=torch.tensor(batch.are_targets(kind), dtype=torch.bool, device=prompt.device),
                reward=batch.rewards.get(kind),
                parts=batch.parts.get(kind, {}),
            )
        return result

    def remember(self, batch: DiscriminatorBatch) -> None:
        """Add the fresh prompts of a step, with their completions, to the replay buffer."""
        if self.replay.capacity == 0:
            return
        k = len(batch.completions[SAMPLED][0])
        fresh = [b for b in range(batch.fresh) if batch.completions[TARGET][b]]
        self.replay.add([self._episode(batch, b, slice(b * k, (b + 1) * k), place) for place, b in enumerate(fresh)])

    def _episode(self, batch: DiscriminatorBatch, b: int, rows: slice, place: int) -> Episode:
        """Prompt ``b`` with its completions, which are ``rows`` of the sampled ones, and its target."""
        return Episode(
            batch.prompts[b],
            batch.targets[b],
            tuple(batch.completions[SAMPLED][b]),
            batch.rewards[SAMPLED][rows],
            {name: part[rows] for name, part in batch.parts[SAMPLED].items()},
            batch.rewards[TARGET][place],
            {name: part[place] for name, part in batch.parts[TARGET].items()},
        )
