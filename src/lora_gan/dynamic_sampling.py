"""Dynamic sampling: other prompts in place of those whose completions are all rewarded alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_gan.tensors import join
from lora_gan.types import PromptBatch, Rollout, Scores

ROUNDING = 1e-6  # by which equal completions may differ in a reward, as from an encoder


@dataclass(frozen=True)
class Scored:
    """Prompts with their completions and rewards."""

    batch: PromptBatch
    rollout: Rollout
    scores: Scores
    counted: tuple[str, ...]  # names of the rewards that have a weight

    @property
    def informative(self) -> list[int]:
        """The prompts whose completions differ in a reward; the others' advantages within the group are 0."""
        groups = [self.scores.parts[name].view(-1, self.rollout.num_generations) for name in self.counted]
        spread = [(group - group[:, :1]).abs().amax(1) > ROUNDING for group in groups]
        found: list[int] = torch.stack(spread).any(0).nonzero()[:, 0].tolist()
        return found

    def of(self, prompts: list[int]) -> Scored:
        """The chosen prompts only, in rising order."""
        rows, rollout = self.rollout.rows_of(prompts), self.rollout.of(prompts)
        asked = {b: place for place, b in enumerate(self.batch.with_target)}
        targets = [asked[b] for b in prompts if b in asked] if len(self.scores.target_total) else []
        scores = _rows(self.scores, rows, targets, rollout.ids.shape[1])
        return Scored(self.batch.of(prompts), rollout, scores, self.counted)

    def __add__(self, other: Scored) -> Scored:
        batch, more = self.batch, other.batch
        return Scored(
            PromptBatch(
                batch.examples + more.examples,
                batch.prompt_ids + more.prompt_ids,
                batch.target_ids + more.target_ids,
                batch.negative_ids + more.negative_ids,
            ),
            _joined(self.rollout, other.rollout),
            _joined_scores(self.scores, other.scores),
            self.counted,
        )


def replace_uninformative(
    given: Scored, draw: Callable[[int], Scored], rounds: int
) -> tuple[Scored, dict[str, Tensor]]:
    """The informative prompts, and others until there are as many as before (DAPO, arXiv 2503.14476, eq. 11).

    Args:
        given: The step's prompts, B, with at least two completions each and at least one reward.
        draw: So many other prompts, sampled and scored.
        rounds: How often others are drawn. If fewer than B are found, the step has fewer; if none, it stays as it is.

    Returns:
        The prompts, at most B, and what is logged.
    """
    wanted = len(given.batch)
    found = given.of(given.informative)
    skipped, spent = wanted - len(found.batch), 0
    while len(found.batch) < wanted and spent < rounds:
        spent += 1
        others = draw(wanted - len(found.batch))
        taken = others.of(others.informative)
        skipped += len(others.batch) - len(taken.batch)
        found = found + taken
    metrics = {"skipped": skipped, "rounds": spent, "prompts": len(found.batch)}
    return (found if len(found.batch) else given), {
        f"dynamic_sampling/{name}": torch.tensor(float(value)) for name, value in metrics.items()
    }


def _rows(scores: Scores, rows: list[int], targets: list[int], width: int) -> Scores:
    parts, applies = ({n: x[rows] for n, x in field.items()} for field in (scores.parts, scores.applies))
    target_parts, target_applies = (
        {n: x[targets] for n, x in field.items()} for field in (scores.target_parts, scores.target_applies)
    )
    reference, base = (x[rows, :width] for x in (scores.reference_logprobs, scores.base_logprobs))
    total, target_total = scores.total[rows], scores.target_total[targets]
    return Scores(total, parts, applies, target_total, target_parts, target_applies, reference, base)


def _joined_scores(one: Scores, other: Scores) -> Scores:
    named = [
        {name: torch.cat([x, theirs[name]]) for name, x in ours.items()}
        for ours, theirs in (
            (one.parts, other.parts),
            (one.applies, other.applies),
            (one.target_parts, other.target_parts),
            (one.target_applies, other.target_applies),
        )
    ]
    pairs = ((one.total, other.total), (one.target_total, other.target_total))
    total, target_total = (torch.cat(pair) for pair in pairs)
    reference = join([one.reference_logprobs, other.reference_logprobs])
    base = join([one.base_logprobs, other.base_logprobs])
    parts, applies, target_parts, target_applies = named
    return Scores(total, parts, applies, target_total, target_parts, target_applies, reference, base)


def _joined(one: Rollout, other: Rollout) -> Rollout:
    ids, mask, logprobs = (join([getattr(one, n), getattr(other, n)]) for n in ("ids", "mask", "logprobs"))
    truncated = torch.cat([one.truncated, other.truncated])
    return Rollout(ids, mask, logprobs, truncated, one.texts + other.texts, one.num_generations)
