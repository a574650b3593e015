"""Cache of token ids of large data sets on disk, by a hash of the texts and the tokenizer."""

from __future__ import annotations

import logging
import os
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from hashlib import sha1
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_gan.atomic import atomic_file
from lora_gan.data.tokenizer import Encoded, Ids, completion_end, encode, shared
from lora_gan.program import cache_folder
from lora_gan.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("lora_gan")

CHUNK = 512  # examples that are tokenised together
LARGE = 5_000  # examples; fewer are tokenised faster than read from disk
FORMAT = "2"  # must change if the result of encode changes


def folder() -> Path:
    """Folder of the cache; safe to delete."""
    return cache_folder("ids")


def encode_large(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Iterator[Encoded]:
    """:func:`encode`, read from the cache if these texts have been encoded before."""
    if len(examples) < LARGE or not tokenizer.is_fast:
        return _encode_in_chunks(tokenizer, examples)
    try:
        file = folder() / f"{_key(tokenizer, examples)}.npz"
        if not file.is_file():
            _write(file, _encode_in_chunks(tokenizer, examples))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        log.warning("token ids are not cached (%s); set XDG_CACHE_HOME to a folder that can be written", error)
        return _encode_in_chunks(tokenizer, examples)
    return _read(file, tokenizer, examples)


def _encode_in_chunks(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Iterator[Encoded]:
    for start in range(0, len(examples), CHUNK):
        yield from encode(tokenizer, examples[start : start + CHUNK])


def _write(file: Path, items: Iterator[Encoded]) -> None:
    """Write the file atomically, also if two runs write it at once."""
    ids, lengths = array("i"), array("i")
    for item in items:
        for part in (item.prompt_ids, item.target_ids, *item.negative_ids):
            ids.extend(part)
            lengths.append(len(part))
    with atomic_file(file, writer=f".{os.getpid()}") as draft, draft.open("wb") as stream:
        np.savez(stream, ids=np.frombuffer(ids, np.int32), lengths=np.frombuffer(lengths, np.int32))
    log.info("token ids are cached in %s", file.parent)


def _read(file: Path, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> Iterator[Encoded]:
    try:
        with np.load(file, allow_pickle=False) as kept:
            ids, lengths = kept["ids"], kept["lengths"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s) and is rebuilt", file, error)
        try:
            file.unlink()
        except OSError:
            yield from _encode_in_chunks(tokenizer, examples)
        else:
            yield from encode_large(tokenizer, examples)
        return
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    parts = iter(zip([0, *ends[:-1]], ends, strict=True))

    def part() -> Ids:
        start, end = next(parts)
        return tuple(map(shared, ids[start:end].tolist()))

    for example in examples:
        yield Encoded(example, part(), part(), tuple(part() for _ in example.negatives))


def _key(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> str:
    backend = getattr(tokenizer, "backend_tokenizer").to_str()  # noqa: B009
    ends = str(tokenizer.bos_token_id), str(completion_end(tokenizer))
    key = sha1("\0".join((FORMAT, backend, *ends)).encode())
    for example in examples:
        key.update(f"{example.chat}{example.literal}".encode())
        for text in (example.prompt, example.target, *(negative.text for negative in example.negatives), "\0"):
            key.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))
    return key.hexdigest()
