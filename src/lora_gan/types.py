"""The data that a round hands on. Every shape of the project stands here.

Axes: B prompts, K answers for each prompt, N = B·K answers (answer ``n`` belongs to prompt ``n // K``),
P prompt tokens, T answer tokens, M branches of a prompt tree, L tokens of a prompt tree, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Negative:
    """A wrong or worse answer to a prompt; ``kind`` says in what way, so that accuracy can be told by kind."""

    text: str
    kind: str


Span = tuple[int, int]  # start and end, in characters


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue, for models with a chat template; ``cuttable`` is as in :class:`Example`."""

    role: str  # system, user or assistant
    content: str
    cuttable: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Example:
    """One prompt with what is known about good and bad answers to it.

    ``prompt`` is the formatted text and ends where generation starts; ``target`` is the wanted answer without EOS.
    ``references`` are all accepted answers, the target first. ``group`` is what must not cross a split.
    ``cuttable`` are the spans of the prompt that may lose their beginning where the prompt is too long: an input, a
    context or an earlier turn, never the instruction. ``messages`` is the prompt as a dialogue.
    """

    prompt: str
    target: str
    references: tuple[str, ...] = ()
    negatives: tuple[Negative, ...] = ()
    group: str = ""
    source: str = ""
    meta: Mapping[str, str] = field(default_factory=dict)
    cuttable: tuple[Span, ...] = ()
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class PromptBatch:
    """B tokenised examples. Answers (targets, negatives) end with EOS; nothing is padded.

    An example without target has an empty one, so ``target_ids`` of EOS alone; see :attr:`answered`.
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
    def answered(self) -> list[int]:
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
        return tuple(example.target for example in self.examples)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PromptBatch:
        """The same batch with its tensors on ``device`` (Lightning moves batches through this)."""

        def move(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t.to(device, non_blocking=non_blocking) for t in tensors)

        negatives = tuple(move(row) for row in self.negative_ids)
        return PromptBatch(self.examples, move(self.prompt_ids), move(self.target_ids), negatives)


@dataclass(frozen=True)
class Rollout:
    """K sampled answers for each of B prompts, exactly as they were sampled."""

    ids: Tensor  # (N, T) token ids, pad after the end
    mask: Tensor  # (N, T) bool: True on sampled tokens, EOS included
    logprobs: Tensor  # (N, T) log-probability of each token at the sampling temperature, 0 where masked
    truncated: Tensor  # (N,) bool: stopped by the length limit, so without EOS
    texts: tuple[str, ...]  # N decoded answers
    k: int

    @classmethod
    def empty(cls, device: torch.device) -> Rollout:
        """No answers, for a round that only learns from targets."""
        ids = torch.zeros(0, 0, dtype=torch.long, device=device)
        return cls(ids, ids.bool(), ids.float(), torch.zeros(0, dtype=torch.bool, device=device), (), 0)

    def __len__(self) -> int:
        """N."""
        return len(self.texts)

    def of(self, prompts: Sequence[int]) -> Rollout:
        """The answers to the chosen prompts only, as wide as the longest of them."""
        rows = self.rows_of(prompts)
        index = torch.tensor(rows, dtype=torch.long, device=self.ids.device)
        width = int(self.mask[index].sum(-1).max())
        ids, mask, logprobs = (x[index, :width] for x in (self.ids, self.mask, self.logprobs))
        return Rollout(ids, mask, logprobs, self.truncated[index], tuple(self.texts[n] for n in rows), self.k)

    def rows_of(self, prompts: Sequence[int]) -> list[int]:
        """Which of the N answers belong to the chosen prompts."""
        return [b * self.k + i for b in prompts for i in range(self.k)]

    @property
    def answer_ids(self) -> tuple[Tensor, ...]:
        """N tensors (T,) without padding."""
        lengths = self.mask.sum(-1).tolist()
        return tuple(row[:length] for row, length in zip(self.ids, lengths, strict=True))


@dataclass(frozen=True)
class RewardContext:
    """What a reward may look at besides the texts: the reference model's view of the answers."""

    k: int  # answers for each prompt: answer n belongs to batch.examples[n // k]
    logprobs: Tensor  # (N, T) log-probability of each answer token under the base (adapters off), temperature 1
    mask: Tensor  # (N, T) bool: True on answer tokens, EOS included


@dataclass(frozen=True)
class Scores:
    """The rewards of a rollout and of the batch's targets."""

    total: Tensor  # (N,) weighted sum of the parts
    parts: Mapping[str, Tensor]  # name → (N,), each before its weight
    applies: Mapping[str, Tensor]  # name → (N,) bool, False where the reward says nothing
    target_total: Tensor  # the same reward given to the targets of the answered prompts; (0,) where nobody asked
    target_parts: Mapping[str, Tensor]  # name → as target_total
    reference_logprobs: Tensor  # (N, T) under the KL reference, at the sampling temperature
    base_logprobs: Tensor  # (N, T) under the base, at temperature 1


