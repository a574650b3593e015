"""Input formats of the discriminator: prompts, targets and completions → tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_gan.errors import LoraGANError
from lora_gan.types import DiscriminatorBatch

Branches = Mapping[str, Sequence[Sequence[Tensor]]]


@dataclass(frozen=True)
class DiscriminatorInput:
    """Input of the discriminator for B prompts: a beginning, and by kind the branches that follow it."""

    beginnings: Sequence[Tensor]  # B tensors, none empty
    branches: Branches  # kind → B sequences of tensors, each ending with EOS


class InputFormat(ABC):
    """Turns prompts, targets and completions into the discriminator's input."""

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
