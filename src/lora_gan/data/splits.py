"""Splits by the hash of an example's group, so that filters and limits move no example to another split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha1

from lora_gan.errors import DataError
from lora_gan.types import Example

SPLITS = ("train", "validation", "test")  # from the least to the most strictly held out
BUCKETS = 10_000
SMALLEST = 3  # groups, of which each split gets at least one


@dataclass(frozen=True)
class SplitExamples:
    """The examples of one split, and the number of dropped examples by reason."""

    examples: list[Example] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def assign_splits(examples: Iterable[Example], fractions: Mapping[str, float], seed: int) -> dict[str, SplitExamples]:
    """The examples by split.

    If official splits spread a group over several, only its most strictly held-out split keeps the group. Where the
    hash leaves a split with a share above 0 empty, it gets one group, if there are at least three to divide.

    Args:
        examples: Examples of all splits.
        fractions: Share of the groups in "validation" and in "test", where there is no official split.
        seed: Seed of the hash.

    Raises:
        DataError: An official split is none of SPLITS.
    """
    grouped = [example if example.group else replace(example, group=example.prompt) for example in examples]
    official = [_official_split(example) for example in grouped]
    free = {example.group for example, name in zip(grouped, official, strict=True) if not name}
    hashed = _none_empty({group: split_of(group, fractions, seed) for group in free}, set(official), fractions, seed)
    wanted = [name or hashed[example.group] for example, name in zip(grouped, official, strict=True)]
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


def _none_empty(
    placed: Mapping[str, str], official: Collection[str], fractions: Mapping[str, float], seed: int
) -> dict[str, str]:
    """The splits by group, with the group nearest to it by hash in each split that should have one and has none."""
    splits, numbers = dict(placed), {group: _bucket(group, seed) for group in sorted(placed)}
    shares = {"train": 1.0, **fractions}
    for name in ("test", "validation", "train"):
        if len(splits) >= SMALLEST and shares[name] and name not in {*splits.values(), *official}:
            sizes = Counter(splits.values())
            donor = max(SPLITS, key=lambda split: sizes[split])
            ordered = sorted((group for group in numbers if splits[group] == donor), key=numbers.__getitem__)
            splits[ordered[0 if name == "test" else -1]] = name
    return splits


def split_of(group: str, fractions: Mapping[str, float], seed: int) -> str:
    """The split of a group: test has the lowest buckets, validation the highest, so neither share affects the other."""
    bucket = _bucket(group, seed)
    if bucket < round(fractions["test"] * BUCKETS):
        return "test"
    return "validation" if bucket >= BUCKETS - round(fractions["validation"] * BUCKETS) else "train"


def _bucket(group: str, seed: int) -> int:
    return int(digest(seed, group), 16) % BUCKETS


def few_answered(split: SplitExamples, share: float, seed: int) -> SplitExamples:
    """The examples, of which only some keep their answers; those are repeated so that they are half of the rows.

    Args:
        split: Training examples.
        share: Of the groups, in [0, 1], that keep their answers; drawn by hash, so a smaller share is a part of a
            larger one. The other examples become prompts of which nothing is known.
        seed: Seed of the hash.

    Raises:
        DataError: The share is above 0, and none of the groups is drawn.
    """
    if share == 1:
        return split
    known = [one for one in split.examples if _bucket(f"answered {one.group}", seed) < round(share * BUCKETS)]
    if share and not known:
        groups = len({example.group for example in split.examples})
        raise DataError(
            f"data.init_args.answered {share} leaves an answer to none of {groups} training groups; raise it"
        )
    kept = {example.group for example in known}
    asked = [example.without_answer() for example in split.examples if example.group not in kept]
    return SplitExamples(known * max(1, round(len(asked) / max(1, len(known)))) + asked, split.dropped)


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
