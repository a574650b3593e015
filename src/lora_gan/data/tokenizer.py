"""Tokenizer: loading it and encoding examples as token ids."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

from lora_gan.bases import OBJECTS, locate
from lora_gan.data.templates import PromptFormat, turn_end
from lora_gan.errors import LoraGANError
from lora_gan.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
_HALF = re.compile("[\ud800-\udfff]")  # lone surrogates


@dataclass(frozen=True)
class Encoded:
    """An example and its token ids; completions have their end, negatives the order of ``example.negatives``."""

    example: Example
    prompt_ids: Ids
    target_ids: Ids
    negative_ids: tuple[Ids, ...]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or hub id, or "builtin" for that of the built-in base model.

    Raises:
        LoraGANError: It cannot be loaded, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    if name in OBJECTS:
        return copy.deepcopy(OBJECTS[name][1])
    folder = locate(name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the hub client raises a dozen unrelated classes
        reason = " ".join(str(error).split())
        raise LoraGANError(
            f"the tokenizer {name!r} is not a local folder and could not be loaded from the hub: "
            f'{type(error).__name__}: {reason}; give a folder that holds tokenizer.json, a hub id, or "builtin"'
        ) from error
    if tokenizer.eos_token_id is None:
        raise LoraGANError(
            f"the tokenizer {name!r} has no EOS token, so no completion could end; "
            "set eos_token in its tokenizer_config.json to a token of its vocabulary"
        )
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Encoded]:
    """Encode the prompt and the completions of each example separately, so that they meet as in generation."""
    prompts = encode_prompts(tokenizer, examples)
    targets = encode_completions(tokenizer, [example.target for example in examples])
    negatives = iter(encode_completions(tokenizer, [n.text for example in examples for n in example.negatives]))
    return [
        Encoded(example, prompt, target, tuple(next(negatives) for _ in example.negatives))
        for example, prompt, target in zip(examples, prompts, targets, strict=True)
    ]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Ids]:
    """Ids of the prompts: after BOS if the tokenizer adds it, unless a chat template wrote the prompt, BOS included."""
    start = _start(tokenizer)
    control = _control_tokens(tokenizer)
    ids = _ids(tokenizer, [example.prompt for example in examples])
    return [
        _started(() if example.chat else start, _quoting(tokenizer, control, example) or prompt)
        for example, prompt in zip(examples, ids, strict=True)
    ]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Ids]:
    """:func:`encode_prompts` of prompts that are to be completed.

    Raises:
        LoraGANError: One has no token: its text is empty and the tokenizer adds no BOS.
    """
    ids = encode_prompts(tokenizer, examples)
    if () in ids:
        raise LoraGANError("the prompt is empty, so there is nothing to complete; write at least one character")
    return ids


def encode_completions(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Ids]:
    """Ids of completions: without BOS, control tokens encoded as plain text, :func:`completion_end` at the end."""
    end = completion_end(tokenizer)
    return [(*ids, *end) for ids in _ids(tokenizer, list(texts), literal=True)]


def completion_end(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The ids at the end of a completion: EOS, or what :func:`end_turns_with` has set; the last is EOS."""
    end: Ids = getattr(tokenizer, "completion_end", (int(tokenizer.eos_token_id),))
    return end


def end_turns_with(tokenizer: PreTrainedTokenizerBase, end: Ids) -> None:
    """Let completions end with ``end``, as the chat template ends a turn; its last token becomes EOS."""
    tokenizer.eos_token = str(tokenizer.convert_ids_to_tokens(end[-1]))
    setattr(tokenizer, "completion_end", end)  # noqa: B010


def adopt_turn_end(tokenizer: PreTrainedTokenizerBase, prompts: PromptFormat) -> None:
    """Let completions end as the chat template ends a turn, where prompts are written with it."""
    if prompts.chat:
        end_turns_with(tokenizer, turn_end(tokenizer, prompts.chat_template_kwargs))


def _started(start: Ids, prompt: Ids) -> Ids:
    """``prompt`` after ``start``, unless the template has already written it."""
    return prompt if prompt[: len(start)] == start else start + prompt


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds the control tokens in a text."""
    names = sorted((str(t) for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def _quoting(tokenizer: PreTrainedTokenizerBase, control: re.Pattern[str], example: Example) -> Ids:
    """Ids of a prompt whose data quote control tokens, which stay text; nothing where they quote none."""
    text = example.prompt
    found = [token.span() for token in control.finditer(text)]
    written = [span for span in found if not any(span[0] < end and start < span[1] for start, end in example.literal)]
    if len(written) == len(found):
        return ()
    borders = [0, *(border for span in written for border in span), len(text)]
    pieces = [text[start:end] for start, end in pairwise(borders)]  # control tokens of the template at odd indices
    ids = iter(_ids(tokenizer, pieces[::2], literal=True))
    tokens = iter((int(id),) for id in tokenizer.convert_tokens_to_ids(pieces[1::2]))
    return tuple(id for i in range(len(pieces)) for id in next(tokens if i % 2 else ids))


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], literal: bool = False) -> list[Ids]:
    """Ids of texts; ``literal`` encodes control tokens as plain text, so that quoting one does not end a completion."""
    if not texts:
        return []
    for text in texts:
        _check_whole(text)
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=literal,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [tuple(map(shared, ids)) for ids in encoded["input_ids"]]


def _check_whole(text: str) -> None:
    """Refuse lone surrogates, of which a tokenizer only says that it got no text."""
    if not text.isascii() and (half := _HALF.search(text)):
        raise LoraGANError(
            f"the text {text[:40]!r} holds half of a character, {half.group()!r} at {half.start()}, which no tokenizer "
            "can read; clean it with lora_gan.data.files.clean"
        )


@cache
def shared(number: int) -> int:
    """The one object of this number: with shared objects, a tuple of ids takes 8 bytes per token instead of 36."""
    return number


def _start(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """BOS if the tokenizer adds one before a text (Llama does, GPT-2 does not), else nothing."""
    first = tokenizer("a")["input_ids"][0]
    return (first,) if first == tokenizer.bos_token_id else ()
