"""Which example belongs to which split: by the hash of its group, so that filters and limits move nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha1

from lora_gan.errors import DataError
from lora_gan.types import Example

SPLITS = ("train", "validation", "test")  # each is held out more strictly than the one before
BUCKETS = 10_000


@dataclass(frozen=True)
class SplitExamples:
    """The examples of one split, and how many were left out of it for what reason."""

    examples: list[Example] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def assign_splits(examples: Iterable[Example], fractions: Mapping[str, float], seed: int) -> dict[str, SplitExamples]:
    """The examples by split. A group that official splits spread over several stays in the most strictly held out."""
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
    """Test takes the lowest buckets and validation the highest, so changing one share leaves the other as it was."""
    bucket = int(digest(seed, group), 16) % BUCKETS
    if bucket < round(fractions["test"] * BUCKETS):
        return "test"
    return "validation" if bucket >= BUCKETS - round(fractions["validation"] * BUCKETS) else "train"


def one_wording_each(examples: Sequence[Example], seed: int) -> list[int]:
    """Indices of the examples to evaluate, in the order of their hash: of those that share an item, the first."""
    order = sorted(range(len(examples)), key=lambda i: digest(seed, examples[i].group, examples[i].prompt))
    chosen: dict[str | int, int] = {}
    for i in order:
        chosen.setdefault(examples[i].meta.get("item", i), i)
    return list(chosen.values())


def digest(*parts: object) -> str:
    """A hash of the parts that is the same on every machine."""
    return sha1(":".join(map(str, parts)).encode()).hexdigest()


def _official_split(example: Example) -> str | None:
    name = example.meta.get("split")
    if name is not None and name not in SPLITS:
        raise DataError(f"{example.source}: the split {name!r} is not known; use one of {', '.join(SPLITS)}")
    return name
