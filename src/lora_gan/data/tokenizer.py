"""Tokenizer: loading it and encoding examples as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from lora_gan.errors import LoraGANError
from lora_gan.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """An example and its token ids; completions end with EOS, negatives are in the order of ``example.negatives``."""

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

    folder = str(files("lora_gan") / "builtin") if name == "builtin" else name
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
    prompts = _ids(tokenizer, [example.prompt for example in examples])
    targets = encode_completions(tokenizer, [example.target for example in examples])
    negatives = iter(encode_completions(tokenizer, [n.text for example in examples for n in example.negatives]))
    start = _start(tokenizer)
    return [
        Encoded(example, _started(start, prompt), target, tuple(next(negatives) for _ in example.negatives))
        for example, prompt, target in zip(examples, prompts, targets, strict=True)
    ]


def encode_completions(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Ids]:
    """Ids of completions: without BOS, special tokens encoded as plain text, EOS at the end."""
    return [(*ids, int(tokenizer.eos_token_id)) for ids in _ids(tokenizer, list(texts), literal=True)]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    """The ids of one prompt, as in :func:`encode`."""
    return _started(_start(tokenizer), _ids(tokenizer, [text])[0])


def _started(start: Ids, prompt: Ids) -> Ids:
    """``prompt`` after ``start``, unless a chat template has already written it."""
    return prompt if prompt[: len(start)] == start else start + prompt


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], literal: bool = False) -> list[Ids]:
    """Ids of texts; ``literal`` encodes special tokens as plain text, so that quoting one does not end a completion."""
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=literal,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [tuple(map(shared, ids)) for ids in encoded["input_ids"]]


@cache
def shared(number: int) -> int:
    """The one object of this number: with shared objects, a tuple of ids takes 8 bytes per token instead of 36."""
    return number


def _start(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """BOS if the tokenizer adds one before a text (Llama does, GPT-2 does not), else nothing."""
    first = tokenizer("a")["input_ids"][0]
    return (first,) if first == tokenizer.bos_token_id else ()
