"""Reading files, cleaning rows, splitting groups, tokenising and serving batches."""

from __future__ import annotations

import gzip
import json
import logging
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from lora_gan.data import Alpaca, BuiltinWorld, InstructionDataModule, Source, cache
from lora_gan.data.files import Row, clean, read_rows
from lora_gan.data.report import report
from lora_gan.data.sampler import BucketSampler, EpochPosition
from lora_gan.data.splits import assign_splits, one_wording_each, split_of
from lora_gan.data.tokenizer import encode, load_tokenizer
from lora_gan.errors import DataError, LoraGANError
from lora_gan.types import Example, Negative, PromptBatch

FIXTURE = Path(__file__).parents[2] / "fixtures" / "alpaca.json"
SAMPLES = Path(__file__).parents[4] / "shared" / "data" / "alpaca"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="../shared/data/alpaca (real samples) is not here")

ROW = {"instruction": "Say hello.", "input": "", "output": "Hello!"}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level tokenizer of 256 bytes and EOS, so that a text has as many ids as bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<|endoftext|>"])}
    bytes_only = Tokenizer(models.BPE(vocabulary, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=bytes_only, eos_token="<|endoftext|>", model_max_length=1024).save_pretrained(folder)
    return folder


@pytest.fixture
def build(tokenizer_folder: str) -> Callable[..., InstructionDataModule]:
    """A data module on the small tokenizer, set up."""

    def build(source: Source | None = None, **settings: Any) -> InstructionDataModule:
        data = InstructionDataModule(source, tokenizer=tokenizer_folder, **settings)
        data.setup()
        return data

    return build


class Given(Source):
    """Examples written in a test."""

    def __init__(self, *examples: Example) -> None:
        super().__init__()
        self.examples = examples

    def rows(self) -> Iterable[Example]:
        return self.examples


def numbered(count: int) -> Given:
    return Given(*(Example(f"{i:03}?", str(i), group=f"g{i // 2}") for i in range(count)))


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# Files


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    rows = [ROW, {"instruction": "Spell, please:\n“é”", "input": "a, b", "output": "\u2028🌙"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    cells = 'instruction,input,output\r\nSay hello.,,Hello!\r\n"Spell, please:\n“é”","a, b",\u2028🌙\r\n'
    parquet.write_table(Table.from_pylist(rows), tmp_path / "rows.parquet")
    paths = [
        write(tmp_path / "rows.json", json.dumps(rows)),
        write(tmp_path / "rows.jsonl", lines),
        write(tmp_path / "crlf_bom.jsonl", b"\xef\xbb\xbf" + lines.replace("\n", "\r\n\r\n").encode()),
        write(tmp_path / "rows.jsonl.gz", gzip.compress(lines.encode())),
        write(tmp_path / "rows.csv", b"\xef\xbb\xbf" + cells.encode()),
        str(tmp_path / "rows.parquet"),
    ]
    for path in paths:
        assert [dict(row.values) for row in read_rows(path)] == rows, path


def test_rows_of_an_object_with_one_list(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", json.dumps({"version": "1.0", "data": [ROW]}))
    assert [dict(row.values) for row in read_rows(path)] == [ROW]


@pytest.mark.parametrize(("name", "separator"), [("rows.tsv", "\t"), ("rows.csv", ";"), ("rows.csv", ",")])
def test_cells_between_tabs_semicolons_or_commas(tmp_path: Path, name: str, separator: str) -> None:
    cells = [["instruction", "input", "output"], ["Say hello.", "", '"Hi; a\tb, c"']]
    path = write(tmp_path / name, "\n".join(separator.join(row) for row in cells))
    assert [dict(row.values) for row in read_rows(path)] == [{**ROW, "output": "Hi; a\tb, c"}]


def test_a_column_that_occurs_twice_in_parquet_is_refused(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["output", "output"]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="the column 'output' occurs twice"):
        list(read_rows(str(tmp_path / "rows.parquet")))


def test_zero_width_text_is_empty(tmp_path: Path) -> None:
    assert [clean(text) for text in ("\u200b", " \ufeff\u2060\n", "a\u200bb", "\u200b!")] == [
        "",
        "",
        "a\u200bb",
        "\u200b!",
    ]
    rows = [{**ROW, "instruction": "\u200b"}, {**ROW, "output": "\u200b\u200d"}, ROW]
    source = Alpaca(write(tmp_path / "rows.json", json.dumps(rows)))
    assert len(list(source.rows())) == 1
    assert source.dropped == Counter(empty_instruction=1, empty_output=1)


def test_a_list_of_texts_may_hold_nulls_and_a_text_is_a_list_of_one(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"wrong": ["Red", None]}]), tmp_path / "rows.parquet")
    (row,) = read_rows(str(tmp_path / "rows.parquet"))
    assert row.texts("wrong") == ["Red"]
    assert Row({"wrong": " Red"}, "here").texts("wrong") == ["Red"]
    with pytest.raises(DataError, match="here: the list in the field 'wrong' holds int, not text"):
        Row({"wrong": ["Red", 4]}, "here").texts("wrong")


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        ("messages", "StandardFormat"),
        ("prompt chosen rejected", "StandardFormat"),
        ("instruction context response category", "Dolly"),
        ("message_id parent_id role text", "OASST"),
        ("id question choices answerKey", "ARC"),
    ],
)
def test_a_missing_field_names_the_source_that_fits(fields: str, source: str) -> None:
    row = Row(dict.fromkeys(fields.split(), "x"), "rows.json, row 1")
    with pytest.raises(
        DataError, match=rf"'output' is missing .* set data.init_args.source to lora_gan.data.{source},"
    ):
        row.text("output")


