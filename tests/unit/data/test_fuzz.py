"""Damaged files end in clean examples or in the project's own error, never in a crash or a silently wrong row."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="pip install hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import Table, csv, parquet

from lora_gan.data import (
    ARC,
    OASST,
    TWON,
    Alpaca,
    Dolly,
    OwnFile,
    RowSource,
    StandardFormat,
    StreamDataModule,
    TruthfulQA,
)
from lora_gan.data.files import clean
from lora_gan.data.source import Source
from lora_gan.errors import DataError, LoraGANError
from lora_gan.types import Example

FIXTURES = Path(__file__).parents[2] / "fixtures"
MAKERS: dict[str, Callable[..., Source]] = {
    "alpaca.json": Alpaca,
    "dolly.jsonl": Dolly,
    "oasst_messages.jsonl": OASST,
    "oasst_trees.jsonl": OASST,
    "truthfulqa.csv": TruthfulQA,
    "truthfulqa.bom.csv": TruthfulQA,
    "arc.jsonl": partial(ARC, mode="mcq"),
    "arc_ai2_original_format.jsonl": ARC,
    "twon_replies.jsonl": TWON,
    "twon_posts.jsonl": partial(TWON, data_label="annotation", target_label="full_text"),
    "alpaca.parquet": Alpaca,
    "alpaca.jsonl.gz": Alpaca,
    "alpaca.csv": Alpaca,
    "messages.jsonl": partial(StandardFormat, every_turn=True),
    "conversations.json": StandardFormat,
    "completions.csv": StandardFormat,
    "preferences.jsonl": StandardFormat,
    "own.jsonl": partial(OwnFile, references="references", negatives="negatives", group="group", split="split"),
}
OWN = b'{"prompt": "p", "response": "r", "references": ["r", "s"], "negatives": ["t"], "group": "g", "split": "test"}\n'

few = settings(max_examples=60, deadline=None, derandomize=True)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


@cache
def content(name: str) -> bytes:
    if name == "own.jsonl":
        return OWN
    if (FIXTURES / name).is_file():
        return (FIXTURES / name).read_bytes()
    table = Table.from_pylist(json.loads((FIXTURES / "alpaca.json").read_text()))
    lines = "\n".join(map(json.dumps, table.to_pylist())).encode()
    file = io.BytesIO()
    if name.endswith(".parquet"):
        parquet.write_table(table, file)
    elif name.endswith(".csv"):
        csv.write_csv(table, file)
    return file.getvalue() or (gzip.compress(lines, mtime=0) if name.endswith(".gz") else lines)


def read(name: str, data: bytes, on_bad_row: str) -> list[Example]:
    """The examples of a file with this content; none where it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            examples = list(MAKERS[name](str(path), on_bad_row=on_bad_row).rows())
        except DataError as error:
            assert name in str(error)
            return []
    for example in examples:
        check(example)
    return examples


def check(example: Example) -> None:
    texts = [example.prompt, *example.references, *(negative.text for negative in example.negatives)]
    assert all(isinstance(text, str) for text in texts)
    assert example.target == clean(example.target) != ""
    assert example.references[0] == example.target
    assert example.target not in {negative.text for negative in example.negatives}
    assert "\ud800" not in example.prompt and "\ud801" not in example.prompt
    assert all(0 <= start < end <= len(example.prompt) for start, end in example.cuttable)
    assert example.group


@pytest.mark.parametrize("name", MAKERS)
@given(data=st.data())
@few
def test_damaged_bytes(name: str, data: st.DataObject) -> None:
    whole = content(name)
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 40)) | st.just(len(whole)))
    noise = data.draw(
        st.binary(max_size=8) | st.sampled_from([b'"', b"{", b"]", b"\n", b"\r\n", b"\x00", b"\xff", b","])
    )
    damaged = whole[:start] + noise + whole[end:]
    read(name, damaged, data.draw(st.sampled_from(["raise", "drop"])))


@pytest.mark.parametrize("name", [name for name in MAKERS if name.endswith("jsonl")])
@given(data=st.data())
@few
def test_wrong_values(name: str, data: st.DataObject) -> None:
    rows = [json.loads(line) for line in content(name).splitlines()]
    row = data.draw(st.sampled_from(rows))
    places = list(paths(row))
    for place in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=3)):
        value = data.draw(anything)
        put(row, place, value)
    damaged = "\n".join(json.dumps(row) for row in rows).encode()
    on_bad_row = data.draw(st.sampled_from(["raise", "drop"]))
    read(name, damaged, on_bad_row)


def paths(value: Any, before: tuple[Any, ...] = ()) -> Any:
    """Every place in nested objects and lists."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*before, key)
        yield from paths(value[key], (*before, key))


def put(value: Any, place: tuple[Any, ...], new: Any) -> None:
    try:
        for key in place[:-1]:
            value = value[key]
        value[place[-1]] = new
    except (KeyError, IndexError, TypeError):
        return  # an earlier change took this place away


@given(lines=st.lists(st.binary(max_size=12) | st.sampled_from(OWN.splitlines()), max_size=6), cut=st.integers(0, 30))
@few
def test_a_damaged_stream(lines: list[bytes], cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stream.jsonl"
        joined = b"\n".join(lines)
        path.write_bytes(joined[: len(joined) - cut])
        source = OwnFile("unused.jsonl", on_bad_row="drop")
        assert isinstance(source, RowSource)
        stream = StreamDataModule(str(path), source, poll_seconds=0.001, stop_after_seconds=0.0)
        try:
            for item in stream.rows():
                check(item.example)
        except LoraGANError as error:
            pytest.fail(f"a row that cannot be used is dropped: {error}")
        finally:
            stream.tail.close()


@pytest.mark.parametrize("name", MAKERS)
def test_the_undamaged_file_is_read(name: str) -> None:
    assert read(name, content(name), "raise")
