"""Data carriers of a training step, with every shape of the project.

Axes: B prompts, K completions for each prompt, N = B·K completions (completion ``n`` belongs to prompt ``n // K``),
P prompt tokens, T completion tokens, M branches of a prompt tree, L tokens of a prompt tree, H hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from lora_gan.errors import DataError
from lora_gan.final_answer import FinalAnswer


@dataclass(frozen=True)
class Negative:
    """A wrong or worse completion to a prompt; ``kind`` says in what way; accuracy is logged by kind."""

    text: str
    kind: str


Span = tuple[int, int]  # start and end, in characters


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue, for models with a chat template; ``cuttable`` is as in :class:`Example`."""

    role: str  # system, user or assistant
    content: str
    cuttable: tuple[Span, ...] = ()
    learned: bool = field(default=True, compare=False)  # False: a reply that is no target


@dataclass(frozen=True)
class Example:
    """One prompt with its target and what else is known about good and bad completions.

    ``prompt`` is the formatted text and ends where generation starts; ``target`` is the wanted completion without EOS,
    empty where there is none.
    ``references`` are all accepted completions, the target first. ``answers`` are the accepted final answers, which a
    prompt without target can have, too; see :mod:`lora_gan.final_answer`. ``tests`` are Python statements that the code
    of a good completion passes, such as ``assert add(1, 2) == 3``. ``group`` is what must not cross a split.
    ``split`` ("train", "validation" or "test") is the official one, which wins over the hash of the group. Examples
    with the same ``item`` ask the same thing in other words; evaluation keeps one of them.
    ``cuttable`` are the spans of the prompt that may lose their beginning where the prompt is too long: an input, a
    context or an earlier turn, never the instruction. ``messages`` is the prompt as a dialogue. ``literal`` are the
    spans that come from the data: the names of control tokens in them are plain text. ``chat`` says that a chat
    template wrote the prompt, with BOS where it wants one.
    ``label`` scores the generated completion from 0 to 1, where a person gave one. ``stream_end`` are the bytes and
    lines of a stream up to the example. ``meta`` is information that nothing in the package reads.
    """

    prompt: str
    target: str
    references: tuple[str, ...] = ()
    negatives: tuple[Negative, ...] = ()
    group: str = ""
    source: str = ""
    split: str = ""
    item: str = ""
    cuttable: tuple[Span, ...] = ()
    messages: tuple[Message, ...] = ()
    literal: tuple[Span, ...] = ()
    chat: bool = False
    label: float | None = None
    answers: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    stream_end: tuple[int, int] | None = None
    meta: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        misplaced = {"split", "item", "label"} & self.meta.keys()
        if misplaced:
            name = min(misplaced)
            raise DataError(f"an example's {name} is a field of its own: Example(…, {name}=…), not meta[{name!r}]")

    @property
    def is_answered(self) -> bool:
        """Whether anything is known about good completions."""
        return self != self.without_answer()

    def without_answer(self) -> Example:
        """The prompt alone, as it is where nothing is known about good completions."""
        return replace(self, target="", references=(), answers=(), tests=(), negatives=(), label=None)