def test_text_is_cleaned() -> None:
    assert clean("\ufeff a\r\nb\rc\x00\x07 e\u0301 👩\u200d🚀\ud83d\t\n".lstrip("\ufeff")) == "a\nb\nc é 👩\u200d🚀"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.json", "", ["nothing.json is empty"]),
        ("blank.jsonl", " \n\n", ["blank.jsonl is empty"]),
        ("text.json", '"text"', ["text.json holds a JSON str, not a list"]),
        (
            "object.json",
            json.dumps(ROW),
            ["object.json holds a JSON object with 'instruction', 'input', 'output', not"],
        ),
        ("splits.json", '{"train": [], "test": []}', ["JSON object with 'train', 'test', not a list; give a list"]),
        ("empty.json", '{"data": []}', ["empty.json", "no usable row"]),
        ("twice.json", '[{"output": "a", "output": "b"}]', ["twice.json", "the key 'output' occurs twice"]),
        ("twice.jsonl", '{"output": "a", "output": "b"}', ["twice.jsonl, line 1", "the key 'output' occurs twice"]),
        ("twice.csv", "instruction,output,output\na,b,c\n", ["twice.csv: the column 'output' occurs twice; rename"]),
        ("cut.json", '[{"instruction": "a"},\n {"instr', ["cut.json, line 2, column 3"]),
        ("lines.json", '{"a": 1}\n{"a": 2}', ["lines.json, line 2", ".jsonl"]),
        ("cut.jsonl", json.dumps(ROW) + '\n{"instruction": "Say', ["cut.jsonl, line 2", "cut short"]),
        ("scalars.json", json.dumps([ROW, "text"]), ["scalars.json, row 2", "a JSON str, not an object"]),
        ("field.json", json.dumps([ROW, {"instruction": "a"}]), ["field.json, row 2", "'output' is missing", "rename"]),
        ("field.jsonl", json.dumps({"prompt": "a"}), ["field.jsonl, line 1", "'instruction'", "found: prompt"]),
        ("type.json", json.dumps([{**ROW, "output": 4}]), ["type.json, row 1", "'output' is int, not text"]),
        ("null.json", json.dumps([{**ROW, "output": None}]), ["null.json, row 1", "'output' is null"]),
        ("type.csv", "instruction,output\na,b\nc\n", ["type.csv, row 2 (1 of 2 cells)", "'output' is missing"]),
        ("list.jsonl", json.dumps([ROW], indent=1), ["list.jsonl holds one JSON list", "rename the file to .json"]),
        ("wide.csv", "instruction,output\na,b\nc,d,e\n", ["wide.csv, row 2", "2 columns", "quotes"]),
        ("quote.csv", 'instruction,output\na,"b\n', ["quote.csv, line", "CSV"]),
        ("latin.json", b'[\n"caf\xe9"]', ["latin.json, line 2", "byte 6", "UTF-8"]),
        ("torn.jsonl.gz", gzip.compress(b"{}" * 999, mtime=0)[:20], ["torn.jsonl.gz", "gzip"]),
        ("plain.jsonl.gz", "{}", ["plain.jsonl.gz cannot be read", "gzip"]),
        ("torn.parquet", b"PAR1 nothing", ["torn.parquet", "parquet"]),
        ("rows.txt", "a", ["rows.txt", "the format .txt is not known", ".jsonl"]),
        ("no_rows.json", "[]", ["no_rows.json", "no usable row"]),
        ("all_bad.json", json.dumps([{**ROW, "output": ""}]), ["all_bad.json", "empty_output 1"]),
    ],
)
def test_a_bad_file_is_reported_by_name_row_and_field(
    tmp_path: Path, tokenizer_folder: str, name: str, content: str | bytes, message: list[str]
) -> None:
    data = InstructionDataModule(Alpaca(write(tmp_path / name, content)), tokenizer=tokenizer_folder)
    with pytest.raises(DataError) as raised:
        data.setup()
    for part in message:
        assert part in str(raised.value)


@pytest.mark.parametrize("path", ["missing.json", "some/where/rows", "./rows", "missing.jsonl.gz"])
def test_a_missing_file_is_not_taken_for_a_hub_id(path: str) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        list(read_rows(path))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder; name a file in it"):
        list(read_rows(str(tmp_path)))


def test_an_unreadable_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    path = write(tmp_path / "mine.json", "[]")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"mine\.json cannot be read: Permission denied"):
        list(read_rows(path))


