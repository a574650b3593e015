"""Evaluation of a module: completions of base and generator, their rewards, and the likelihood of the targets."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_gan.backbone import GENERATOR, has_learned
from lora_gan.best_of import agreement, choose, without_answers
from lora_gan.checkpointing.state import Checkpointed
from lora_gan.discriminator.objectives import TARGET
from lora_gan.final_answer import FinalAnswer
from lora_gan.lightning_compat import is_fitting
from lora_gan.optimization import Optimization
from lora_gan.results import BEST
from lora_gan.rewards import references_of
from lora_gan.sampling import Sampling, sample
from lora_gan.tensors import masked_row_mean
from lora_gan.types import EvalOutput, PromptBatch, Rollout, Scores, require_prompts

log = logging.getLogger("lora_gan")


class Evaluated(Checkpointed):
    """Validation, test and prediction of a module that scores completions."""

    sampling: Sampling
    greedy: Sampling
    optimization: Optimization
    final_answer: FinalAnswer | None  # finds it in a completion; None: the whole completion is the answer
    starting_adapter: list[Tensor]  # of the generator, at the start of the run; empty if it was a new one
    best_of: int = 1  # completions for each prompt of a test, from which one is chosen in several ways; 1: no choice

    @abstractmethod
    def score(self, rollout: Rollout, batch: PromptBatch, with_targets: bool) -> Scores:
        """Rewards of the completions, and of the targets where they are needed."""

    def on_validation_start(self) -> None:
        if not is_fitting(self):
            self._say_if_untrained("validation")

    def on_test_start(self) -> None:
        self._say_if_untrained("test")

    def on_predict_start(self) -> None:
        self._say_if_untrained("prediction")

    def _say_if_untrained(self, what: str) -> None:
        if not has_learned(self.backbone, GENERATOR):
            log.warning(
                "%s of a generator that has learned nothing: it answers as its base does; give ckpt_path=… to the "
                "trainer, or an adapter to the generator",
                what,
            )

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, EvalOutput]:
        """Greedy completions of the generator, and its loss on the targets."""
        with self.backbone.generator():
            return {"trained": self.complete(batch, self.greedy)}

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, EvalOutput]:
        """Base, generator at the start if that was a saved adapter, and generator; once more as it samples."""
        with self.backbone.reference():
            outputs = {"base": self.complete(batch, self.greedy)}
        if self.starting_adapter:
            with self._at_start():
                outputs["start"] = self.complete(batch, self.greedy)
        with self.backbone.generator():
            outputs["trained"] = self.complete(batch, self.greedy)
            target = outputs["trained"].target_logprob
            outputs["sampled"] = self.complete(batch, replace(self.sampling, base=None), target)
            if self.best_of > 1:
                with _own_random_numbers(self.device):
                    rollout = sample(self.backbone, batch.prompt_ids, self.best_of, replace(self.sampling, base=None))
                outputs |= self.best(batch, rollout, target)
        return outputs

    def best(self, batch: PromptBatch, rollout: Rollout, target: Tensor) -> dict[str, EvalOutput]:
        """By role, for each way of choosing, one of each prompt's completions.

        Args:
            batch: B prompts.
            rollout: Several completions of each.
            target: (B,) likelihood of the targets.
        """
        n, likely = rollout.num_generations, rollout.logprobs.sum(-1)
        chosen = {BEST + way: choose(x, likely, n) for way, x in self.preferences(batch, rollout).items()}
        return {role: self._judged(batch, rollout.chosen(rows), target)[0] for role, rows in chosen.items()}

    def preferences(self, batch: PromptBatch, rollout: Rollout) -> dict[str, Tensor]:
        """By way of choosing, the scores (N,) of sampled completions; ways that do not apply are left out.

        The target is not looked at.
        """
        asked = without_answers(batch)
        scores = self.score(rollout, asked, with_targets=False)
        found = {
            "agreement": agreement(rollout.texts, rollout.num_generations, self.final_answer),
            "logprob": rollout.logprobs.sum(-1),
        }
        if any(bool(applies.any()) for applies in scores.applies.values()):
            found["reward"] = scores.total
        return found

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record for each prompt: prompt, completion, target, all references, negatives, reward (None: none)."""
        with self.backbone.generator():
            output = self.complete(batch, self.greedy)
        rewards = output.reward.tolist()
        return [
            {
                "prompt": example.prompt,
                "completion": text,
                "target": example.target,
                "references": list(references_of(example)),
                "negatives": [negative.text for negative in example.negatives],
                "reward": None if math.isnan(reward) else reward,
            }
            for example, text, reward in zip(output.examples, output.texts, rewards, strict=True)
        ]

    def complete(self, batch: PromptBatch, how: Sampling, target: Tensor | None = None) -> EvalOutput:
        """One completion for each prompt in the active mode, with its reward, and the likelihood of the target.

        Args:
            batch: B prompts.
            how: Greedy, or as completions are sampled.
            target: (B,) the likelihood, where it is known: it does not depend on ``how``.
        """
        require_prompts(batch)
        target = self.target_logprobs(batch) if target is None else target
        rollout = sample(self.backbone, batch.prompt_ids, 1, how)
        output, base = self._judged(batch, rollout, target)
        plain = how.do_sample and how.num_beams == 1
        return replace(output, kl=(rollout.logprobs - base).sum(-1)) if plain else output

    def _judged(self, batch: PromptBatch, rollout: Rollout, target: Tensor) -> tuple[EvalOutput, Tensor]:
        """What is known about one completion for each prompt, and log-probabilities under the base (B, T)."""
        scores = self.score(rollout, batch, with_targets=False)
        perplexity = (-masked_row_mean(scores.base_logprobs, rollout.mask)).exp()
        lengths = [len(target) for row in batch.targets_by_prompt for target in row or ((),)]
        tokens = torch.tensor(lengths, device=self.device)
        examples, cut = batch.examples, rollout.truncated
        unknown = torch.full_like(perplexity, torch.nan)
        output = EvalOutput(examples, rollout.texts, cut, scores.known, perplexity, target, tokens, unknown)
        return output, scores.base_logprobs

    @torch.no_grad()
    def target_logprobs(self, batch: PromptBatch) -> Tensor:
        """(B,) log-probability of each target, EOS included, in the active mode; 0 where there is none."""
        parts = self.optimization.parts(len(batch))
        found = self.backbone.logprobs_of(batch.prompt_ids, {TARGET: batch.targets_by_prompt}, parts)
        total = torch.zeros(len(batch), device=self.device)
        total[batch.with_target] = found[TARGET].sum(-1)
        return total

    @contextmanager
    def _at_start(self) -> Iterator[None]:
        """The generator with the adapter that it started from."""
        parameters = self.backbone.parameters_of(GENERATOR)
        trained = [parameter.detach().clone() for parameter in parameters]
        _copy(self.starting_adapter, parameters)
        try:
            with self.backbone.generator():
                yield
        finally:
            _copy(trained, parameters)


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """What is drawn inside does not change what is drawn afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@torch.no_grad()
def _copy(weights: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)
