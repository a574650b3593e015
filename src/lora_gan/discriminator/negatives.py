"""Negatives: completions worse than the target, for the discriminator to learn from.

Each kind is a class, and kinds can be combined. Some are drawn from the batch (:class:`HardNegatives`,
:class:`OtherCompletions`), the others are made from the target or the prompt (:class:`MadeUp`). A negative never equals
an accepted completion, compared as in exact match, and always fits into the context after its prompt. Random numbers
come from torch's global generator.
"""

from __future__ import annotations

import logging
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

log = logging.getLogger("lora_gan")

T = TypeVar("T")

PATIENCE = 3  # steps without a negative before a warning
TRIES = 4  # attempts for each text, because a random one may be correct or a duplicate
CLASSIC = "Hello world!"  # a loop typical of small models
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
CHARACTER = regex.compile(r"(?!\s)\X")  # a letter with its accents, or a whole emoji
PUNCTUATION = regex.compile(r"\p{P}+")
NUMBER = regex.compile(r"\d+")
CAPITALISED = r"\p{Lu}\p{M}*\p{L}[\p{L}\p{M}-]*"
NAME = regex.compile(rf"(?<=[\p{{L}}\p{{M}}\p{{N}},;)] [“\"'(«]?){CAPITALISED}(?: {CAPITALISED})*")  # within a sentence
HEADER = regex.compile(r"(?m)^###[^:\n]*:?")  # the text after the colon is the user's


class Negatives(ABC):
    """Worse completions to a batch's prompts, for the discriminator to learn from.

    Args:
        per_prompt: Largest number of them for each prompt.
    """

    kind: str  # name in metrics: discriminator/accuracy_<kind>
    steps = 0  # how often it was asked in this process
    drawn = 0  # how many negatives it gave

    def __init__(self, per_prompt: int = 1) -> None:
        if per_prompt < 1:
            name = type(self).__name__
            raise LoraGANError(f"per_prompt of {name} must be at least 1, got {per_prompt}; remove it to use none")
        self.per_prompt = per_prompt

    def draw(self, batch: PromptBatch, tokenizer: PreTrainedTokenizerBase) -> list[list[Tensor]]:
        """Calls it for a step, and warns once if the first steps bring no negative at all."""
        drawn = self(batch, tokenizer)
        self.steps += len(batch) > 0
        self.drawn += sum(map(len, drawn))
        if self.steps == PATIENCE and not self.drawn and len(batch):
            log.warning(
                "negatives of kind %r: none in the first %d steps; a text is left out if it is empty, too long, or the "
                "same as the target or a reference where case, spacing and a final full stop do not count",
                self.kind,
                PATIENCE,
            )
        return drawn

    @abstractmethod
    def __call__(self, batch: PromptBatch, tokenizer: PreTrainedTokenizerBase) -> list[list[Tensor]]:
        """For each of the B prompts up to ``per_prompt`` token tensors (T,), each ending with EOS."""


@dataclass(frozen=True)
class Completion:
    text: str
    ids: Tensor  # (T,), EOS included


class HardNegatives(Negatives):
    """Wrong completions from the data set; if an example has none, targets of other prompts.

    Args:
        per_prompt: Largest number of them for each prompt, drawn anew in each step without repetition.
        others: Whether targets of other prompts take the place of missing ones, which teaches what belongs to a prompt.
            Set false where the discriminator is to learn preferences alone.
    """

    kind = "hard"

    def __init__(self, per_prompt: int = 1, others: bool = True) -> None:
        super().__init__(per_prompt)
        self.others = others

    def __call__(self, batch: PromptBatch, tokenizer: PreTrainedTokenizerBase) -> list[list[Tensor]]:
        pools = []
        for b in range(len(batch)):
            given = _usable(_provided(batch, b), batch, b, tokenizer)
            pools.append(given or (_usable(_others(batch, b), batch, b, tokenizer) if self.others else []))
        return [_draw(pool, self.per_prompt) for pool in pools]


class OtherCompletions(Negatives):
    """Targets of the batch's other prompts (of other groups): fluent, but off topic.

    Args:
        per_prompt: Largest number of them for each prompt, drawn anew in each step without repetition.
    """

    kind = "other"

    def __call__(self, batch: PromptBatch, tokenizer: PreTrainedTokenizerBase) -> list[list[Tensor]]:
        return [_draw(_usable(_others(batch, b), batch, b, tokenizer), self.per_prompt) for b in range(len(batch))]


