"""What a discriminator reads: prompts, targets and completions → token rows."""

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
    """What a discriminator reads for B prompts: a beginning, and by kind what stands behind it."""

    beginnings: Sequence[Tensor]  # B tensors, none empty
    branches: Branches  # kind → B sequences of tensors, each ending with EOS


class InputFormat(ABC):
    """How prompts, targets and completions become the discriminator's input."""

    @abstractmethod
    def __call__(self, batch: DiscriminatorBatch, tokenizer: PreTrainedTokenizerBase) -> DiscriminatorInput:
        """What is read of each candidate."""


class PromptAndCompletion(InputFormat):
    """The completion behind its prompt."""

    def __call__(self, batch: DiscriminatorBatch, tokenizer: PreTrainedTokenizerBase) -> DiscriminatorInput:
        return DiscriminatorInput(batch.prompts, batch.completions)


class CompletionOnly(InputFormat):
    """The completion alone, behind EOS."""

    def __call__(self, batch: DiscriminatorBatch, tokenizer: PreTrainedTokenizerBase) -> DiscriminatorInput:
        start = batch.prompts[0].new_tensor([tokenizer.eos_token_id])
        return DiscriminatorInput([start] * len(batch.prompts), batch.completions)


class CompletionAndTarget(InputFormat):
    """``GEN: <completion> || TAR: <target>``, the input of GPT2Twin.

    Args:
        before: What stands before the completion.
        between: What stands between completion and target.
    """

    def __init__(self, before: str = "GEN: ", between: str = " || TAR: ") -> None:
        if not before:
            raise LoraGANError("before must not be empty: a completion needs something to stand behind")
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
