"""Report of the data that a configuration trains on; needs no model weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import lightning as L
import numpy as np

from lora_gan.context import UNLIMITED
from lora_gan.data.base import describe_prompts
from lora_gan.data.datamodule import InstructionDataModule, Split
from lora_gan.data.splits import SPLITS
from lora_gan.data.tokenizer import Encoded
from lora_gan.errors import LoraGANError
from lora_gan.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    if not data.splits:
        data.read()
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
        f"prompts: {describe_prompts(data)}",
        *filter(None, [_inserted(data)]),
        f"tokenizer {data.tokenizer_name}; at most {data.limits.prompt:,} tokens of prompt, {data.limits.target:,} of "
        f"target, {_limit(data.limits.total)} in total",
        f"fits: {_share_that_fits(data.splits.values()):.1%} of the examples",
    ]
    lines += [f"note: {data.source.note}"] * bool(data.source.note)
    return "\n".join(lines + [f"warning: {gap}" for gap in data.gaps()])


def _limit(tokens: int) -> str:
    return f"{tokens:,}" if tokens < UNLIMITED else "any number"


def _inserted(data: InstructionDataModule) -> str:
    """What the chat template writes by itself before a dialogue without system message, such as a persona."""
    if not data.prompts.chat or data.prompts.system is not None:
        return ""
    asked, replied, asked_again = "first question", "first reply", "second question"
    turns = [Message("user", asked), Message("assistant", replied), Message("user", asked_again)]
    try:
        first, second = (data.prompts.write(data.tokenizer, data.prompts.dialogue(turns[:n])).prompt for n in (1, 3))
    except LoraGANError:  # a template of single turns does not tell how a turn begins
        return ""
    before, between = first.split(asked)[0], second.split(replied)[-1].split(asked_again)[0]
    pairs = zip(reversed(before), reversed(between), strict=False)
    header = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))  # of a user's turn
    text = _without_control_tokens(before[: len(before) - header], data.tokenizer)
    return f"where there is no system message, it writes {text!r}; data.init_args.system replaces it" if text else ""


def _without_control_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    for token in tokenizer.get_added_vocab():
        text = text.replace(token, " ")
    return " ".join(text.split())


def _share_that_fits(splits: Iterable[Split]) -> float:
    dropped: Counter[str] = sum((split.dropped for split in splits), Counter())
    too_long = sum(dropped[reason] for reason in TOO_LONG)
    served = sum(len(split.items) for split in splits) + dropped["other_wording"] + dropped["over_the_limit"]
    return served / max(served + too_long, 1)


def _counts(data: InstructionDataModule) -> dict[str, list[str]]:
    """Examples by source and split, those with an answer where some have none, and groups."""
    by_split = [Counter(item.example.source for item in data.splits[name].items) for name in SPLITS]
    total: Counter[str] = sum(by_split, Counter())
    rows = {source: [count[source] for count in by_split] + [total[source]] for source in sorted(total)}
    if len(total) > 1:
        rows["all"] = [count.total() for count in by_split] + [total.total()]
    answered = [sum(item.example.is_answered for item in data.splits[name].items) for name in SPLITS]
    if sum(answered) < total.total():
        rows["with an answer"] = [*answered, sum(answered)]
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
        f"──── example {number}: {example.source}, group {' '.join(example.group.split())[:60]!r}",
        f"──── prompt ({len(item.prompt_ids)} tokens)\n{example.prompt}",
        f"──── target ({len(item.target_ids)} tokens with EOS)\n{example.target}",
        *(f"──── further reference\n{text}" for text in others),
        *(f"──── negative ({negative.kind})\n{negative.text}" for negative in example.negatives),
    ]
    return "\n".join(parts)