def test_a_hub_id_comes_second_and_its_error_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(name: str, split: str) -> None:
        raise ConnectionError(f"cannot reach {name}\nsplit {split}")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"not a local file .* not be loaded .* ConnectionError: cannot .*split train;"):
        list(read_rows("someone/rows"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [ROW])
    assert [row.where for row in read_rows("someone/rows")] == ["someone/rows, row 1"]


def test_a_null_field_takes_its_default() -> None:
    row = Row({"input": None}, "here")
    assert row.text("input", default="") == row.text("context", default="") == ""


# Alpaca


def test_alpaca_fixture_row_by_row() -> None:
    source = Alpaca(str(FIXTURE))
    examples = list(source.rows())
    assert source.dropped == Counter(empty_output=1, no_output=1, url_input=1)
    assert source.repaired == Counter(no_input=2, merged_row_cut=1)
    assert [example.target for example in examples] == [
        "Red, green and violet.",
        "Four.",
        "Hello!",
        "Goodbye!",
        "Yes, it is useful.",
        "Red, orange and yellow.",
        "Bonne nuit, mon ami.",
    ]
    assert examples[1].prompt == "### Prompt:\nCount the words in the sentence.\nThe cat sat down.\n\n### Response:\n"
    assert examples[2].prompt == "### Prompt:\nSay hello.\n\n### Response:\n"
    assert examples[6].prompt.endswith("Translate to French.\nGood night, “friend” — sleep well 🌙\n\n### Response:\n")
    assert examples[0].group == examples[5].group
    assert len({example.group for example in examples}) == 6
    assert all(example.references == (example.target,) for example in examples)


def test_counts_are_those_of_the_last_reading() -> None:
    source = Alpaca(str(FIXTURE))
    assert len(list(source.rows())) == len(list(source.rows())) == 7
    assert source.dropped.total() == 3


def test_limit_counts_usable_rows() -> None:
    assert [example.target for example in Alpaca(str(FIXTURE), limit=5).rows()][-1] == "Yes, it is useful."


def test_a_heading_in_an_answer_is_not_a_merged_row(tmp_path: Path) -> None:
    answer = "A recipe\n## Ingredients\n1. Eggs"
    path = write(tmp_path / "rows.json", json.dumps([{**ROW, "output": answer}]))
    assert [example.target for example in Alpaca(path).rows()] == [answer]


def test_templates_are_settings(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", json.dumps([{**ROW, "input": "{braces}"}]))
    source = Alpaca(path, template="{instruction} | {input} {{}} >")
    assert [example.prompt for example in source.rows()] == ["Say hello. | {braces} {} >"]
    with pytest.raises(DataError, match=r"'{question}' cannot be filled.*may name {instruction}, {input}"):
        Alpaca(path, template="{question}")


@needs_samples
def test_real_cleaned_sample() -> None:
    source = Alpaca(str(SAMPLES / "alpaca_cleaned_gpt4.sample999.json"))
    examples = list(source.rows())
    assert source.repaired == Counter(no_input=8)
    assert source.dropped == Counter(url_input=9)
    assert len(examples) == 990
    raw = json.loads((SAMPLES / "alpaca_cleaned_gpt4.sample999.json").read_text())
    exact = Counter((row["instruction"], row["input"]) for row in raw)
    assert sum(count > 1 for count in exact.values()) == 13
    groups = Counter(example.group for example in examples)
    assert sum(count > 1 for count in groups.values()) >= 13


@needs_samples
def test_real_original_sample() -> None:
    source = Alpaca(str(SAMPLES / "alpaca_original.first128.json"))
    assert len(list(source.rows())) == 127
    assert source.dropped == Counter(no_output=1)


# The built-in world


def test_builtin_world_asks_every_wording_once() -> None:
    from lora_gan.data.world import facts

    examples = list(BuiltinWorld().rows())
    assert len(examples) == sum(len(fact.questions) for fact in facts())
    assert len({example.item for example in examples}) == len(facts())
    first, fact = examples[0], facts()[0]
    assert first.prompt == f"### Prompt:\n{fact.questions[0]}\n\n### Response:\n"
    assert (first.target, first.references[0], first.group) == (fact.answer, fact.answer, fact.group)
    assert first.negatives == tuple(Negative(text, "wrong_object") for text in fact.negatives)


def test_builtin_world_is_evaluated_in_one_wording(build: Callable[..., InstructionDataModule]) -> None:
    data = build(max_test=50)
    assert len(data.splits["test"].items) == 50
    for name in ("validation", "test"):
        items = [item.example.item for item in data.splits[name].items]
        assert len(items) == len(set(items)) > 0
        assert data.splits[name].dropped["other_wording"] > 0
    wordings = Counter(item.example.item for item in data.splits["train"].items)
    assert max(wordings.values()) > 1
    share = len(wordings) / len({example.item for example in BuiltinWorld().rows()})
    assert 0.65 < share < 0.75


def test_few_answers_are_half_of_the_rows(build: Callable[..., InstructionDataModule]) -> None:
    """The share is one of groups, the held-out splits keep their answers, and a smaller share is part of a larger."""
    whole, few, fewer = (build(answered=share) for share in (1.0, 0.15, 0.05))
    for name in ("validation", "test"):
        assert few.splits[name] == whole.splits[name]
    rows = [item.example for item in few.splits["train"].items]
    known = {example.group for example in rows if example.target}
    bare = [example for example in rows if not example.target]
    assert 0.4 < len(bare) / len(rows) < 0.6
    assert {example.group for example in bare} | known == {i.example.group for i in whole.splits["train"].items}
    assert not known & {example.group for example in bare}
    assert not any(example.references or example.answers or example.negatives for example in bare)
    assert 0.12 < len(known) / len({example.group for example in rows}) < 0.18
    assert {item.example.group for item in fewer.splits["train"].items if item.example.target} < known
    assert f"answered: {len(known)} groups" in few._summary()
    assert not any(item.example.target for item in build(answered=0.0).splits["train"].items)


def test_answers_that_are_none_are_refused(build: Callable[..., InstructionDataModule]) -> None:
    with pytest.raises(DataError, match=r"answered 0.0001 leaves an answer to none of \d+ training groups; raise it"):
        build(answered=0.0001)
    with pytest.raises(LoraGANError, match="answered must be a share from 0 to 1"):
        build(answered=1.5)


# Splits


def test_the_split_of_a_group_is_the_written_hash() -> None:
    # `printf 0:a | sha1sum`, read as a number, ends in 3704; 0:b in 213; 0:c in 7688
    fractions = {"validation": 0.5, "test": 0.3}
    assert {group: split_of(group, fractions, seed=0) for group in "abc"} == {
        "a": "train",
        "b": "test",
        "c": "validation",
    }


def test_a_changed_share_of_one_held_out_split_leaves_the_other() -> None:
    groups = [str(i) for i in range(500)]

    def held(name: str, **fractions: float) -> set[str]:
        return {group for group in groups if split_of(group, fractions, seed=3) == name}

    assert held("test", validation=0.1, test=0.2) == held("test", validation=0.4, test=0.2)
    assert held("validation", validation=0.1, test=0.2) == held("validation", validation=0.1, test=0.5)
    assert held("train", validation=0.0, test=0.0) == set(groups)


def test_no_group_stands_in_two_splits_and_nothing_is_lost(build: Callable[..., InstructionDataModule]) -> None:
    splits = build(numbered(400)).splits
    groups = {name: {item.example.group for item in split.items} for name, split in splits.items()}
    assert sum(len(each) for each in groups.values()) == len(set.union(*groups.values())) == 200
    assert sum(len(split.items) for split in splits.values()) == 400
    assert 100 < len(groups["train"]) < 180


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 12])
def test_three_groups_are_enough_for_every_split(groups: int) -> None:
    examples = [Example(str(i), "x", group=f"g{i % groups}") for i in range(24)]
    for seed in range(40):
        fractions = {"validation": 0.1, "test": 0.2}
        placed = assign_splits(examples, fractions, seed)
        wanted = {f"g{i}": split_of(f"g{i}", fractions, seed) for i in range(groups)}
        got = {example.group: name for name in placed for example in placed[name].examples}
        moved = sum(wanted[group] != got[group] for group in got)
        if groups < 3:
            assert moved == 0
        else:
            assert moved == 3 - len(set(wanted.values()))
            assert set(got.values()) == {"train", "validation", "test"}
        assert assign_splits(examples[::-1], fractions, seed).keys() == placed.keys()


