"""What fits. A prompt that is too long is cut inside its longest field; else the example is left out and counted."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_gan.data.cache import encode_large
from lora_gan.data.templates import as_chat, join, pieces_of
from lora_gan.data.tokenizer import Encoded, prompt_ids
from lora_gan.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST_TARGET = 2  # a token and EOS
UNLIMITED = 1_000_000  # tokens; a tokenizer that knows no context length says 1e30


@dataclass(frozen=True)
class LengthLimits:
    """The most tokens that a prompt, a completion with its EOS, and both together may hold."""

    prompt: int
    target: int
    total: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, prompt: int, target: int, total: int | None) -> LengthLimits:
        """``total`` left out is what the tokenizer says."""
        total = total or min(int(tokenizer.model_max_length), UNLIMITED)
        return cls(min(prompt, total - SHORTEST_TARGET), target, total)

    def fits(self, prompt: int, target: int) -> bool:
        """Whether a completion of this length fits behind a prompt of that length."""
        return target <= min(self.target, self.total - prompt)


class LengthFilter:
    """Examples as ids, as far as they fit.

    ``dropped`` and ``repaired`` count by reason what was left out and what was cut.
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
    """``example`` with a prompt of at most ``limit`` tokens; None where cutting what may be cut is not enough.

    The longest field loses its beginning first; where even all of it is not enough, the next longest.
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
