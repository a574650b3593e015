"""Splits by the hash of an example's group, so that filters and limits move no example to another split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha1

from lora_gan.errors import DataError
from lora_gan.types import Example

SPLITS = ("train", "validation", "test")  # from the least to the most strictly held out
BUCKETS = 10_000


@dataclass(frozen=True)
class SplitExamples:
    """The examples of one split, and the number of dropped examples by reason."""

    examples: list[Example] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def assign_splits(examples: Iterable[Example], fractions: Mapping[str, float], seed: int) -> dict[str, SplitExamples]:
    """The examples by split.

    If official splits spread a group over several, only its most strictly held-out split keeps the group.

    Args:
        examples: Examples of all splits.
        fractions: Share of the groups in "validation" and in "test", where there is no official split.
        seed: Seed of the hash.

    Raises:
        DataError: An official split is none of SPLITS.
    """
    grouped = [example if example.group else replace(example, group=example.prompt) for example in examples]
    wanted = [_official_split(example) or split_of(example.group, fractions, seed) for example in grouped]
    strictest: dict[str, int] = {}
    for example, name in zip(grouped, wanted, strict=True):
        strictest[example.group] = max(strictest.get(example.group, 0), SPLITS.index(name))
    placed = {name: SplitExamples() for name in SPLITS}
    for example, name in zip(grouped, wanted, strict=True):
        owner = SPLITS[strictest[example.group]]
        if owner == name:
            placed[name].examples.append(example)
        else:
            placed[name].dropped[f"group_also_in_{owner}"] += 1
    return placed


def split_of(group: str, fractions: Mapping[str, float], seed: int) -> str:
    """The split of a group: test has the lowest buckets, validation the highest, so neither share affects the other."""
    bucket = int(digest(seed, group), 16) % BUCKETS
    if bucket < round(fractions["test"] * BUCKETS):
        return "test"
    return "validation" if bucket >= BUCKETS - round(fractions["validation"] * BUCKETS) else "train"


def one_wording_each(examples: Sequence[Example], seed: int) -> list[int]:
    """Indices of the examples to evaluate, ordered by hash; only the first of the examples with the same item."""
    order = sorted(range(len(examples)), key=lambda i: digest(seed, examples[i].group, examples[i].prompt))
    chosen: dict[str | int, int] = {}
    for i in order:
        chosen.setdefault(examples[i].item or i, i)
    return list(chosen.values())


def digest(*parts: object) -> str:
    """SHA-1 of the parts as hexadecimal digits, the same on every machine."""
    return sha1(":".join(map(str, parts)).encode()).hexdigest()


def _official_split(example: Example) -> str:
    """The official split of the example; "" if it has none."""
    if example.split not in ("", *SPLITS):
        raise DataError(f"{example.source}: the split {example.split!r} is not known; use one of {', '.join(SPLITS)}")
    return example.split