def test_a_split_without_a_share_stays_empty() -> None:
    examples = [Example(str(i), "x") for i in range(3)]
    placed = assign_splits(examples, {"validation": 0.0, "test": 0.01}, seed=0)
    assert {name: len(split.examples) for name, split in placed.items()} == {"train": 2, "validation": 0, "test": 1}
    official = [Example(str(i), "x", split="test") for i in range(9)]
    assert len(assign_splits(official, {"validation": 0.1, "test": 0.2}, seed=0)["test"].examples) == 9


def test_official_splits_win_and_do_not_leak() -> None:
    examples = [
        Example("1", "x", group="shared", split="train"),
        Example("2", "x", group="shared", split="test"),
        Example("3", "x", group="alone", split="validation"),
    ]
    placed = assign_splits(examples, {"validation": 0.0, "test": 0.0}, seed=0)
    assert [[example.prompt for example in placed[name].examples] for name in placed] == [[], ["3"], ["2"]]
    assert placed["train"].dropped == Counter(group_also_in_test=1)
    with pytest.raises(DataError, match="'dev' is not known; use one of train, validation, test"):
        assign_splits([Example("1", "x", split="dev")], {"validation": 0.0, "test": 0.0}, seed=0)


def test_examples_without_an_item_are_all_evaluated() -> None:
    examples = [Example(str(i), "x", item="same" if i < 3 else "") for i in range(5)]
    chosen = one_wording_each(examples, seed=0)
    assert len(chosen) == 3
    assert {3, 4} < set(chosen)


# Tokens


def test_prompt_and_target_meet_without_a_seam(tokenizer_folder: str) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    example = Example("Say é:\n", "né 🌙", negatives=(Negative("no", "negatives"), Negative("", "empty")))
    (item,) = encode(tokenizer, [example])
    eos = tokenizer.eos_token_id
    assert tokenizer.decode([*item.prompt_ids, *item.target_ids[:-1]]) == "Say é:\nné 🌙"
    assert (len(item.prompt_ids), len(item.target_ids)) == (8, 9)  # bytes: é has 2, the moon 4; EOS
    assert item.target_ids[-1] == eos
    assert eos not in item.prompt_ids + item.target_ids[:-1]
    assert item.negative_ids == ((*tokenizer("no")["input_ids"], eos), (eos,))


def test_an_answer_that_quotes_eos_does_not_end_there(tokenizer_folder: str) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    (item,) = encode(tokenizer, [Example("p", "a<|endoftext|>b")])
    assert item.target_ids.count(tokenizer.eos_token_id) == 1
    assert len(item.target_ids) == 16


