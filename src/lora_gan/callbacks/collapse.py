"""Collapse monitor: detects mode collapse and reward hacking in the sampled completions."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning as L

from lora_gan.distributed import gathered
from lora_gan.errors import LoraGANError
from lora_gan.rewards import references_of
from lora_gan.step_callback import StepCallback, StepModule
from lora_gan.text_metrics import entropy, repetition, words
from lora_gan.types import PromptBatch, Rollout, StepOutput

log = logging.getLogger("lora_gan")

TEMPLATE = 4  # words in a phrase that completions may share
PREFIX = 3  # words at the beginning of a completion

REMEDIES = {
    "template": "completions of different prompts share the same phrase; raise coefficients.kl, or lower the weight of "
    "a reward that they all get",
    "prefix_entropy": "completions begin with the same words; raise coefficients.kl or the sampling temperature",
    "repetition": "completions repeat themselves; add lora_gan.rewards.RepetitionPenalty or raise coefficients.kl",
    "length": "completions differ from the targets in length; add lora_gan.rewards.LengthReward",
    "truncation": "completions do not end; raise sampling.max_new_tokens, or add lora_gan.rewards.LengthReward",
}


@dataclass
class Sample:
    """Texts of a few steps, with their lengths and whether they are truncated."""

    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)

    def add(self, other: Sample) -> None:
        self.texts += other.texts
        self.tokens += other.tokens
        self.truncated += other.truncated


class CollapseMonitor(StepCallback):
    """Compares the sampled completions with their prompts' targets every few steps, and warns of signs of collapse.

    Logs ``collapse/<name>`` and ``collapse/<name>_of_targets``. A warning is repeated only after the value has been
    normal again. Steps without sampled completions do not count. Completions to prompts without targets are compared
    with the other prompts' targets; without any targets, length and prefix entropy are not checked.

    Args:
        every_n_steps: Steps whose completions are checked together.
        template: Largest normal excess of the share of completions with their most common phrase of four words (or the
            whole text, if shorter) over that of the targets. Detects a policy with one completion for every prompt.
        prefix_entropy: Smallest normal entropy of the first three words, in nats, divided by that of the targets.
        repetition: Largest normal excess of the repeated share of completions over that of targets, see
            ``lora_gan.rewards.RepetitionPenalty``.
        length: Largest normal factor between the mean lengths in tokens of completions and targets, either way.
        truncation: Largest normal excess of the share of completions cut off by the length limit over the share of
            targets that are longer than it.
        stop: Whether to end the run after a warning.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        template: float = 0.3,
        prefix_entropy: float = 0.5,
        repetition: float = 0.15,
        length: float = 2.5,
        truncation: float = 0.3,
        stop: bool = False,
    ) -> None:
        if every_n_steps < 1:
            raise LoraGANError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if not length > 1:
            raise LoraGANError(f"length must be > 1, because it is a factor; got {length}")
        self.every_n_steps = every_n_steps
        self.stop = stop
        self.collapsed: dict[str, Callable[[float, float], bool]] = {
            "template": lambda ours, theirs: ours > theirs + template,
            "prefix_entropy": lambda ours, theirs: ours < prefix_entropy * theirs,
            "repetition": lambda ours, theirs: ours > theirs + repetition,
            "length": lambda ours, theirs: not theirs / length <= ours <= theirs * length,
            "truncation": lambda ours, theirs: ours > theirs + truncation,
        }
        self.steps = 0
        self.completions = Sample()
        self.targets = Sample()
        self.warned: set[str] = set()

    def after_step(self, trainer: L.Trainer, module: StepModule, output: StepOutput, batch: PromptBatch) -> None:
        if len(output.rollout) == 0:
            return
        self._collect(output.rollout, batch)
        if self.steps >= self.every_n_steps:
            self._check(trainer, module)
            self._forget()

    def _collect(self, rollout: Rollout, batch: PromptBatch) -> None:
        """Add the completions and targets of all processes."""
        lengths = rollout.mask.sum(-1)
        limit = int(lengths[rollout.truncated].max()) if rollout.truncated.any() else None
        completions = Sample([*rollout.texts], lengths.tolist(), rollout.truncated.tolist())
        targets = Sample()
        for example, ids in zip(batch.examples, batch.target_ids, strict=True):
            if references_of(example):
                cut_off = limit is not None and len(ids) > limit
                targets.add(Sample([references_of(example)[0]], [len(ids)], [cut_off]))
        for sampled, wanted in gathered((completions, targets)):
            self.completions.add(sampled)
            self.targets.add(wanted)
        self.steps += 1

    def _check(self, trainer: L.Trainer, module: StepModule) -> None:
        ours = signs(self.completions)
        theirs = signs(self.targets) if self.targets.texts else {"template": 0.0, "repetition": 0.0, "truncation": 0.0}
        module.log_dict(
            {f"collapse/{name}": value for name, value in ours.items()}
            | {f"collapse/{name}_of_targets": value for name, value in theirs.items()},
            batch_size=1,
        )
        found = {name for name, value in theirs.items() if self.collapsed[name](ours[name], value)}
        if trainer.is_global_zero:
            for name in sorted(found - self.warned):
                self._warn(trainer, name, ours, theirs)
        self.warned = found
        trainer.should_stop |= self.stop and bool(found)

    def _warn(self, trainer: L.Trainer, name: str, ours: Mapping[str, float], theirs: Mapping[str, float]) -> None:
        log.warning(
            "collapse: %s is %.3g over the %d steps up to step %d (targets: %.3g): %s%s",
            name,
            ours[name],
            self.steps,
            trainer.global_step,
            theirs[name],
            REMEDIES[name],
            "; stopping the run" if self.stop else "",
        )

    def _forget(self) -> None:
        self.steps, self.completions, self.targets = 0, Sample(), Sample()

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "completions": asdict(self.completions),
            "targets": asdict(self.targets),
            "warned": sorted(self.warned),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]
        self.completions = Sample(**state_dict["completions"])
        self.targets = Sample(**state_dict["targets"])
        self.warned = set(state_dict["warned"])


def signs(sample: Sample) -> dict[str, float]:
    """Signs of collapse in at least one text, by name."""
    count = len(sample.texts)
    return {
        "template": template_share(sample.texts),
        "prefix_entropy": entropy(tuple(words(text)[:PREFIX]) for text in sample.texts),
        "repetition": math.fsum(repetition(text) for text in sample.texts) / count,
        "length": sum(sample.tokens) / count,
        "truncation": sum(sample.truncated) / count,
    }


def template_share(texts: Sequence[str]) -> float:
    """Share of the texts that contain the most common phrase of four words; a shorter text is one phrase."""
    found = Counter(phrase for text in texts for phrase in _phrases(words(text)))
    return max(found.values(), default=0) / max(len(texts), 1)


def _phrases(read: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(read[i : i + TEMPLATE]) for i in range(max(len(read) - TEMPLATE, 0) + 1)}
