"""The policy as rewards may ask it: how likely it finds a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_gan.backbone import Backbone
from lora_gan.data.tokenizer import encode_completions


@dataclass(frozen=True)
class ActivePolicy:
    """The backbone in its active mode."""

    backbone: Backbone
    parts: Callable[[int], Sequence[Sequence[int]]]  # number of prompts → which of them are in each pass

    @property
    def context_length(self) -> int:
        """The most tokens of a prompt and a completion together."""
        return self.backbone.context_length

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens of completions, their end included."""
        return encode_completions(self.backbone.tokenizer, texts)

    @torch.no_grad()
    def logprobs(
        self, prompts: Sequence[Tensor], completions: Mapping[str, Sequence[Sequence[Tensor]]]
    ) -> dict[str, Tensor]:
        """Log-probability of every token at temperature 1, by kind: (M, T), 0 behind the end of a completion.

        Args:
            prompts: B tensors (P,).
            completions: By kind, those of each prompt, tensors (T,), none empty.
        """
        return self.backbone.logprobs_of(prompts, completions, self.parts(len(prompts)))
