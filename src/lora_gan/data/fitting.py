"""Length filter: a prompt that is too long is cut in its longest field, or the example is dropped and counted."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_gan.context import UNLIMITED, tokenizer_context
from lora_gan.data.cache import encode_large
from lora_gan.data.templates import Prompt, PromptFormat
from lora_gan.data.tokenizer import Encoded, adopt_turn_end, encode_prompts
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
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        prompt: int,
        target: int,
        total: int | None,
        context: int = UNLIMITED,
        completion: int = SHORTEST_TARGET,
    ) -> LengthLimits:
        """The limits.

        Args:
            tokenizer: Its context length is the default of ``total``.
            prompt: Most tokens of a prompt.
            target: Most tokens of a target.
            total: Most tokens of both together.
            context: Context length of the model, which nothing may exceed.
            completion: Tokens of it that a prompt leaves free for a sampled completion.
        """
        total = min(total or tokenizer_context(tokenizer), context)
        return cls(min(prompt, total - SHORTEST_TARGET, context - completion), target, total)

    def fits(self, prompt: int, target: int) -> bool:
        """Whether a completion of ``target`` tokens fits after a prompt of ``prompt`` tokens."""
        return target <= min(self.target, self.total - prompt)


class LengthFilter:
    """Encodes examples and drops those that do not fit.

    ``dropped`` and ``repaired`` count, by reason, what was dropped and what was cut.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, limits: LengthLimits, prompts: PromptFormat = PromptFormat()
    ) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.prompts = prompts
        self.dropped: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()

    def fit(self, examples: Sequence[Example]) -> Iterator[Encoded]:
        """The examples that fit, with the negatives that fit."""
        adopt_turn_end(self.tokenizer, self.prompts)
        written = [self.prompts.write(self.tokenizer, example) for example in examples]
        self.repaired["own_system_message_replaced"] += sum(map(self.prompts.replaces_system, examples))
        for item in encode_large(self.tokenizer, written):
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
        example = shorten(item.example, limit, self._count)
        if example is None:
            return item
        self.repaired["prompt_cut"] += 1
        return replace(item, example=example, prompt_ids=encode_prompts(self.tokenizer, [example])[0])

    def _count(self, example: Example) -> int:
        return len(encode_prompts(self.tokenizer, [example])[0])

    def _fault(self, item: Encoded) -> str:
        if not item.prompt_ids:
            return "empty_prompt"
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


def shorten(example: Example, limit: int, count: Callable[[Example], int]) -> Example | None:
    """``example`` with a prompt of at most ``limit`` tokens; None if cutting the cuttable fields is not enough.

    The beginning of the longest field is cut first; if removing all of it is not enough, the next longest is cut too.
    """

    def cut(start: int, end: int) -> Example:
        made = Prompt(example.prompt, example.cuttable, example.literal).without(start, end)
        return replace(example, prompt=made.text, cuttable=made.cuttable, literal=made.literal)

    for _ in example.cuttable:
        start, end = max(example.cuttable, key=lambda span: span[1] - span[0])
        kept = bisect_right(range(end - start + 1), limit, key=lambda n: count(cut(start, end - n))) - 1
        example = cut(start, end - max(kept, 0))
        if kept >= 0:
            return example if example.cuttable else None
    return None
