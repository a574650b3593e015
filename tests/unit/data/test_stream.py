"""Learning from a stream: whole lines only, each row once, constant memory, resumed where training stopped."""

from __future__ import annotations

import json
import os
import threading
import time
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from transformers import PreTrainedTokenizerFast

from lora_gan.data import Alpaca, StandardFormat, StreamDataModule
from lora_gan.data.tail import Line, Position, Tail
from lora_gan.data.tokenizer import Encoded, encode
from lora_gan.errors import DataError, LoraGANError
from lora_gan.types import PromptBatch

Build = Callable[..., StreamDataModule]


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def build(tokenizer_folder: str) -> Build:
    """A stream on the byte tokenizer that ends as soon as nothing comes."""

    def build(path: Path | str, **settings: Any) -> StreamDataModule:
        defaults = {"batch_size": 4, "poll_seconds": 0.01, "stop_after_seconds": 0.0, "tokenizer": tokenizer_folder}
        return StreamDataModule(str(path), **{**defaults, **settings})

    return build


def rows(*numbers: int) -> bytes:
    return b"".join(line(number) + b"\n" for number in numbers)


def line(number: int) -> bytes:
    return json.dumps({"instruction": f"Say {number}.", "output": str(number)}).encode()


def append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def targets(batches: Iterator[PromptBatch]) -> list[str]:
    return [text for batch in batches for text in batch.targets]


class Listener(L.LightningModule):
    """Notes what it is trained on; ``stop_after`` batches it stops and saves."""

    def __init__(self, act: Callable[[int], None] = lambda batch: None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.act = act
        self.seen: list[str] = []
        self.validated = 0

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.seen += batch.targets
        self.act(len(self.seen))

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.validated += len(batch)

    def on_train_batch_end(self, outputs: Any, batch: PromptBatch, batch_idx: int) -> None:
        self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / f"{batch_idx}.ckpt")

    def configure_optimizers(self) -> None:
        return None


def fit(listener: Listener, data: StreamDataModule, folder: Path, ckpt: str | None = None, **settings: Any) -> None:
    L.Trainer(
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **settings,
    ).fit(listener, datamodule=data, ckpt_path=ckpt, weights_only=True)


# Lines


def test_lines_know_where_they_end(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"ab\n\ncde\r\nf")
    assert list(Tail(str(path), 0.01, 0).lines()) == [
        Line(b"ab\n", 1, 3),
        Line(b"\n", 2, 4),
        Line(b"cde\r\n", 3, 9),
        Line(b"f", 4, 10, whole=False),
    ]


def test_a_line_that_is_half_written_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"one\ntw")
    lines = Tail(str(path), 0.01, 5.0).lines()
    assert next(lines).content == b"one\n"
    threading.Timer(0.1, append, (path, b"o\nthr")).start()
    assert next(lines) == Line(b"two\n", 2, 8)
    append(path, b"ee\n")
    assert next(lines).content == b"three\n"


def test_lines_longer_than_a_chunk(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"x" * 200_000 + b"\n" + b"y\n")
    assert [len(line.content) for line in Tail(str(path), 0.01, 0).lines()] == [200_001, 2]


def test_a_file_without_line_breaks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_gan.data.tail.LONGEST_LINE", 100)
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"a\n" + b"x" * 101)
    with pytest.raises(DataError, match=r"s\.jsonl, line 2: more than 100 bytes without a line break"):
        list(Tail(str(path), 0.01, 0).lines())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(b""), "was cut to 0 bytes, but 4 had been read"),
        (lambda path: path.unlink(), "was deleted or replaced by another file after byte 4"),
        (lambda path: (path.rename(f"{path}.1"), path.write_bytes(b"new\n")), "was deleted or replaced"),
    ],
    ids=["truncated", "deleted", "rotated"],
)
def test_a_stream_that_is_not_only_appended_to_is_reported(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"one\n")
    lines = Tail(str(path), 0.01, None).lines()
    next(lines)
    change(path)
    with pytest.raises(DataError, match=message):
        next(lines)


