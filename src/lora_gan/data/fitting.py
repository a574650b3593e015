"""Length filter: a prompt that is too long is cut in its longest field, or the example is dropped and counted."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_gan.context import tokenizer_context
from lora_gan.data.cache import encode_large
from lora_gan.data.templates import as_chat, join, pieces_of
from lora_gan.data.tokenizer import Encoded, prompt_ids
from lora_gan.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST_TARGET = 2  # a token and EOS


@dataclass(frozen=True)
class LengthLimits:
    """Largest numbers of tokens of a prompt, of a completion with its EOS, and of both together."""

    prompt: int
    target: int
    total: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, prompt: int, target: int, total: int | None) -> LengthLimits:
        """The limits; ``total`` is the context length of the tokenizer by default."""
        total = total or tokenizer_context(tokenizer)
        return cls(min(prompt, total - SHORTEST_TARGET), target, total)

    def fits(self, prompt: int, target: int) -> bool:
        """Whether a completion of ``target`` tokens fits after a prompt of ``prompt`` tokens."""
        return target <= min(self.target, self.total - prompt)


class LengthFilter:
    """Encodes examples and drops those that do not fit.

    ``dropped`` and ``repaired`` count, by reason, what was dropped and what was cut.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, limits: LengthLimits, chat: bool = False, system: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.chat = chat
        self.system = system
        self.dropped: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()

    def fit(self, examples: Sequence[Example]) -> Iterator[Encoded]:
        """The examples that fit, with the negatives that fit."""
        if self.chat:
            examples = [as_chat(self.tokenizer, example, self.system) for example in examples]
        for item in encode_large(self.tokenizer, examples):
            shortened = self._shortened(item)
            reason = self._fault(shortened)
            if reason:
                self.dropped[reason] += 1
            else:
                yield self._with_fitting_negatives(shortened)

    def _shortened(self, item: Encoded) -> Encoded:
        limit = min(self.limits.prompt, self.limits.total - len(item.target_ids))
        if len(item.prompt_ids) <= limit or len(item.target_ids) > self.limits.target:
            return item
        example = shorten(item.example, limit, lambda text: len(prompt_ids(self.tokenizer, text)))
        if example is None:
            return item
        self.repaired["prompt_cut"] += 1
        return replace(item, example=example, prompt_ids=prompt_ids(self.tokenizer, example.prompt))

    def _fault(self, item: Encoded) -> str:
        if len(item.prompt_ids) > self.limits.prompt:
            return "prompt_too_long"
        return "" if self.limits.fits(len(item.prompt_ids), len(item.target_ids)) else "target_too_long"

    def _with_fitting_negatives(self, item: Encoded) -> Encoded:
        pairs = zip(item.example.negatives, item.negative_ids, strict=True)
        fitting = [(negative, ids) for negative, ids in pairs if self.limits.fits(len(item.prompt_ids), len(ids))]
        left_out = len(item.negative_ids) - len(fitting)
        if not left_out:
            return item
        self.dropped["negative_too_long"] += left_out
        example = replace(item.example, negatives=tuple(negative for negative, _ in fitting))
        return replace(item, example=example, negative_ids=tuple(ids for _, ids in fitting))


def shorten(example: Example, limit: int, count: Callable[[str], int]) -> Example | None:
    """``example`` with a prompt of at most ``limit`` tokens; None if cutting the cuttable fields is not enough.

    The beginning of the longest field is cut first; if removing all of it is not enough, the next longest is cut too.
    """
    pieces = pieces_of(example.prompt, example.cuttable)
    for i in sorted(range(1, len(pieces), 2), key=lambda i: len(pieces[i]), reverse=True):
        before, field, after = "".join(pieces[:i]), pieces[i], "".join(pieces[i + 1 :])

        def tokens(kept: int, before: str = before, field: str = field, after: str = after) -> int:
            return count(before + field[len(field) - kept :] + after)

        kept = bisect_right(range(len(field) + 1), limit, key=tokens) - 1
        pieces[i] = field[len(field) - max(kept, 0) :]
        if kept >= 0:
            cut = join(pieces)
            return replace(example, prompt=cut.text, cuttable=cut.cuttable) if cut.cuttable else None
    return None
