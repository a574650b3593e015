"""Report of the data that a configuration trains on; needs no model weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import lightning as L
import numpy as np

from lora_gan.data.datamodule import InstructionDataModule, Split
from lora_gan.data.splits import SPLITS
from lora_gan.data.tokenizer import Encoded
from lora_gan.errors import LoraGANError

PERCENTILES = (50, 90, 99, 100)
TOO_LONG = ("prompt_too_long", "target_too_long")


def report(data: L.LightningDataModule, examples: int = 3) -> str:
    """Text with counts, dropped and repaired rows by reason, lengths in tokens, and some training examples.

    Raises:
        LoraGANError: ``data`` is not an :class:`InstructionDataModule`.
    """
    if not isinstance(data, InstructionDataModule):
        raise LoraGANError(
            f"the data command needs lora_gan.data.InstructionDataModule, got {type(data).__name__}; set data to it "
            "(a stream cannot be described before it is read)"
        )
    data.setup()
    shown = next((data.splits[name].items for name in SPLITS if data.splits[name].items), ())
    parts = [
        _title("Data", data),
        _table("examples", [*SPLITS, "all"], _counts(data)),
        _table("dropped or repaired", ["rows"], _reasons(data)),
        _table("tokens", ["50 %", "90 %", "99 %", "longest"], _lengths(data)),
        *(_example(number, item) for number, item in enumerate(shown[:: -(-len(shown) // examples) or 1], start=1)),
    ]
    return "\n\n".join(parts)


def _title(name: str, data: InstructionDataModule) -> str:
    lines = [
        f"{name}: {data.origin}",
        f"tokenizer {data.tokenizer_name}; at most {data.limits.prompt:,} tokens of prompt, {data.limits.target:,} of "
        f"target, {data.limits.total:,} in total",
        f"fits: {_share_that_fits(data.splits.values()):.1%} of the examples",
    ]
    return "\n".join(lines + [f"note: {data.source.note}"] * bool(data.source.note))


def _share_that_fits(splits: Iterable[Split]) -> float:
    dropped: Counter[str] = sum((split.dropped for split in splits), Counter())
    too_long = sum(dropped[reason] for reason in TOO_LONG)
    served = sum(len(split.items) for split in splits) + dropped["other_wording"] + dropped["over_the_limit"]
    return served / max(served + too_long, 1)


def _counts(data: InstructionDataModule) -> dict[str, list[str]]:
    """Examples by source and split; the last row counts groups."""
    by_split = [Counter(item.example.source for item in data.splits[name].items) for name in SPLITS]
    total: Counter[str] = sum(by_split, Counter())
    rows = {source: [count[source] for count in by_split] + [total[source]] for source in sorted(total)}
    if len(total) > 1:
        rows["all"] = [count.total() for count in by_split] + [total.total()]
    groups = [{item.example.group for item in data.splits[name].items} for name in SPLITS]
    rows["groups"] = [len(each) for each in groups] + [len(set[str]().union(*groups))]
    return {name: [f"{count:,}" for count in row] for name, row in rows.items()}


def _reasons(data: InstructionDataModule) -> dict[str, list[str]]:
    reasons = {f"dropped: {reason}": count for reason, count in sorted((+data.source.dropped).items())}
    reasons |= {f"repaired: {reason}": count for reason, count in sorted((+data.source.repaired).items())}
    for name, split in data.splits.items():
        counts = sorted((+(split.dropped + split.repaired)).items())
        reasons |= {f"{name}: {reason}": count for reason, count in counts}
    return {reason: [f"{count:,}"] for reason, count in reasons.items()} or {"nothing": ["0"]}


def _lengths(data: InstructionDataModule) -> dict[str, list[str]]:
    items = [item for split in data.splits.values() for item in split.items]
    lengths = {
        "prompt": [len(item.prompt_ids) for item in items],
        "target with EOS": [len(item.target_ids) for item in items],
        "negative with EOS": [len(ids) for item in items for ids in item.negative_ids],
    }
    return {
        name: [f"{int(length):,}" for length in np.percentile(values, PERCENTILES, method="higher")]
        for name, values in lengths.items()
        if values
    }


def _table(title: str, header: Sequence[str], rows: dict[str, list[str]]) -> str:
    width = max(map(len, [title, *rows]))
    lines = [(title, header), *rows.items()]
    return "\n".join(name.ljust(width) + "".join(f"{cell:>12}" for cell in cells) for name, cells in lines)


def _example(number: int, item: Encoded) -> str:
    example = item.example
    others = [text for text in example.references if text != example.target]
    parts = [
        f"──── example {number}: {example.source}, group {example.group[:60]!r}",
        f"──── prompt ({len(item.prompt_ids)} tokens)\n{example.prompt}",
        f"──── target ({len(item.target_ids)} tokens with EOS)\n{example.target}",
        *(f"──── further reference\n{text}" for text in others),
        *(f"──── negative ({negative.kind})\n{negative.text}" for negative in example.negatives),
    ]
    return "\n".join(parts)
