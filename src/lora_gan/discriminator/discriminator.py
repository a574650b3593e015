"""Discriminator: its settings, its batch, and its update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_gan.backbone import Backbone, LoraSettings
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
from lora_gan.errors import LoraGANError
from lora_gan.optimization import adamw
from lora_gan.types import (
    DiscriminatorBatch,
    DiscriminatorOutput,
    DiscriminatorScores,
    Optimize,
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
        lora: Shape of its adapter.
        optimizer: Its optimizer; by default AdamW at a learning rate of 0.001, without weight decay.
        scheduler: Schedule of its learning rate, stepped once in each training step in which it learns.
        adapter: Folder of the adapter and head from which it starts.
    """

    model: DiscriminatorModel | None = None
    objective: DiscriminatorObjective | None = None
    negatives: list[Negatives] | None = None
    replay: Replay | None = None
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
        optimize: Optimize,
    ) -> DiscriminatorScores:
        """Score the fresh completions, then learn from them.

        Args:
            backbone: The backbone, in any mode.
            batch: The prompts of this step.
            rollout: Their sampled completions.
            opponent: Completions of an earlier generator in self-play, or an empty rollout.
            scores: The rewards of the sampled completions and of the targets.
            updates: Optimizer steps; 0 scores only.
            optimize: Takes one optimizer step on the named terms of a loss.

        Returns:
            The scores from before the first update.
        """
        shown = self.make_batch(backbone.tokenizer, batch, rollout, opponent, scores)
        with self.model.mode(backbone), torch.set_grad_enabled(updates > 0):
            outputs = self(backbone, shown)
            term = self.objective(outputs)
            fresh = {kind: output.where(output.prompt < shown.fresh) for kind, output in outputs.items()}
            metrics = {"loss/discriminator": term.loss.detach(), **term.metrics, **discriminator_metrics(fresh)}
            for update in range(updates):
                if update:
                    term = self.objective(self(backbone, shown))
                optimize({"discriminator": term.loss})
        self.remember(shown)
        theirs = fresh[OPPONENT].score if OPPONENT in fresh else scores.total[:0]
        return DiscriminatorScores(fresh[SAMPLED].score, fresh[TARGET].score, theirs, rollout.num_generations, metrics)

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
            completions[source.kind] = source(batch, tokenizer) + nothing
        sampled_parts = {n: torch.cat([x, *(e.parts[n] for e in old)]) for n, x in scores.parts.items()}
        target_parts = {
            n: torch.cat([x, *(e.target_parts[n][None] for e in old)]) for n, x in scores.target_parts.items()
        }
        return DiscriminatorBatch(
            prompts=(*batch.prompt_ids, *(e.prompt for e in old)),
            targets=(*batch.target_ids, *(e.target for e in old)),
            completions=completions,
            rewards={
                SAMPLED: torch.cat([scores.total, *(e.reward for e in old)]),
                TARGET: torch.cat([scores.target_total, *(e.target_reward[None] for e in old)]),
            },
            parts={SAMPLED: sampled_parts, TARGET: target_parts},
            fresh=len(batch),
        )

    def forward(self, backbone: Backbone, batch: DiscriminatorBatch) -> dict[str, DiscriminatorOutput]:
        """Outputs for all completions by kind; the caller must be in the model's mode."""
        result = {}
        for kind, scored in self.model(backbone, batch).items():
            prompt = batch.prompt_of(kind)
            completions = [completion for row in batch.completions[kind] for completion in row]
            same = [batch.is_target(x, b) for x, b in zip(completions, prompt.tolist(), strict=True)]
            result[kind] = DiscriminatorOutput(
                score=scored[:, 0],
                auxiliary=scored[:, 1],
                prompt=prompt,
                length=prompt.new_tensor([len(completion) for completion in completions]),
                is_target=torch.tensor(same, dtype=torch.bool, device=prompt.device),
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
