"""A policy that has found something cheaper than good answers."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning as L

from lora_gan.errors import LoraGANError
from lora_gan.metrics import entropy, repetition, words
from lora_gan.processes import gathered
from lora_gan.rewards import references_of
from lora_gan.types import PromptBatch, Rollout

log = logging.getLogger("lora_gan")

TEMPLATE = 4  # words of the phrase that answers may have in common
PREFIX = 3  # words of an answer's beginning

REMEDIES = {
    "template": "the answers to different prompts have the same words in common; raise kl_coefficient, or lower the "
    "weight of a reward that they all get",
    "prefix_entropy": "the answers begin alike; raise kl_coefficient or the sampling temperature",
    "repetition": "the answers repeat themselves; add lora_gan.rewards.RepetitionPenalty or raise kl_coefficient",
    "length": "the answers have another length than the targets; add lora_gan.rewards.LengthReward",
    "truncation": "the answers do not end; raise sampling.max_new_tokens, or add lora_gan.rewards.LengthReward",
}


@dataclass
class Sample:
    """Texts of a few rounds, with what their tokens tell."""

    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)

    def add(self, other: Sample) -> None:
        self.texts += other.texts
        self.tokens += other.tokens
        self.truncated += other.truncated


class CollapseMonitor(L.Callback):
    """Compares the sampled answers of every few rounds with their prompts' targets and warns of collapse, by name.

    It logs ``collapse/<name>`` and, beside it, ``collapse/<name>_of_targets``. A warning is given once, until the value
    has been in order again. Rounds without sampled answers do not count; prompts without targets are compared with the
    others' targets, and where there is no target at all, length and prefix entropy are not judged.

    Args:
        every_n_rounds: Rounds whose answers are looked at together.
        template: How much larger the share of answers that contain the commonest phrase of four words (or are it) may
            be than that of the targets. It finds a policy that gives every prompt the same answer.
        prefix_entropy: The smallest share of the targets' entropy (of the first three words, in nats) to be had.
        repetition: How much more of an answer may repeat itself than of a target, see
            ``lora_gan.rewards.RepetitionPenalty``.
        length: Factor by which the mean length in tokens may differ from the targets', either way.
        truncation: How much larger the share of answers cut off by the length limit may be than that of targets that
            are longer than it.
        stop: End the run after a warning.
    """

    def __init__(
        self,
        every_n_rounds: int = 10,
        template: float = 0.3,
        prefix_entropy: float = 0.5,
        repetition: float = 0.15,
        length: float = 2.5,
        truncation: float = 0.3,
        stop: bool = False,
    ) -> None:
        if every_n_rounds < 1:
            raise LoraGANError(f"every_n_rounds must be at least 1, got {every_n_rounds}")
        if length <= 1:
            raise LoraGANError(f"length must be > 1, a factor, got {length}")
        self.every_n_rounds = every_n_rounds
        self.stop = stop
        self.collapsed: dict[str, Callable[[float, float], bool]] = {
            "template": lambda ours, theirs: ours > theirs + template,
            "prefix_entropy": lambda ours, theirs: ours < prefix_entropy * theirs,
            "repetition": lambda ours, theirs: ours > theirs + repetition,
            "length": lambda ours, theirs: not theirs / length <= ours <= theirs * length,
            "truncation": lambda ours, theirs: ours > theirs + truncation,
        }
        self.rounds = 0
        self.answers = Sample()
        self.targets = Sample()
        self.warned: set[str] = set()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        rollout = last_rollout(pl_module, type(self).__name__)
        if len(rollout) == 0:
            return
        self._collect(rollout, batch)
        if self.rounds >= self.every_n_rounds:
            self._judge(trainer, pl_module)
            self._forget()

    def _collect(self, rollout: Rollout, batch: PromptBatch) -> None:
        """Add the answers and targets of all processes."""
        lengths = rollout.mask.sum(-1)
        limit = int(lengths[rollout.truncated].max()) if rollout.truncated.any() else None
        answers = Sample([*rollout.texts], lengths.tolist(), rollout.truncated.tolist())
        targets = Sample()
        for example, ids in zip(batch.examples, batch.target_ids, strict=True):
            if references_of(example):
                cut_off = limit is not None and len(ids) > limit
                targets.add(Sample([references_of(example)[0]], [len(ids)], [cut_off]))
        for sampled, wanted in gathered((answers, targets)):
            self.answers.add(sampled)
            self.targets.add(wanted)
        self.rounds += 1

    def _judge(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        ours = signs(self.answers)
        theirs = signs(self.targets) if self.targets.texts else {"template": 0.0, "repetition": 0.0, "truncation": 0.0}
        pl_module.log_dict(
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
            "collapse: %s %.3g in the %d rounds to round %d, of the targets %.3g: %s%s",
            name,
            ours[name],
            self.rounds,
            trainer.global_step,
            theirs[name],
            REMEDIES[name],
            "; the run stops" if self.stop else "",
        )

    def _forget(self) -> None:
        self.rounds, self.answers, self.targets = 0, Sample(), Sample()

    def state_dict(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "answers": asdict(self.answers),
            "targets": asdict(self.targets),
            "warned": sorted(self.warned),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rounds = state_dict["rounds"]
        self.answers = Sample(**state_dict["answers"])
        self.targets = Sample(**state_dict["targets"])
        self.warned = set(state_dict["warned"])


def signs(sample: Sample) -> dict[str, float]:
    """What collapse shows in, of at least one text."""
    count = len(sample.texts)
    return {
        "template": template_share(sample.texts),
        "prefix_entropy": entropy(tuple(words(text)[:PREFIX]) for text in sample.texts),
        "repetition": math.fsum(repetition(text) for text in sample.texts) / count,
        "length": sum(sample.tokens) / count,
        "truncation": sum(sample.truncated) / count,
    }


def template_share(texts: Sequence[str]) -> float:
    """Share of the texts that have the commonest phrase of four words; a shorter text is one phrase."""
    found = Counter(phrase for text in texts for phrase in _phrases(words(text)))
    return max(found.values(), default=0) / max(len(texts), 1)


def _phrases(read: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(read[i : i + TEMPLATE]) for i in range(max(len(read) - TEMPLATE, 0) + 1)}


def last_rollout(module: L.LightningModule, callback: str) -> Rollout:
    """The answers that the module sampled in its latest round."""
    rollout = getattr(module, "rollout", None)
    if not isinstance(rollout, Rollout):
        raise LoraGANError(f"{callback} needs a module that keeps its latest round's answers in rollout")
    return rollout
