"""What fits: examples, or single negatives, that are too long are left out and counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_gan.data.tokenizer import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST_ANSWER = 2  # a token and EOS
UNLIMITED = 1_000_000  # tokens; a tokenizer that knows no context length says 1e30


@dataclass(frozen=True)
class Room:
    """The most tokens that a prompt, an answer with its EOS, and both together may hold."""

    prompt: int
    answer: int
    together: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, prompt: int, answer: int, together: int | None) -> Room:
        """``together`` left out is what the tokenizer says."""
        together = together or min(int(tokenizer.model_max_length), UNLIMITED)
        return cls(min(prompt, together - SHORTEST_ANSWER), answer, together)

    def has(self, prompt: int, answer: int) -> bool:
        """Whether an answer of this length fits behind a prompt of that length."""
        return answer <= min(self.answer, self.together - prompt)


def fit(item: Encoded, room: Room, dropped: Counter[str]) -> Encoded | None:
    """``item`` with the negatives that fit, or None where its prompt or target does not."""
    if len(item.prompt_ids) > room.prompt:
        dropped["prompt_too_long"] += 1
    elif not room.has(len(item.prompt_ids), len(item.target_ids)):
        dropped["target_too_long"] += 1
    else:
        fitting = _fitting_negatives(item, room)
        dropped["negative_too_long"] += len(item.negative_ids) - len(fitting.negative_ids)
        return fitting
    return None


def _fitting_negatives(item: Encoded, room: Room) -> Encoded:
    pairs = zip(item.example.negatives, item.negative_ids, strict=True)
    fitting = [(negative, ids) for negative, ids in pairs if room.has(len(item.prompt_ids), len(ids))]
    if len(fitting) == len(item.negative_ids):
        return item
    example = replace(item.example, negatives=tuple(negative for negative, _ in fitting))
    return replace(item, example=example, negative_ids=tuple(ids for _, ids in fitting))
