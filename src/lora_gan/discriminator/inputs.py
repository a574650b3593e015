"""Input formats of the discriminator: prompts, targets and completions → tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_gan.data.tokenizer import encode_completions
from lora_gan.errors import LoraGANError
from lora_gan.final_answer import FinalAnswer
from lora_gan.types import DiscriminatorBatch, as_lists

Branches = Mapping[str, Sequence[Sequence[Tensor]]]


@dataclass(frozen=True)
class DiscriminatorInput:
    """Input of the discriminator for B prompts: a beginning, and by kind the branches that follow it."""

    beginnings: Sequence[Tensor]  # B tensors, none empty
    branches: Branches  # kind → B sequences of tensors, each ending with EOS


class InputFormat(ABC):
    """Turns prompts, targets and completions into the discriminator's input."""

    reads_target = False  # True: a completion is scored beside its target
    keeps_tokens = True  # False: a completion's tokens are not all at their places, so no gradient can reach them

    @abstractmethod
    def __call__(self, batch: DiscriminatorBatch, tokenizer: PreTrainedTokenizerBase) -> DiscriminatorInput:
        """The input for a batch."""


class PromptAndCompletion(InputFormat):
    """The completion after its prompt."""

    def __call__(self, batch: DiscriminatorBatch, tokenizer: PreTrainedTokenizerBase) -> DiscriminatorInput:
        return DiscriminatorInput(batch.prompts, batch.completions)


class CompletionOnly(InputFormat):
    """The completion alone, after EOS."""

    def __call__(self, batch: DiscriminatorBatch, tokenizer: PreTrainedTokenizerBase) -> DiscriminatorInput:
        start = batch.prompts[0].new_tensor([tokenizer.eos_token_id])
        return DiscriminatorInput([start] * len(batch.prompts), batch.completions)


class CompletionAndTarget(InputFormat):
    """``GEN: <completion> || TAR: <target>``, the input of GPT2Twin.

    Args:
        before: Text before the completion; not empty.
        between: Text between completion and target.
    """

    reads_target = True

    def __init__(self, before: str = "GEN: ", between: str = " || TAR: ") -> None:
        if not before:
            raise LoraGANError("before must not be empty; give a text that precedes the completion")
        self.before = before
        self.between = between

    def __call__(self, batch: DiscriminatorBatch, tokenizer: PreTrainedTokenizerBase) -> DiscriminatorInput:
        begin, between = (
            batch.prompts[0].new_tensor(tokenizer.encode(text, add_special_tokens=False))
            for text in (self.before, self.between)
        )
        branches = {
            kind: [
                [torch.cat([completion[:-1], between, target]) for completion in completions]
                for completions, target in zip(rows, batch.targets, strict=True)
            ]
            for kind, rows in batch.completions.items()
        }
        return DiscriminatorInput([begin] * len(batch.prompts), branches)


class TargetAndCompletion(InputFormat):
    """The prompt, then target and completion as two candidates, in an order that says nothing about which is which.

    A completion to a prompt without a target stands beside an empty one.

    Args:
        before: Text between the prompt and the first candidate.
        between: Text between the two.
        after: Text behind the second, before EOS.
    """

    reads_target = True
    keeps_tokens = False

    def __init__(self, before: str = " A: ", between: str = " B: ", after: str = "") -> None:
        self.before = before
        self.between = between
        self.after = after

    def __call__(self, batch: DiscriminatorBatch, tokenizer: PreTrainedTokenizerBase) -> DiscriminatorInput:
        before, between, after = (
            batch.prompts[0].new_tensor(tokenizer.encode(text, add_special_tokens=False))
            for text in (self.before, self.between, self.after)
        )

        def joined(completion: Tensor, target: Tensor, leads: bool) -> Tensor:
            first, second = (completion, target) if leads else (target, completion)
            return torch.cat([before, first[:-1], between, second[:-1], after, second[-1:]])

        branches = {
            kind: [
                [joined(completion, target, leads) for completion, leads in zip(completions, row, strict=True)]
                for completions, target, row in zip(batch.completions[kind], batch.targets, rows, strict=True)
            ]
            for kind, rows in completion_leads(batch).items()
        }
        return DiscriminatorInput(batch.prompts, branches)


def completion_leads(batch: DiscriminatorBatch) -> dict[str, list[list[bool]]]:
    """By kind, for each prompt, which of its completions stand before the target.

    A hash of the tokens decides: half of the pairs, the same ones whenever they are read. The prompt takes part, so
    that one target and completion (yes, no) do not have the same order everywhere.
    """
    known = list(zip(as_lists(batch.prompts), as_lists(batch.targets), strict=True))
    return {
        kind: [
            [_coin((pair, completion)) for completion in as_lists(row)] for pair, row in zip(known, rows, strict=True)
        ]
        for kind, rows in batch.completions.items()
    }


def _coin(ids: object) -> bool:
    """A bit of a cryptographic hash; a bit of a checksum is a parity of the ids' bits, so alike pairs fall alike."""
    return sha256(repr(ids).encode()).digest()[0] % 2 == 0


class WorkOnly(InputFormat):
    """The work of a completion alone, after EOS: without the prompt and without the final answer.

    So a discriminator learns what well-formed work is, and cannot reward a right answer. A completion without a final
    answer is all work. Beware: targets that are answers only have no work, which gives them away.

    Args:
        final_answer: How the final answer is found, as in the module's ``final_answer``.
    """

    keeps_tokens = False

    def __init__(self, final_answer: FinalAnswer) -> None:
        self.final_answer = final_answer

    def __call__(self, batch: DiscriminatorBatch, tokenizer: PreTrainedTokenizerBase) -> DiscriminatorInput:
        start = batch.prompts[0].new_tensor([tokenizer.eos_token_id])
        branches = {
            kind: [self._work(completions, tokenizer) for completions in rows]
            for kind, rows in batch.completions.items()
        }
        return DiscriminatorInput([start] * len(batch.prompts), branches)

    def _work(self, completions: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
        """The work of each completion, ending with EOS."""
        texts = tokenizer.batch_decode(list(completions), skip_special_tokens=True) if completions else []
        ids = encode_completions(tokenizer, [self.final_answer.work(text) for text in texts])
        return [completion.new_tensor(work) for completion, work in zip(completions, ids, strict=True)]
