"""Loading a tokenizer, and examples as token ids."""

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
    """An example and its ids. Completions end with EOS; ``negative_ids`` are in the order of ``example.negatives``."""

    example: Example
    prompt_ids: Ids
    target_ids: Ids
    negative_ids: tuple[Ids, ...]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or hub id; "builtin" is the one that comes with the package."""
    from transformers import AutoTokenizer

    folder = str(files("lora_gan") / "builtin") if name == "builtin" else name
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the hub client raises a dozen unrelated classes
        reason = " ".join(str(error).split())
        raise LoraGANError(
            f"the tokenizer {name!r} is neither a folder here nor could it be loaded from the hub: "
            f'{type(error).__name__}: {reason}; give a folder that holds tokenizer.json, a hub id, or "builtin"'
        ) from error
    if tokenizer.eos_token_id is None:
        raise LoraGANError(
            f"the tokenizer {name!r} has no EOS token, so no completion could end; "
            "set eos_token in its tokenizer_config.json to a token of its vocabulary"
        )
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Encoded]:
    """Ids of the examples, prompt and completions apart, so that they meet at the same border as in generation."""
    prompts = _ids(tokenizer, [example.prompt for example in examples])
    targets = encode_completions(tokenizer, [example.target for example in examples])
    negatives = iter(encode_completions(tokenizer, [n.text for example in examples for n in example.negatives]))
    start = _start(tokenizer)
    return [
        Encoded(example, _started(start, prompt), target, tuple(next(negatives) for _ in example.negatives))
        for example, prompt, target in zip(examples, prompts, targets, strict=True)
    ]


def encode_completions(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Ids]:
    """Ids of completions: no BOS, special tokens spelled out, EOS at the end."""
    return [(*ids, int(tokenizer.eos_token_id)) for ids in _ids(tokenizer, list(texts), literal=True)]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    """The ids of one prompt, as :func:`encode` makes them."""
    return _started(_start(tokenizer), _ids(tokenizer, [text])[0])


def _started(start: Ids, prompt: Ids) -> Ids:
    """A chat template may have written BOS already."""
    return prompt if prompt[: len(start)] == start else start + prompt


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], literal: bool = False) -> list[Ids]:
    """``literal`` spells special tokens out, so that a completion that quotes "<|endoftext|>" does not end there."""
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
    """One object for each token of the vocabulary: a tuple of ids then takes 8 bytes a token, not 36."""
    return number


def _start(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """BOS where this tokenizer puts one before a text (Llama does, GPT-2 does not)."""
    first = tokenizer("a")["input_ids"][0]
    return (first,) if first == tokenizer.bos_token_id else ()