class MadeUp(Negatives):
    """Texts made for each example; a subclass defines ``kind`` and :meth:`_make`."""

    @abstractmethod
    def _make(self, batch: PromptBatch, b: int, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """A worse completion to prompt ``b``, in each call another one if it is random; None if there is none."""

    def __call__(self, batch: PromptBatch, tokenizer: PreTrainedTokenizerBase) -> list[list[Tensor]]:
        texts = [self._texts(batch, b, tokenizer) for b in range(len(batch))]
        ids = iter(encode_completions(tokenizer, [text for row in texts for text in row]))
        return [
            _usable([Completion(text, _on_device(next(ids), batch, b)) for text in row], batch, b, tokenizer)
            for b, row in enumerate(texts)
        ]

    def _texts(self, batch: PromptBatch, b: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Up to ``per_prompt`` different texts."""
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
    """The target's words, or the characters of a single word, in another order; white space stays in place."""

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
    """The target's beginning: at least one word but not all, or the first characters of a single word."""

    kind = "cut"

    def _make(self, batch: PromptBatch, b: int, tokenizer: PreTrainedTokenizerBase) -> str | None:
        text = batch.targets[b]
        starts = [unit.start() for unit in _unit(text).finditer(text) if not PUNCTUATION.fullmatch(unit.group())]
        return text[: _pick(starts[1:])].rstrip() if len(starts) > 1 else None


class Repetition(MadeUp):
    """A loop: one to four words of the target, or "Hello world!", repeated at least three times."""

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

    A name is one or more capitalised words that do not begin a sentence. Targets with neither give no negative.
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
    """A refusal to answer. Leave it out if the data has targets that refuse for good reason.

    Args:
        per_prompt: Largest number of them for each prompt.
        texts: Texts of refusals; by default a few common ones.
    """

    kind = "refusal"

    def __init__(self, per_prompt: int = 1, texts: list[str] | None = None) -> None:
        super().__init__(per_prompt)
        self.texts = list(REFUSALS) if texts is None else texts
        if not self.texts or not all(text.strip() for text in self.texts):
            raise LoraGANError(
                f"texts of Refusal must be one or more non-empty strings, got {texts}; leave it out for the defaults"
            )

    def _make(self, batch: PromptBatch, b: int, tokenizer: PreTrainedTokenizerBase) -> str | None:
        return _pick(self.texts)


class Echo(MadeUp):
    """The prompt repeated as the completion, without special tokens and headers such as "### Prompt:".

    A prompt has only one echo, whatever ``per_prompt`` is.
    """

    kind = "echo"

    def _make(self, batch: PromptBatch, b: int, tokenizer: PreTrainedTokenizerBase) -> str | None:
        prompt = tokenizer.decode(batch.prompt_ids[b].tolist(), skip_special_tokens=True)
        return str(HEADER.sub("", prompt)).strip() or None


# the batch


def _provided(batch: PromptBatch, b: int) -> list[Completion]:
    """The example's own negatives."""
    pairs = zip(batch.examples[b].negatives, batch.negative_ids[b], strict=True)
    return [Completion(negative.text, ids) for negative, ids in pairs]


def _others(batch: PromptBatch, b: int) -> list[Completion]:
    """Targets of the other groups in the batch."""
    group = batch.examples[b].group
    pairs = zip(batch.examples, batch.target_ids, strict=True)
    return [Completion(other.target, ids) for other, ids in pairs if other.group != group]


def _accepted(example: Example) -> tuple[str, ...]:
    return (example.target, *example.references)


def _usable(
    completions: Iterable[Completion], batch: PromptBatch, b: int, tokenizer: PreTrainedTokenizerBase
) -> list[Tensor]:
    """Those that are not accepted completions to prompt ``b`` and fit into the context after it."""
    accepted = set(map(normalise, _accepted(batch.examples[b])))
    room = tokenizer.model_max_length - len(batch.prompt_ids[b])
    return [a.ids for a in completions if normalise(a.text) not in accepted and len(a.ids) <= room]


def _on_device(ids: Sequence[int], batch: PromptBatch, b: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.long, device=batch.prompt_ids[b].device)


# random choices


def _draw(pool: Sequence[T], n: int) -> list[T]:
    """Up to n random items, without repetition."""
    return [pool[i] for i in torch.randperm(len(pool))[:n].tolist()]


def _pick(pool: Sequence[T]) -> T:
    return pool[_below(len(pool))]


def _below(n: int) -> int:
    """A random integer from 0 to n − 1."""
    return int(torch.randint(n, ()).item())


# text


def _unit(text: str) -> regex.Pattern[str]:
    """Pattern of a text's units: words, or the characters of a single word."""
    return WORD if len(WORD.findall(text)) > 1 else CHARACTER


def _phrase(text: str, n: int) -> str:
    """n consecutive words of a text, or all if there are fewer."""
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
    """Change one of the last two digits, in its script: a year stays a year, and a leading digit never gets 0."""
    at = len(number) - 1 - _below(min(2, len(number)))
    digit = unicodedata.decimal(number[at])
    lowest = 1 if at == 0 and len(number) > 1 else 0
    other = _pick([d for d in range(lowest, 10) if d != digit])
    return number[:at] + chr(ord(number[at]) - digit + other) + number[at + 1 :]