def test_a_position_must_be_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"one\ntwo\n")
    tail = Tail(str(path), 0.01, 0)
    tail.seek(Position(4, 1))
    assert list(tail.lines()) == [Line(b"two\n", 2, 8)]
    tail.seek(Position(8, 2))
    assert list(tail.lines()) == []
    with pytest.raises(DataError, match="no line starts at byte 2, where the checkpoint resumes"):
        tail.seek(Position(2, 1))
    with pytest.raises(DataError, match="was cut to 8 bytes, but 9 had been read"):
        tail.seek(Position(9, 3))


def test_a_missing_stream_says_what_to_do(tmp_path: Path, build: Build) -> None:
    with pytest.raises(DataError, match=r"No such file.*create the file first"):
        build(tmp_path / "none.jsonl").train_dataloader()


# Rows


def test_rows_come_in_order_with_the_format_of_the_source(tmp_path: Path, build: Build) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + rows(0, 1, 2, 3, 4).replace(b"\n", b"\r\n") + line(5))
    data = build(path, source=Alpaca(template_without_input="{instruction} >"))
    batches = list(data.train_dataloader())
    assert [batch.targets for batch in batches] == [("0", "1", "2", "3"), ("4", "5")]
    assert batches[0].examples[2].prompt == "Say 2. >"


def test_a_stream_takes_the_format_of_its_first_row(tmp_path: Path, build: Build) -> None:
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello!"}]
    path = tmp_path / "s.jsonl"
    path.write_bytes(json.dumps({"messages": turns}).encode() + b"\n" + rows(1))
    source = StandardFormat(str(path), on_bad_row="drop")
    data = build(path, source=source)
    assert targets(data.train_dataloader()) == ["Hello!"]
    assert data.dropped == Counter(bad_row=1)
    with pytest.raises(LoraGANError, match="set every_turn of its source to false"):
        build(path, source=StandardFormat(str(path), every_turn=True))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"instruction": "Say', "s.jsonl, line 2, column 17: not valid JSON"),
        (b"[1]", "s.jsonl, line 2: a JSON list, not an object"),
        (b'{"instruction": "a"}', "s.jsonl, line 2: the field 'output' is missing"),
        (b'{"instruction": "a", "output": 1}', "s.jsonl, line 2: the field 'output' is int"),
        (b"\xff", "s.jsonl, line 2: byte 0 is not valid UTF-8"),
    ],
)
def test_bad_rows_are_refused_or_dropped(tmp_path: Path, build: Build, bad: bytes, message: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(rows(0) + bad + b"\n" + rows(1))
    with pytest.raises(DataError) as raised:
        list(build(path).train_dataloader())
    assert message in str(raised.value)
    data = build(path, source=Alpaca(on_bad_row="drop"))
    assert targets(data.train_dataloader()) == ["0", "1"]
    assert data.dropped == Counter(bad_row=1)


def test_what_does_not_fit_is_counted(tmp_path: Path, build: Build) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(rows(7, 12345, 8))
    data = build(path, max_target_tokens=3)
    assert targets(data.train_dataloader()) == ["7", "8"]
    assert data.dropped == Counter(target_too_long=1)


def test_an_unfinished_last_line_waits_for_the_next_run(
    tmp_path: Path, build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(rows(0) + line(1)[:-3])
    listener = Listener()
    data = build(path)
    fit(listener, data, tmp_path)
    assert listener.seen == ["0"]
    assert "line 2 has no line break" in caplog.text
    append(path, line(1)[-3:] + b"\n" + rows(2))
    fit(listener, data, tmp_path)
    assert listener.seen == ["0", "1", "2"]


def test_validation_rows_are_not_trained_on(tmp_path: Path, build: Build) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(rows(*range(7)))
    listener = Listener()
    fit(listener, build(path, validation_rows=3), tmp_path, val_check_interval=1, check_val_every_n_epoch=None)
    assert listener.seen == ["3", "4", "5", "6"]
    assert listener.validated >= 3
    other = tmp_path / "held_out.json"
    other.write_text(json.dumps([json.loads(line(99))]))
    data = build(path, validation_path=str(other))
    data.setup()
    assert targets(data.val_dataloader()) == ["99"]
    other.write_text(json.dumps([{"instruction": "a", "output": ""}]))
    with pytest.raises(DataError, match="no row to validate on"):
        build(path, validation_path=str(other)).setup()


def test_stdin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, build: Build) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr("sys.stdin", os.fdopen(reader))
    os.write(writer, rows(0, 1, 2, 3) + line(4)[:5])

    def finish() -> None:
        os.write(writer, line(4)[5:] + b"\n" + rows(5))
        os.close(writer)

    threading.Timer(0.2, finish).start()
    listener = Listener()
    fit(listener, build("-", stop_after_seconds=None, validation_rows=1), tmp_path)
    assert listener.seen == ["1", "2", "3", "4", "5"]


# Without end


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(rows(*range(20_000)))
    alive, most = 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def counted(*arguments: Any) -> list[Encoded]:
        nonlocal alive, most
        items = encode(*arguments)
        alive, most = alive + 1, max(most, alive + 1)
        weakref.finalize(items[0].example, gone)
        return items

    monkeypatch.setattr("lora_gan.data.cache.encode", counted)
    assert sum(len(batch) for batch in build(path, batch_size=16).train_dataloader()) == 20_000
    assert most <= 2 * 16


def test_lines_are_read_in_chunks(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"a line of the stream\n" * 200_000)
    tail = Tail(str(path), 0.01, 0)
    tracemalloc.start()
    count = sum(1 for _ in tail.lines())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 200_000
    assert peak < 1_500_000, "the file has 4 MB"


def test_training_goes_on_as_rows_arrive(tmp_path: Path, build: Build) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(rows(*range(8)))

    def write_more(seen: int) -> None:
        if seen < 40:
            append(path, rows(*range(seen + 4, seen + 8)))

    listener = Listener(write_more)
    fit(listener, build(path, stop_after_seconds=0.2), tmp_path)
    assert listener.seen == [str(i) for i in range(44)]


def test_a_stream_that_validation_takes_whole_is_an_error(tmp_path: Path, build: Build) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(rows(1, 2, 3) + b'{"instruction": "?", "output": ""}\n')
    for kept in (3, 64):
        listener = Listener()
        message = (
            rf"ended after 3 usable rows \(dropped: empty_output 1\), and validation_rows: {kept} takes them all for"
        )
        with pytest.raises(DataError, match=f"{message} validation, .* lower data.init_args.validation_rows below 3"):
            fit(listener, build(path, validation_rows=kept), tmp_path)
        assert listener.seen == []


def test_an_empty_stream_ends(tmp_path: Path, build: Build) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"")
    listener = Listener()
    fit(listener, build(path), tmp_path)
    assert listener.seen == []