def test_bos_starts_the_prompt_where_the_tokenizer_has_one(tokenizer_folder: str) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = load_tokenizer(tokenizer_folder)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    (item,) = encode(tokenizer, [Example("p", "t")])
    assert item.prompt_ids[0] == bos
    assert bos not in item.target_ids


def test_too_long_is_counted_by_reason(build: Callable[..., InstructionDataModule]) -> None:
    negatives = (Negative("no", "negatives"), Negative("far too long", "negatives"))
    source = Given(
        Example("12345", "123", negatives=negatives),
        Example("123456", "1"),
        Example("1", "12345"),
        Example("12345", "1234"),
    )
    # prompt <= 5, target with EOS <= 5, together <= 9: only the first and, with nothing to spare, no other
    data = build(source, max_prompt_tokens=5, max_target_tokens=5, max_tokens=9, validation=0, test=0)
    split = data.splits["train"]
    assert split.dropped == Counter(prompt_too_long=1, target_too_long=2, negative_too_long=1)
    (item,) = split.items
    assert item.example.negatives == negatives[:1]
    assert len(item.negative_ids) == 1


LONG = Example("Do:\n0123456789\nabcdef\n>", "1", cuttable=((4, 14), (15, 21)))  # 23 characters, as many tokens


@pytest.mark.parametrize(
    ("limits", "prompt"),
    [(23, LONG.prompt), (18, "Do:\n56789\nabcdef\n>"), (14, "Do:\n9\nabcdef\n>"), (11, "Do:\n\ncdef\n>")],
)
def test_a_long_prompt_is_cut_inside_its_longest_field(
    build: Callable[..., InstructionDataModule], limits: int, prompt: str
) -> None:
    split = build(Given(LONG), max_prompt_tokens=limits, validation=0, test=0).splits["train"]
    (item,) = split.items
    assert (item.example.prompt, len(item.prompt_ids)) == (prompt, limits)
    assert split.repaired["prompt_cut"] == (limits < 23)


def test_a_prompt_is_cut_so_that_the_target_fits(build: Callable[..., InstructionDataModule]) -> None:
    split = build(Given(LONG), max_tokens=20, validation=0, test=0).splits["train"]
    assert split.items[0].example.prompt == "Do:\n56789\nabcdef\n>"  # 18, and 2 for the target with EOS


@pytest.mark.parametrize("limits", [6, 7])
def test_a_prompt_is_not_cut_to_nothing(build: Callable[..., InstructionDataModule], limits: int) -> None:
    short = Example("p", "t")
    split = build(Given(LONG, short), max_prompt_tokens=limits, validation=0, test=0).splits["train"]
    assert split.dropped == Counter(prompt_too_long=1)


def test_alpaca_is_cut_in_its_input_only(build: Callable[..., InstructionDataModule], tmp_path: Path) -> None:
    row = {"instruction": "Count {the} words.", "input": "many words " * 30, "output": "60"}
    data = build(path=write(tmp_path / "rows.json", json.dumps([row])), max_prompt_tokens=60, validation=0, test=0)
    (item,) = data.splits["train"].items
    assert item.example.prompt.startswith("### Prompt:\nCount {the} words.\n")
    assert item.example.prompt.endswith("many words\n\n### Response:\n")
    assert len(item.prompt_ids) == 60


# Large data sets