@dataclass(frozen=True)
class Answered:
    """Answers of one player to a batch of an evaluation, one for each prompt, with their rewards."""

    examples: tuple[Example, ...]  # B
    texts: tuple[str, ...]  # B
    truncated: Tensor  # (B,) bool
    reward: Tensor  # (B,)
    perplexity: Tensor  # (B,) under the base


@dataclass(frozen=True)
class Candidates:
    """What the discriminator is shown: prompts, their targets, and answers by kind. Answers end with EOS."""

    prompts: tuple[Tensor, ...]  # B tensors (P,)
    targets: tuple[Tensor, ...]  # B tensors (T,)
    answers: Mapping[str, Sequence[Sequence[Tensor]]]  # kind → for each prompt its answers, tensors (T,)

    def is_target(self, answer: Tensor, prompt: int) -> bool:
        """Whether the answer is the prompt's target, word for word; an empty one is nobody's."""
        return len(answer) > 1 and torch.equal(answer, self.targets[prompt])

    def prompt_of(self, kind: str) -> Tensor:
        """(M,) which prompt each answer of the kind belongs to."""
        rows = [b for b, answers in enumerate(self.answers[kind]) for _ in answers]
        return torch.tensor(rows, dtype=torch.long, device=self.prompts[0].device)


@dataclass(frozen=True)
class Judged:
    """The discriminator's opinion of M answers of one kind, and what is known about them."""

    score: Tensor  # (M,)
    auxiliary: Tensor  # (M,) prediction of the auxiliary head
    prompt: Tensor  # (M,) which prompt each answers
    length: Tensor  # (M,) in tokens
    is_target: Tensor  # (M,) bool: word for word the target
    reward: Tensor | None = None  # (M,) what the rewards gave; None where nobody asked them
    parts: Mapping[str, Tensor] = field(default_factory=dict)  # name → (M,)

    def where(self, chosen: Tensor) -> Judged:
        """The answers where ``chosen`` (M,) is True, without gradient."""
        fields = (self.score, self.auxiliary, self.prompt, self.length, self.is_target)
        score, auxiliary, prompt, length, is_target = (x.detach()[chosen] for x in fields)
        reward = None if self.reward is None else self.reward[chosen]
        return Judged(
            score, auxiliary, prompt, length, is_target, reward, {k: v[chosen] for k, v in self.parts.items()}
        )


@dataclass(frozen=True)
class Judgement:
    """What the discriminator thought of the answers before it learned from them; detached."""

    sampled: Tensor  # (N,) scores of the sampled answers
    target: Tensor  # of the targets of the answered prompts; (0,) where it was not asked
    opponent: Tensor  # (N,) of the opponent's answers; (0,) where there is none
    k: int
    metrics: Mapping[str, Tensor]  # scalars to log

    @property
    def per_prompt(self) -> Tensor:
        """(B, K) scores of the sampled answers."""
        return self.sampled.view(-1, self.k)


@dataclass(frozen=True)
class Earnings:
    """What the policy was paid for each token, and what was to be expected."""

    rewards: Tensor  # (N, T): the answer's reward stands at its last token, penalties where they arise
    predicted: Tensor  # (N,) the discriminator's scores
    baseline: Tensor  # scalar, the module's knob
    values: Tensor | None = None  # (N, T) of the value head, at each token before it was drawn

    @property
    def per_answer(self) -> Tensor:
        """(N,) the sum over each answer's tokens."""
        return self.rewards.sum(-1)


@dataclass(frozen=True)
class Credit:
    """How much better each sampled token's answer was than expected; no gradient."""

    advantages: Tensor  # (N, T)
    metrics: Mapping[str, Tensor]
    returns: Tensor | None = None  # (N, T) what the value head shall predict
    values: Tensor | None = None  # (N, T) what it predicted

    def of(self, rows: Sequence[int], width: int) -> Credit:
        """The credit of the chosen answers' first ``width`` tokens only."""
        index = torch.tensor(rows, dtype=torch.long, device=self.advantages.device)
        returns, values = (None if x is None else x[index, :width] for x in (self.returns, self.values))
        return Credit(self.advantages[index, :width], self.metrics, returns, values)


@dataclass(frozen=True)
class LossTerm:
    """A loss of one player, and what is worth logging about it."""

    loss: Tensor  # scalar with gradient
    metrics: Mapping[str, Tensor]


@dataclass(frozen=True)
class Lesson:
    """What the generator learns from in one update: some prompts of the round, or all."""

    batch: PromptBatch
    rollout: Rollout
    credit: Credit
    reference_logprobs: Tensor  # (N, T)

    def of(self, prompts: Sequence[int]) -> Lesson:
        """The chosen prompts only."""
        if list(prompts) == list(range(len(self.batch))):
            return self
        if len(self.rollout) == 0:
            return replace(self, batch=self.batch.of(prompts))
        rows, rollout = self.rollout.rows_of(prompts), self.rollout.of(prompts)
        width = rollout.ids.shape[1]
        reference = self.reference_logprobs[rows, :width]
        return Lesson(self.batch.of(prompts), rollout, self.credit.of(rows, width), reference)


@dataclass(frozen=True)
class Learned:
    """What the generator's update did."""

    metrics: Mapping[str, Tensor]
