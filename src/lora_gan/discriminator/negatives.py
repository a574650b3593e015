"""Completions that the discriminator is shown as worse than the target.

Every kind is a class of its own, and any of them can be combined. Some are drawn from the batch
(:class:`HardNegatives`, :class:`OtherCompletions`), the others are made from the target or the prompt
(:class:`MadeUp`). None of them is an accepted completion as exact match understands it, and none is too long to follow
its prompt. All randomness is torch's global generator.
"""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import regex
import torch
from torch import Tensor

from lora_gan.data.tokenizer import encode_completions
from lora_gan.errors import LoraGANError
from lora_gan.text_metrics import UNSPACED, normalise
from lora_gan.types import Example, PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

TRIES = 4  # for each text wanted, where chance may give one that is right or already there
CLASSIC = "Hello world!"  # the loop that small models are known for
REFUSALS = (
    "I cannot help with that.",
    "I'm sorry, but I can't answer that.",
    "I don't know.",
    "As a language model, I am not able to answer this question.",
    "Sorry, I have no information about that.",
    "I would rather not talk about this.",
)

SIGN = rf"(?V1)[{UNSPACED}]"
WORD = regex.compile(rf"{SIGN}\p{{M}}*|[^\s{UNSPACED}]+")  # punctuation belongs to its word
CHARACTER = regex.compile(r"(?!\s)\X")  # with its accents; an emoji with all it consists of
PUNCTUATION = regex.compile(r"\p{P}+")
NUMBER = regex.compile(r"\d+")
CAPITALISED = r"\p{Lu}\p{M}*\p{L}[\p{L}\p{M}-]*"
NAME = regex.compile(rf"(?<=[\p{{L}}\p{{M}}\p{{N}},;)] [“\"'(«]?){CAPITALISED}(?: {CAPITALISED})*")  # within a sentence
HEADER = regex.compile(r"(?m)^###[^:\n]*:?")  # what stands behind its colon is the user's


class Negatives(ABC):
    """Worse completions to a batch's prompts, for the discriminator to learn from.

    Args:
        per_prompt: The most of them for each prompt.
    """

    kind: str  # what metrics call them: discriminator/accuracy_<kind>

    def __init__(self, per_prompt: int = 1) -> None:
        if per_prompt < 1:
            name = type(self).__name__
            raise LoraGANError(f"per_prompt of {name} must be at least 1, got {per_prompt}; to have none, leave it out")
        self.per_prompt = per_prompt

    @abstractmethod
    def __call__(self, batch: PromptBatch, tokenizer: PreTrainedTokenizerBase) -> list[list[Tensor]]:
        """For each of the B prompts up to ``per_prompt`` token tensors (T,), each ending with EOS."""


@dataclass(frozen=True)
class Completion:
    text: str
    ids: Tensor  # (T,), EOS included


class HardNegatives(Negatives):
    """Wrong completions that the data set brings along; where an example has none, other prompts' targets.

    Args:
        per_prompt: The most of them for each prompt, drawn anew each time, none twice.
    """

    kind = "hard"

    def __call__(self, batch: PromptBatch, tokenizer: PreTrainedTokenizerBase) -> list[list[Tensor]]:
        pools = [
            _usable(_brought(batch, b), batch, b, tokenizer) or _usable(_others(batch, b), batch, b, tokenizer)
            for b in range(len(batch))
        ]
        return [_draw(pool, self.per_prompt) for pool in pools]


class OtherCompletions(Negatives):
    """Targets of the batch's other prompts (of other groups): fluent, but beside the question.

    Args:
        per_prompt: The most of them for each prompt, drawn anew each time, none twice.
    """

    kind = "other"

    def __call__(self, batch: PromptBatch, tokenizer: PreTrainedTokenizerBase) -> list[list[Tensor]]:
        return [_draw(_usable(_others(batch, b), batch, b, tokenizer), self.per_prompt) for b in range(len(batch))]