def test_ids_of_large_sets_are_kept(
    build: Callable[..., InstructionDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "LARGE", 3)
    encoded: list[int] = []

    def counted(tokenizer: Any, examples: Any) -> Any:
        encoded.append(len(examples))
        return encode(tokenizer, examples)

    monkeypatch.setattr(cache, "encode", counted)
    negatives = (Negative("no", "negatives"), Negative("", "empty"))
    source = Given(*(Example(f"{i} é🌙?", str(i), negatives=negatives[: i % 3], group="g") for i in range(7)))
    first, second = (build(source, validation=0, test=0) for _ in range(2))
    items = [data.splits["train"].items for data in (first, second)]
    assert encoded == [7]
    assert items[0] == items[1] == tuple(encode(first.tokenizer, source.examples))

    (file,) = (tmp_path / "lora_gan" / "ids").glob("*.npz")
    file.write_bytes(file.read_bytes()[:100])
    assert build(source, validation=0, test=0).splits["train"].items == items[0]
    other = Given(*source.examples[:-1], Example("6 é🌙!", "6", group="g"))
    assert build(other, validation=0, test=0).splits["train"].items[-1].example.prompt == "6 é🌙!"
    assert len(list(file.parent.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_done_without(
    build: Callable[..., InstructionDataModule], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    monkeypatch.setattr(cache, "LARGE", 3)
    data = build(numbered(7), validation=0, test=0)
    assert data.splits["train"].items == tuple(encode(data.tokenizer, list(data.source.rows())))
    assert "token ids are not cached" in caplog.text
    assert "set XDG_CACHE_HOME" in caplog.text


@pytest.mark.slow
def test_50_000_rows_are_loaded_in_time(tmp_path: Path) -> None:
    words = [text for example in BuiltinWorld().rows() for text in example.target.split()]
    choose = random.Random(0).choices
    rows = [
        {"instruction": " ".join(choose(words, k=12)), "input": "", "output": " ".join(choose(words, k=60))}
        for _ in range(50_000)
    ]
    path = write(tmp_path / "rows.json", json.dumps(rows))
    message = (
        "import resource, sys, time; from lora_gan.data import InstructionDataModule as D; d = D(path=sys.argv[1]); "
        "d.tokenizer; t = time.process_time(); d.setup(); print(time.process_time() - t, "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TOKENIZERS_PARALLELISM": "false"}
    runs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", message, path], env=environment, capture_output=True, check=True)
        runs.append([float(number) for number in done.stdout.split()])
    (first, memory), (second, _) = runs
    print(f"first {first:.1f} s, second {second:.1f} s of one core, {memory:.2f} GB")
    assert first < 20
    assert second < 0.7 * first
    assert memory < 1.5


# Chat templates

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def chat_folder(tokenizer_folder: str, tmp_path: Path) -> str:
    tokenizer: Any = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "chat")
    return str(tmp_path / "chat")


def test_a_chat_template_replaces_the_plain_one(chat_folder: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", json.dumps([{**ROW, "input": "in French, " + "please " * 20}]))

    def prompt(**settings: Any) -> str:
        data = InstructionDataModule(path=path, tokenizer=chat_folder, validation=0, test=0, **settings)
        data.setup()
        (item,) = data.splits["train"].items
        assert data.tokenizer.decode(item.prompt_ids) == item.example.prompt
        return item.example.prompt

    whole = "<|user|>Say hello.\n\nin French, " + "please " * 19 + "please\n<|assistant|>"
    assert prompt() == whole
    assert prompt(system="Be brief.") == "<|system|>Be brief.\n" + whole
    assert prompt(max_prompt_tokens=40) == "<|user|>Say hello.\n\nplease\n<|assistant|>"
    assert prompt(chat=True) == whole
    assert prompt(chat=False).startswith("### Prompt:\nSay hello.\nin French")


def test_own_system_messages_that_are_replaced_are_counted(chat_folder: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "completion": "A", "system": said} for n, said in enumerate(["Own.", "Be brief.", ""])]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    data = InstructionDataModule(path=path, tokenizer=chat_folder, validation=0, test=0, system="Be brief.")
    counted = ["train:", "own_system_message_replaced", "1"]
    assert counted in [line.split() for line in report(data).splitlines()]
    prompts = [item.example.prompt for item in data.splits["train"].items]
    assert prompts == [f"<|system|>Be brief.\n<|user|>{n}?\n<|assistant|>" for n in range(3)]


@pytest.mark.parametrize("settings", [{"chat": False}, {"source": numbered(4)}], ids=["no chat", "no dialogues"])
def test_a_system_message_that_nothing_writes_is_refused(chat_folder: str, settings: dict[str, Any]) -> None:
    settings = {"source": Alpaca(str(FIXTURE)), **settings}
    data = InstructionDataModule(**settings, tokenizer=chat_folder, system="Be brief.")
    with pytest.raises(
        LoraGANError, match=r"init_args\.system has no effect: prompts are written with the template of"
    ):
        data.setup()


def test_a_data_set_without_dialogues_is_written_without_chat_template(chat_folder: str) -> None:
    data = InstructionDataModule(numbered(4), tokenizer=chat_folder, validation=0, test=0)
    data.setup()
    assert data.splits["train"].items[0].example.prompt == "000?"


def test_the_log_says_how_prompts_are_written(chat_folder: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lora_gan")
    for chat in (None, False):
        InstructionDataModule(path=str(FIXTURE), tokenizer=chat_folder, chat=chat).setup()
    first, second = (record.getMessage() for record in caplog.records if "  prompts: " in record.getMessage())
    assert "prompts: with the tokenizer's chat template (data.init_args.chat: false uses the template of the" in first
    assert "prompts: with the template of the source (data.init_args.chat: true uses the tokenizer's chat te" in second


def test_a_chat_needs_a_template(tokenizer_folder: str) -> None:
    data = InstructionDataModule(path=str(FIXTURE), tokenizer=tokenizer_folder, chat=True)
    with pytest.raises(LoraGANError, match=r"has no chat template; set data\.init_args\.chat: false"):
        data.setup()


def test_when_nothing_fits_the_lengths_are_reported(build: Callable[..., InstructionDataModule]) -> None:
    with pytest.raises(DataError, match=r"longest prompt has 6 .*max_prompt_tokens 4.* target 3 .* raise"):
        build(Given(Example("123456", "12")), max_prompt_tokens=4)
    with pytest.raises(DataError, match=r"longest prompt has 2000 .* together they may have 1024"):
        build(Given(Example("1" * 2000, "12")), max_prompt_tokens=4000)


def test_tokenizer_errors_say_what_to_give(tokenizer_folder: str, tmp_path: Path) -> None:
    with pytest.raises(LoraGANError, match=r"not a local folder and could not be loaded from the hub.*builtin"):
        load_tokenizer(str(tmp_path))
    tokenizer: Any = load_tokenizer(tokenizer_folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(LoraGANError, match=r"endless' has no EOS token.*set eos_token"):
        load_tokenizer(str(tmp_path / "endless"))


# The data module


def test_table_of_the_fixture(build: Callable[..., InstructionDataModule], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lora_gan"):
        build(path=str(FIXTURE), validation=0, test=0, max_target_tokens=20)
    (record,) = caplog.records
    assert record.getMessage().splitlines() == [
        f"data: alpaca ({FIXTURE}), rows dropped: empty_output 1, no_output 1, url_input 1",
        "  rows repaired: merged_row_cut 1, no_input 2",
        "  prompts: with the template of the source (the tokenizer has no chat template)",
        "  split           kept  groups  dropped",
        "  train              4       4  target_too_long 3",
        "  validation         0       0  none",
        "  test               0       0  none",
    ]


def test_batches_are_ragged_and_end_with_eos(build: Callable[..., InstructionDataModule]) -> None:
    data = build(path=str(FIXTURE), validation=0, test=0, batch_size=3)
    batches: list[PromptBatch] = list(data.train_dataloader())
    assert [len(batch) for batch in batches] == [3, 3]
    for batch in batches:
        assert [len(ids) for ids in batch.target_ids] == [len(text.encode()) + 1 for text in batch.targets]
        assert all(ids[-1] == data.tokenizer.eos_token_id and ids.dtype == torch.long for ids in batch.target_ids)
        for ids, example in zip(batch.prompt_ids, batch.examples, strict=True):
            assert data.tokenizer.decode(ids) == example.prompt
    assert batches[0].to("cpu").examples == batches[0].examples


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = BucketSampler([1] * 50, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0) != list(range(50))
    assert sorted(order(0, 0)) == list(range(50))
    assert order(0, 0) != order(0, 1) != order(1, 1)


def test_batches_hold_prompts_of_like_length() -> None:
    lengths = [(7 * i) % 100 for i in range(103)]
    sampler = BucketSampler(lengths, seed=0, batch_size=10, bucket_batches=5)
    order = list(sampler)
    assert sorted(order) == list(range(103))
    batches = [[lengths[i] for i in order[start : start + 10]] for start in range(0, 100, 10)]
    spread = [max(batch) - min(batch) for batch in batches]
    assert max(spread) < 35, "of 50 prompts, those of a batch are neighbours; by chance it would be about 80"
    assert [max(batch) for batch in batches] != sorted(max(batch) for batch in batches)
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_an_epoch_begun_in_the_middle() -> None:
    whole = BucketSampler([1] * 20, seed=0, batch_size=4, bucket_batches=2)
    begun = BucketSampler([1] * 20, seed=0, batch_size=4, bucket_batches=2, start=EpochPosition(epoch=1, batches=3))
    for epoch, skipped in ((0, 0), (1, 12), (2, 0)):
        whole.set_epoch(epoch)
        begun.set_epoch(epoch)
        assert list(begun) == list(whole)[skipped:]


@pytest.mark.parametrize("bucket_batches", [1, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_an_epoch(processes: int, bucket_batches: int) -> None:
    """Each step of all processes is the step of one process that takes as many prompts as they do together."""
    lengths = [(7 * i) % 31 for i in range(31)]

    def epoch(count: int, rank: int, start: EpochPosition) -> list[int]:
        sampler = BucketSampler(lengths, 0, 12 // count, bucket_batches, start, count, rank)
        sampler.set_epoch(1)
        assert len(sampler) == 31 // count
        return list(sampler)

    alone = epoch(1, 0, EpochPosition())
    ranks = [epoch(processes, rank, EpochPosition()) for rank in range(processes)]
    assert {len(rank) for rank in ranks} == {31 // processes}, "as many batches in each"
    size = 12 // processes
    for first in (0, 1):
        step = [index for rank in ranks for index in rank[first * size : (first + 1) * size]]
        assert sorted(step) == sorted(alone[first * 12 : (first + 1) * 12])
    together = [index for rank in ranks for index in rank]
    assert len(set(together)) == len(together) == 31 - 31 % processes, "each prompt once"
    begun = [epoch(processes, rank, EpochPosition(epoch=1, batches=1)) for rank in range(processes)]
    assert begun == [rank[size:] for rank in ranks]


def test_prompts_are_dealt_out_to_the_processes(build: Callable[..., InstructionDataModule]) -> None:
    data = build(numbered(21), validation=0, test=0, batch_size=4)

    def served(rank: int, processes: int = 2) -> list[list[str]]:
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            distributed_sampler_kwargs={"num_replicas": processes, "rank": rank}, training=False
        )
        return [[*batch.targets] for batch in data.train_dataloader()]

    first, second = served(0), served(1)
    assert [len(batch) for batch in (*first, *second)] == [4, 4, 4, 4]
    assert len({text for batch in (*first, *second) for text in batch}) == 16
    few = [served(rank, 7) for rank in range(7)]
    assert [[len(batch) for batch in batches] for batches in few] == [[3]] * 7
    assert sorted(text for batches in few for text in batches[0]) == sorted(map(str, range(21)))
    with pytest.raises(DataError, match="21 training examples cannot be dealt out to 22 processes; give more rows"):
        served(0, 22)


class Listener(L.LightningModule):
    """Notes what it is trained on in which epoch, and saves after each batch where a folder is given."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.folder = folder
        self.seen: list[tuple[int, str]] = []

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen += [(self.current_epoch, text) for text in batch.targets]

    def on_train_batch_end(self, outputs: Any, batch: PromptBatch, batch_idx: int) -> None:
        if self.folder:
            self.trainer.save_checkpoint(self.folder / f"{len(self.seen)}.ckpt")

    def on_train_epoch_end(self) -> None:
        if self.folder:
            self.trainer.save_checkpoint(self.folder / f"epoch{self.current_epoch}.ckpt")

    def configure_optimizers(self) -> None:
        return None

    def fit(self, data: InstructionDataModule, ckpt: Path | None = None) -> list[tuple[int, str]]:
        trainer = L.Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(self, datamodule=data, ckpt_path=ckpt, weights_only=True)
        return self.seen


def test_lightning_changes_the_order_each_epoch(build: Callable[..., InstructionDataModule]) -> None:
    def run() -> list[list[str]]:
        seen = Listener().fit(build(numbered(40), validation=0, test=0, batch_size=8))
        return [[text for epoch, text in seen if epoch == wanted] for wanted in (0, 1, 2)]

    first, second, third = run()
    assert sorted(first) == sorted(second) == sorted(map(str, range(40)))
    assert first != second
    assert run() == [first, second, third]


@pytest.mark.parametrize("bucket_batches", [1, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_goes_on_inside_the_epoch(
    build: Callable[..., InstructionDataModule], tmp_path: Path, bucket_batches: int, workers: int
) -> None:
    def data() -> InstructionDataModule:
        given = {"batch_size": 8, "bucket_batches": bucket_batches, "num_workers": workers}
        return build(numbered(42), validation=0, test=0, **given)

    whole = Listener(tmp_path).fit(data())
    assert len(whole) == 3 * 40
    for trained in (8, 40, 56) if workers == 0 else (40, 56):
        assert Listener().fit(data(), tmp_path / f"{trained}.ckpt") == whole[trained:]
    assert Listener().fit(data(), tmp_path / "epoch1.ckpt") == whole[80:]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"batch_size": 10}, {"batch_size": 2}, {"bucket_batches": 2}])
def test_another_order_than_that_of_the_checkpoint_is_reported(
    build: Callable[..., InstructionDataModule],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changed: dict[str, int],
) -> None:
    Listener(tmp_path).fit(build(numbered(40), validation=0, test=0, batch_size=8))
    data = build(numbered(40), validation=0, test=0, **{"batch_size": 8, **changed})
    resumed = Listener().fit(data, tmp_path / "16.ckpt")
    (name,) = changed
    message = "batch_size (times processes)" if name == "batch_size" else name
    assert f"not as in the checkpoint: data.init_args.{message}; the epoch starts again" in caplog.text
    whole = [sorted(text for epoch, text in resumed if epoch == at) for at in (1, 2)]
    assert whole == [sorted(map(str, range(40)))] * 2, "the epochs after it are whole"


def test_few_rows_make_one_small_batch(
    build: Callable[..., InstructionDataModule], caplog: pytest.LogCaptureFixture
) -> None:
    data = build(numbered(4), validation=0, test=0)
    assert [len(batch) for batch in data.train_dataloader()] == [4]
    assert "only 4 training examples for data.init_args.batch_size=16" in caplog.text
    assert len(data.val_dataloader()) == 0
    assert "no validation examples" in caplog.text
    with pytest.raises(DataError, match="leaves no test examples"):
        data.test_dataloader()


def test_an_empty_test_split_is_a_warning_before_training(
    tokenizer_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    one = Given(Example("1?", "1", group="a"))  # of which the hash makes a training example
    data = InstructionDataModule(one, tokenizer=tokenizer_folder)
    Listener().fit(data)
    assert "no test examples: fit ends without its test" in caplog.text
    assert len(data.test_dataloader()) == 0
    alone = InstructionDataModule(one, tokenizer=tokenizer_folder)
    alone.setup("test")
    with pytest.raises(DataError, match="leaves no test examples"):
        alone.test_dataloader()


def test_held_out_limits_are_stable(build: Callable[..., InstructionDataModule]) -> None:
    def validation(limit: int | None) -> list[str]:
        items = build(numbered(300), max_validation=limit).splits["validation"].items
        return [item.example.prompt for item in items]

    assert len(validation(5)) == 5
    assert set(validation(5)) < set(validation(9)) < set(validation(None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be at least 1"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be at least 1"),
        ({"max_test": 0}, "max_test must be at least 1"),
        ({"validation": 1.0}, "validation must be a share from 0 to below 1, got 1.0"),
        ({"test": -0.1}, "test must be a share"),
        ({"validation": 0.5, "test": 0.5}, "leave nothing to train on"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        (
            {"source": BuiltinWorld(), "path": "my.json"},
            "the source builtin reads no file.*leave out data.init_args.source",
        ),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraGANError, match=message):
        InstructionDataModule(**settings)


def test_a_path_replaces_that_of_the_source() -> None:
    source = Alpaca("yahma/alpaca-cleaned", limit=2)
    assert len(list(InstructionDataModule(source, path=str(FIXTURE)).source.rows())) == 2
    assert source.path == "yahma/alpaca-cleaned"


def test_the_command_line_takes_source_and_path(tokenizer_folder: str) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(InstructionDataModule, "data")
    config = {
        "class_path": "lora_gan.data.InstructionDataModule",
        "init_args": {"source": {"class_path": "lora_gan.data.Alpaca", "init_args": {"limit": 3}}, "batch_size": 2},
    }
    parsed = parser.parse_args([f"--data={json.dumps(config)}", f"--data.init_args.path={FIXTURE}"])
    data = parser.instantiate(parsed).data
    assert (data.source.path, data.source.limit, data.batch_size) == (str(FIXTURE), 3, 2)