@dataclass(frozen=True)
class PromptBatch:
    """B tokenised examples. Completions (targets, negatives) end with EOS; nothing is padded.

    An example without target has an empty one, so ``target_ids`` of EOS alone; see :attr:`with_target`.
    """

    examples: tuple[Example, ...]  # B
    prompt_ids: tuple[Tensor, ...]  # B tensors (P,)
    target_ids: tuple[Tensor, ...]  # B tensors (T,)
    negative_ids: tuple[tuple[Tensor, ...], ...]  # B tuples of tensors (T,), in the order of Example.negatives

    @classmethod
    def empty(cls) -> PromptBatch:
        """No examples."""
        return cls((), (), (), ())

    @property
    def with_target(self) -> list[int]:
        """Which of the B prompts have a target."""
        return [b for b, example in enumerate(self.examples) if example.target.strip()]

    def of(self, prompts: Sequence[int]) -> PromptBatch:
        """The chosen examples only."""
        fields = (self.examples, self.prompt_ids, self.target_ids, self.negative_ids)
        examples, prompt_ids, target_ids, negative_ids = (tuple(field[b] for b in prompts) for field in fields)
        return PromptBatch(examples, prompt_ids, target_ids, negative_ids)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """B."""
        return len(self.examples)

    @property
    def targets(self) -> tuple[str, ...]:
        """B target texts."""
        return tuple(example.target for example in self.examples)

    @property
    def targets_by_prompt(self) -> list[list[Tensor]]:
        """For each prompt its target's ids, or nothing where it has none."""
        chosen = set(self.with_target)
        return [[target] if b in chosen else [] for b, target in enumerate(self.target_ids)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PromptBatch:
        """The same batch with its tensors on ``device`` (Lightning moves batches through this)."""

        def move(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t.to(device, non_blocking=non_blocking) for t in tensors)

        negatives = tuple(move(row) for row in self.negative_ids)
        return PromptBatch(self.examples, move(self.prompt_ids), move(self.target_ids), negatives)


def require_prompts(batch: object) -> None:
    """Refuse what a data loader of another collate function gives."""
    if not isinstance(batch, PromptBatch):
        raise DataError(
            f"the data loader gives a batch of type {type(batch).__name__}, not lora_gan.types.PromptBatch; set its "
            "collate_fn to lora_gan.data.base.collate, which takes what lora_gan.data.tokenizer.encode returns"
        )


@dataclass(frozen=True)
class Rollout:
    """K sampled completions for each of B prompts, exactly as they were sampled."""

    ids: Tensor  # (N, T) token ids, pad after the end
    mask: Tensor  # (N, T) bool: True on sampled tokens, EOS included
    logprobs: Tensor  # (N, T) log-probability of each token at the sampling temperature, 0 where masked
    truncated: Tensor  # (N,) bool: stopped by the length limit, so without EOS
    texts: tuple[str, ...]  # N decoded completions
    num_generations: int

    @classmethod
    def empty(cls, device: torch.device) -> Rollout:
        """No completions, for a step that only learns from targets."""
        ids = torch.zeros(0, 0, dtype=torch.long, device=device)
        return cls(ids, ids.bool(), ids.float(), torch.zeros(0, dtype=torch.bool, device=device), (), 0)

    def __len__(self) -> int:
        """N."""
        return len(self.texts)

    def of(self, prompts: Sequence[int]) -> Rollout:
        """The completions to the chosen prompts only, as wide as the longest of them."""
        return self._of_rows(self.rows_of(prompts), self.num_generations)

    def chosen(self, rows: Sequence[int]) -> Rollout:
        """One completion for each prompt: those of the chosen rows."""
        return self._of_rows(rows, 1)

    def _of_rows(self, rows: Sequence[int], num_generations: int) -> Rollout:
        index = torch.tensor(rows, dtype=torch.long, device=self.ids.device)
        width = int(self.mask[index].sum(-1).max()) if rows else 0
        ids, mask, logprobs = (x[index, :width] for x in (self.ids, self.mask, self.logprobs))
        texts = tuple(self.texts[n] for n in rows)
        return Rollout(ids, mask, logprobs, self.truncated[index], texts, num_generations)

    def rows_of(self, prompts: Sequence[int]) -> list[int]:
        """Which of the N completions belong to the chosen prompts."""
        return [b * self.num_generations + i for b in prompts for i in range(self.num_generations)]

    @cached_property
    def completion_ids(self) -> tuple[Tensor, ...]:
        """N tensors (T,) without padding."""
        lengths = self.mask.sum(-1).tolist()
        return tuple(row[:length] for row, length in zip(self.ids, lengths, strict=True))

    def by_prompt(self, prompts: int) -> list[list[Tensor]]:
        """The completions of each of B prompts, without padding; empty lists where nothing was sampled."""
        return _grouped(self.completion_ids, self.num_generations, prompts)

    def ended(self, prompts: int, eos: int) -> list[list[Tensor]]:
        """:meth:`by_prompt` with all of them ending in ``eos``, so that the format gives nothing away."""
        end = self.ids.new_tensor([eos])
        cut_off = self.truncated.tolist()
        completions = [
            torch.cat([completion if cut else completion[:-1], end])
            for completion, cut in zip(self.completion_ids, cut_off, strict=True)
        ]
        return _grouped(completions, self.num_generations, prompts)


class Policy(Protocol):
    """The model that wrote the completions, as a reward may ask it; see :class:`lora_gan.policy.ActivePolicy`."""

    @property
    def context_length(self) -> int:
        """The most tokens of a prompt and a completion together."""

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens of completions, their end included."""

    def logprobs(
        self, prompts: Sequence[Tensor], completions: Mapping[str, Sequence[Sequence[Tensor]]]
    ) -> dict[str, Tensor]:
        """Log-probability of every token at temperature 1, by kind: (M, T), 0 behind the end of a completion."""


@dataclass(frozen=True)
class RewardContext:
    """What a reward may look at besides the texts: what base and policy think of them."""

    num_generations: int  # completions for each prompt: completion n belongs to batch.examples[n // num_generations]
    logprobs: Tensor  # (N, T) log-probability of each completion token under the base (adapters off), temperature 1
    mask: Tensor  # (N, T) bool: True on completion tokens, EOS included
    final_answer: FinalAnswer | None = None  # finds it in a completion; None: the whole completion is the answer
    policy: Policy | None = None  # None where only texts are known


@dataclass(frozen=True)
class Scores:
    """The rewards of a rollout and of the batch's targets."""

    total: Tensor  # (N,) weighted sum of the parts, whatever the aggregation of the policy's reward is
    parts: Mapping[str, Tensor]  # name → (N,), each before its weight
    applies: Mapping[str, Tensor]  # name → (N,) bool, False where the reward says nothing
    target_total: Tensor  # the reward of the targets, for the prompts that have one; (0,) where it is not needed
    target_parts: Mapping[str, Tensor]  # name → as target_total
    target_applies: Mapping[str, Tensor]  # name → as target_total, bool
    reference_logprobs: Tensor  # (N, T) under the KL reference, at the sampling temperature
    base_logprobs: Tensor  # (N, T) under the base, at temperature 1

    @classmethod
    def unknown(cls, completions: int, batch: PromptBatch, device: torch.device) -> Scores:
        """Where nothing is known of the completions and of the targets."""
        nothing = torch.zeros(completions, device=device)
        targets = torch.zeros(len(batch.with_target), device=device)
        return cls(nothing, {}, {}, targets, {}, {}, nothing[:, None], nothing[:, None])

    @property
    def known(self) -> Tensor:
        """(N,) ``total``, NaN where no reward applies."""
        return _known(self.total, self.applies)

    @property
    def target_known(self) -> Tensor:
        """``target_total``, NaN where no reward applies."""
        return _known(self.target_total, self.target_applies)


def _known(total: Tensor, applies: Mapping[str, Tensor]) -> Tensor:
    some = torch.stack(list(applies.values())).any(0) if applies else total.new_zeros(()).bool()
    return torch.where(some, total, torch.nan)


@dataclass(frozen=True)
class EvalOutput:
    """Completions of one role to a batch of an evaluation, one for each prompt, with their rewards."""

    examples: tuple[Example, ...]  # B
    texts: tuple[str, ...]  # B
    truncated: Tensor  # (B,) bool
    reward: Tensor  # (B,), NaN where none applies
    perplexity: Tensor  # (B,) of the completion under the base
    target_logprob: Tensor  # (B,) of the whole target, EOS included; 0 where there is none
    target_tokens: Tensor  # (B,) tokens of the target, EOS included; 0 where there is none
    kl: Tensor  # (B,) log p − log p_base of the completion in nats; NaN where it is not a plain sample


@dataclass(frozen=True)
class DiscriminatorBatch:
    """What the discriminator is shown: prompts, their targets, and completions by kind, which end with EOS.

    The prompts of this step come first, replayed ones behind them.
    """

    prompts: tuple[Tensor, ...]  # B tensors (P,)
    targets: tuple[Tensor, ...]  # B tensors (T,)
    completions: Mapping[str, Sequence[Sequence[Tensor]]]  # kind → for each prompt its completions, tensors (T,)
    rewards: Mapping[str, Tensor] = field(default_factory=dict)  # kind → (M,), NaN where none applies; or left out
    parts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # kind → name of the reward → (M,)
    fresh: int = 0  # prompts of this step

    def of(self, prompts: Sequence[int]) -> DiscriminatorBatch:
        """The chosen prompts only, as far as a discriminator reads them: without rewards."""
        if list(prompts) == list(range(len(self.prompts))):
            return self
        completions = {kind: [rows[b] for b in prompts] for kind, rows in self.completions.items()}
        prompt_ids, targets = (tuple(field[b] for b in prompts) for field in (self.prompts, self.targets))
        return DiscriminatorBatch(prompt_ids, targets, completions)

    def are_targets(self, kind: str) -> list[bool]:
        """Which of the M completions of the kind are their prompt's target, word for word; an empty one never is."""
        completions = as_lists([completion for row in self.completions[kind] for completion in row])
        targets = [self._target_lists[b] for b, row in enumerate(self.completions[kind]) for _ in row]
        return [len(ids) > 1 and ids == target for ids, target in zip(completions, targets, strict=True)]

    @cached_property
    def _target_lists(self) -> list[list[int]]:
        return as_lists(self.targets)

    def prompt_of(self, kind: str) -> Tensor:
        """(M,) which prompt each completion of the kind belongs to."""
        rows = [b for b, completions in enumerate(self.completions[kind]) for _ in completions]
        return torch.tensor(rows, dtype=torch.long, device=self.prompts[0].device)


@dataclass(frozen=True)
class DiscriminatorOutput:
    """The discriminator's output for M completions of one kind, and what is known about them."""

    score: Tensor  # (M,)
    auxiliary: Tensor  # (M,) prediction of the auxiliary head
    prompt: Tensor  # (M,) which prompt each belongs to
    length: Tensor  # (M,) in tokens
    is_target: Tensor  # (M,) bool: word for word the target
    reward: Tensor | None = None  # (M,) the total reward, NaN where none applies; None where it was not computed
    parts: Mapping[str, Tensor] = field(default_factory=dict)  # name → (M,)

    def where(self, chosen: Tensor) -> DiscriminatorOutput:
        """The completions where ``chosen`` (M,) is True, without gradient."""
        fields = (self.score, self.auxiliary, self.prompt, self.length, self.is_target)
        score, auxiliary, prompt, length, is_target = (x.detach()[chosen] for x in fields)
        reward = None if self.reward is None else self.reward[chosen]
        return DiscriminatorOutput(
            score, auxiliary, prompt, length, is_target, reward, {k: v[chosen] for k, v in self.parts.items()}
        )


@dataclass(frozen=True)
class DiscriminatorScores:
    """The discriminator's scores of a step's completions, from before it learned from them; detached."""

    sampled: Tensor  # (N,) scores of the sampled completions
    target: Tensor  # of the targets, for the prompts that have one
    opponent: Tensor  # (N,) of the opponent's completions; (0,) where there is none
    num_generations: int
    metrics: Mapping[str, Tensor]  # scalars to log
    answers: tuple[str | None, ...] = ()  # N final answers of the sampled completions, None where there is none
    tie_logit: Tensor | None = None  # (N,) of a tie of sampled completion and target; None if none are compared
    length: Tensor | None = None  # (N,) of the sampled completions in tokens, EOS included

    @property
    def per_prompt(self) -> Tensor:
        """(B, K) scores of the sampled completions."""
        return self.sampled.view(-1, self.num_generations)


@dataclass(frozen=True)
class TokenRewards:
    """The policy's rewards, token by token, and what they are compared with."""

    per_token: Tensor  # (N, T): the completion's reward stands at its last token, penalties where they arise
    predicted: Tensor | None  # (N,) the discriminator's scores; None in a step without it
    baseline: Tensor  # scalar, the coefficient of that name
    values: Tensor | None = None  # (N, T) of the value head, at each token before it was drawn
    adversarial: Tensor | None = None  # (N,) what the adversarial reward adds; None where it has no part

    @property
    def returns(self) -> Tensor:
        """(N,) the sum over each completion's tokens."""
        return self.per_token.sum(-1)


@dataclass(frozen=True)
class Advantages:
    """How much better each sampled token's completion was than expected; no gradient."""

    per_token: Tensor  # (N, T)
    metrics: Mapping[str, Tensor]
    returns: Tensor | None = None  # (N, T) the value head's targets
    values: Tensor | None = None  # (N, T) what it predicted

    def of(self, rows: Sequence[int], width: int) -> Advantages:
        """The advantages of the chosen completions' first ``width`` tokens only."""
        index = torch.tensor(rows, dtype=torch.long, device=self.per_token.device)
        returns, values = (None if x is None else x[index, :width] for x in (self.returns, self.values))
        return Advantages(self.per_token[index, :width], self.metrics, returns, values)


@dataclass(frozen=True)
class LossTerm:
    """A loss of one role, and metrics about it."""

    loss: Tensor  # scalar with gradient
    metrics: Mapping[str, Tensor]


@dataclass(frozen=True)
class Minibatch:
    """What the generator learns from in one update: some prompts of the step, or all."""

    batch: PromptBatch
    rollout: Rollout
    advantages: Advantages
    reference_logprobs: Tensor  # (N, T)

    def of(self, prompts: Sequence[int]) -> Minibatch:
        """The chosen prompts only."""
        if list(prompts) == list(range(len(self.batch))):
            return self
        if len(self.rollout) == 0:
            return replace(self, batch=self.batch.of(prompts))
        rows, rollout = self.rollout.rows_of(prompts), self.rollout.of(prompts)
        width = rollout.ids.shape[1]
        reference = self.reference_logprobs[rows, :width]
        return Minibatch(self.batch.of(prompts), rollout, self.advantages.of(rows, width), reference)


@dataclass(frozen=True)
class StepOutput:
    """What one training step did; callbacks get it, and the library and evolution read it."""

    metrics: Mapping[str, Tensor]  # scalars as they are logged, the mean over the processes
    rollout: Rollout
    scores: Scores | None  # None in a generation of evolution without refinement
    discriminator: DiscriminatorScores | None  # None in a step without the discriminator
    seconds: Mapping[str, float]  # by phase of the step
    batch: PromptBatch | None = None  # the prompts; None: those of the loader


# what callbacks look for in StepOutput.metrics
REWARD = "reward/total"
KL = "policy/kl"
ENTROPY = "policy/entropy"
MEAN_LENGTH = "completions/mean_length"
ACCURACY = "discriminator/accuracy"


def as_lists(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Token tensors (T,) as lists, copied from their device at once."""
    ids = iter(torch.cat(list(tensors)).tolist() if tensors else [])
    return [list(islice(ids, len(tokens))) for tokens in tensors]


def _grouped(completions: Sequence[Tensor], k: int, prompts: int) -> list[list[Tensor]]:
    return [list(completions[b * k : (b + 1) * k]) for b in range(prompts)]