class MadeUp(Negatives):
    """Texts made for each example; a subclass writes ``kind`` and :meth:`_make`."""

    @abstractmethod
    def _make(self, batch: PromptBatch, b: int, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """A worse completion to prompt ``b``, another one each time if chance has a part in it; None if there is
        none.
        """

    def __call__(self, batch: PromptBatch, tokenizer: PreTrainedTokenizerBase) -> list[list[Tensor]]:
        texts = [self._texts(batch, b, tokenizer) for b in range(len(batch))]
        ids = iter(encode_completions(tokenizer, [text for row in texts for text in row]))
        return [
            _usable([Completion(text, _on_device(next(ids), batch, b)) for text in row], batch, b, tokenizer)
            for b, row in enumerate(texts)
        ]

    def _texts(self, batch: PromptBatch, b: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Up to ``per_prompt`` different ones."""
        known = {"", *map(normalise, _accepted(batch.examples[b]))}
        texts: list[str] = []
        for _ in range(TRIES * self.per_prompt):
            text = self._make(batch, b, tokenizer)
            if text is not None and normalise(text) not in known:
                known.add(normalise(text))
                texts.append(text)
            if text is None or len(texts) == self.per_prompt:
                break
        return texts


class ShuffledWords(MadeUp):
    """The target's words in another order, white space left in place; a single word's characters."""

    kind = "shuffled"

    def _make(self, batch: PromptBatch, b: int, tokenizer: PreTrainedTokenizerBase) -> str | None:
        text = batch.targets[b]
        unit = _unit(text)
        units = unit.findall(text)
        if len(set(units)) < 2:
            return None
        shuffled = units
        while shuffled == units:
            shuffled = [units[i] for i in torch.randperm(len(units)).tolist()]
        moved = iter(shuffled)
        return str(unit.sub(lambda _: next(moved), text))


class CutShort(MadeUp):
    """The target's beginning: at least one of its words and not all of them; a single word's first characters."""

    kind = "cut"

    def _make(self, batch: PromptBatch, b: int, tokenizer: PreTrainedTokenizerBase) -> str | None:
        text = batch.targets[b]
        starts = [unit.start() for unit in _unit(text).finditer(text) if not PUNCTUATION.fullmatch(unit.group())]
        return text[: _pick(starts[1:])].rstrip() if len(starts) > 1 else None


class Repetition(MadeUp):
    """A loop: one to four words of the target, or "Hello world!", over and over, at least three times."""

    kind = "repetition"

    def _make(self, batch: PromptBatch, b: int, tokenizer: PreTrainedTokenizerBase) -> str | None:
        text = batch.targets[b]
        phrase = _phrase(text, 1 + _below(4))
        loop = phrase if phrase and _below(4) else CLASSIC
        joint = "" if regex.search(SIGN, loop) else " "
        length = len(text) * (1 + 2 * torch.rand(()).item())
        return joint.join([loop] * max(3, round(length / len(loop + joint))))


class Swapped(MadeUp):
    """The target with a number changed, or a name replaced by one from another target: fluent but wrong.

    A name is one or more capitalised words that do not begin a sentence. Targets without either give none.
    """

    kind = "swapped"

    def _make(self, batch: PromptBatch, b: int, tokenizer: PreTrainedTokenizerBase) -> str | None:
        text = batch.targets[b]
        accepted = _accepted(batch.examples[b])
        others = {name: None for other in _others(batch, b) for name in _names(other.text)}
        names = [name for name in others if not any(name in completion for completion in accepted)]
        places = [*NUMBER.finditer(text), *(NAME.finditer(text) if names else ())]
        if not places:
            return None
        place = _pick(places)
        new = _other_number(place.group()) if place.group().isdecimal() else _pick(names)
        return text[: place.start()] + new + text[place.end() :]


class Refusal(MadeUp):
    """A refusal to completion. Leave it out where the data has targets that refuse with good reason.

    Args:
        per_prompt: The most of them for each prompt.
        texts: What refusals sound like; left out, a handful of common ones.
    """

    kind = "refusal"

    def __init__(self, per_prompt: int = 1, texts: list[str] | None = None) -> None:
        super().__init__(per_prompt)
        self.texts = list(REFUSALS) if texts is None else texts
        if not self.texts or not all(text.strip() for text in self.texts):
            raise LoraGANError(f"texts of Refusal must be texts that are not empty, got {texts}; left out, it has some")

    def _make(self, batch: PromptBatch, b: int, tokenizer: PreTrainedTokenizerBase) -> str | None:
        return _pick(self.texts)


class Echo(MadeUp):
    """The prompt given back as the completion, without special tokens and headers such as "### Prompt:".

    There is one echo of a prompt, whatever ``per_prompt`` says.
    """

    kind = "echo"

    def _make(self, batch: PromptBatch, b: int, tokenizer: PreTrainedTokenizerBase) -> str | None:
        prompt = tokenizer.decode(batch.prompt_ids[b].tolist(), skip_special_tokens=True)
        return str(HEADER.sub("", prompt)).strip() or None


# the batch


def _brought(batch: PromptBatch, b: int) -> list[Completion]:
    """The example's own negatives."""
    pairs = zip(batch.examples[b].negatives, batch.negative_ids[b], strict=True)
    return [Completion(negative.text, ids) for negative, ids in pairs]


def _others(batch: PromptBatch, b: int) -> list[Completion]:
    """Targets of other groups than the example's."""
    group = batch.examples[b].group
    pairs = zip(batch.examples, batch.target_ids, strict=True)
    return [Completion(other.target, ids) for other, ids in pairs if other.group != group]


def _accepted(example: Example) -> tuple[str, ...]:
    return (example.target, *example.references)


def _usable(
    completions: Iterable[Completion], batch: PromptBatch, b: int, tokenizer: PreTrainedTokenizerBase
) -> list[Tensor]:
    """Those that are no accepted completion to prompt ``b`` and fit into the context behind it."""
    accepted = set(map(normalise, _accepted(batch.examples[b])))
    room = tokenizer.model_max_length - len(batch.prompt_ids[b])
    return [a.ids for a in completions if normalise(a.text) not in accepted and len(a.ids) <= room]


def _on_device(ids: Sequence[int], batch: PromptBatch, b: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.long, device=batch.prompt_ids[b].device)


# chance


def _draw(pool: Sequence[T], n: int) -> list[T]:
    """Up to n of them, none twice."""
    return [pool[i] for i in torch.randperm(len(pool))[:n].tolist()]


def _pick(pool: Sequence[T]) -> T:
    return pool[_below(len(pool))]


def _below(n: int) -> int:
    """One of 0 … n − 1."""
    return int(torch.randint(n, ()).item())


# text


def _unit(text: str) -> regex.Pattern[str]:
    """What a text is taken apart into: words, or the characters of a single word."""
    return WORD if len(WORD.findall(text)) > 1 else CHARACTER


def _phrase(text: str, n: int) -> str:
    """n neighbouring words of a text, or as many as there are."""
    words = list(WORD.finditer(text))
    if not words:
        return ""
    n = min(n, len(words))
    first = _below(len(words) - n + 1)
    return text[words[first].start() : words[first + n - 1].end()]


@lru_cache(maxsize=4096)
def _names(text: str) -> tuple[str, ...]:
    return tuple(NAME.findall(text))


def _other_number(number: str) -> str:
    """One of the last two digits changed, in its script, so that a year stays a year; no first digit becomes 0."""
    at = len(number) - 1 - _below(min(2, len(number)))
    digit = unicodedata.decimal(number[at])
    lowest = 1 if at == 0 and len(number) > 1 else 0
    other = _pick([d for d in range(lowest, 10) if d != digit])
    return number[:at] + chr(ord(number[at]) - digit + other) + number[at + 1 :]