def test_waiting_uses_no_processor(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"")
    started = time.process_time()
    assert list(Tail(str(path), 0.05, 0.3).lines()) == []
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize("stopped_after", [0, 1, 2])
def test_a_resumed_run_goes_on_behind_the_last_trained_row(tmp_path: Path, build: Build, stopped_after: int) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(rows(*range(18)))
    first, second = Listener(), Listener()
    fit(first, build(path, validation_rows=2), tmp_path, limit_val_batches=0)
    assert first.seen == [str(i) for i in range(2, 18)]
    append(path, rows(18))
    data = build(path, validation_rows=2)
    fit(second, data, tmp_path / "resumed", str(tmp_path / f"{stopped_after}.ckpt"), limit_val_batches=0)
    assert second.seen == [str(i) for i in range(2 + 4 * (stopped_after + 1), 19)]
    message = {"path": str(path), "offset": path.stat().st_size, "lines": 19, "rows_trained": 17}
    assert data.state_dict() == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"poll_seconds": 0}, "poll_seconds must be > 0"),
        ({"stop_after_seconds": -1}, "stop_after_seconds must be >= 0"),
        ({"validation_rows": -1}, "validation_rows must be >= 0"),
        ({"validation_rows": 1, "validation_path": "a.json"}, "give one of the two"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraGANError, match=message):
        StreamDataModule("s.jsonl", **settings)


def test_the_command_line_takes_a_stream() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    config = {
        "class_path": "lora_gan.data.StreamDataModule",
        "init_args": {
            "path": "-",
            "source": {"class_path": "lora_gan.data.Alpaca", "init_args": {"on_bad_row": "drop"}},
        },
    }
    data = parser.instantiate(parser.parse_args([f"--data={json.dumps(config)}"])).data
    assert (data.path, data.source.on_bad_row) == ("-", "drop")
