"""Rows of local files (json, jsonl, csv, tsv, parquet; gzip if the name ends in .gz) and of data sets on the hub.

Every fault of a file is a :class:`DataError` that names the file, the row and the field.
"""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import math
import os
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import NoReturn

from lora_gan.data.formats import advice, format_of
from lora_gan.errors import DataError

FORMATS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")

OnBadRow = Callable[[DataError], None]


@dataclass(frozen=True)
class Row:
    """A raw row and its location. ``repaired`` says in what ways its texts were repaired when they were read."""

    values: Mapping[str, object]
    where: str  # "my.json, row 7"
    split: str = ""  # official split; "" if it has none
    repaired: set[str] = field(default_factory=set, compare=False, repr=False)

    def get(self, *path: str) -> object:
        """The value at ``path`` in nested objects; None if a key is missing."""
        value: object = self.values
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def text(self, field: str, default: str | None = None) -> str:
        """The cleaned text of ``field``; ``default`` if it is missing or null.

        Raises:
            DataError: The field is not text, or it is missing or null and there is no default.
        """
        value = self.values.get(field)
        if value is None and default is not None:
            return default
        if field not in self.values:
            found = ", ".join(map(str, self.values)) or "none"
            raise DataError(
                f"{self.where}: the field {field!r} is missing (fields found: {found}); {advice(self.values)}"
            )
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise DataError(f"{self.where}: the field {field!r} is {kind}, not text; fix or delete the row")
        return self.clean(value)

    def clean(self, text: str) -> str:
        """:func:`clean`, noted in :attr:`repaired` where it takes out characters."""
        if _CONTROL.search(text):
            self.repaired.add("control_characters_removed")
        return clean(text)

    def texts(self, field: str) -> list[str]:
        """The cleaned texts in ``field``: of a list without its nulls, or a single one."""
        value = self.values.get(field)
        given = [value] if isinstance(value, str) else value
        present = [text for text in given if text is not None] if isinstance(given, list) else given
        return strings(present, field, self)

    def answers(self, field: str) -> tuple[str, ...]:
        """The accepted final answers in ``field``: a text, a number or a list of them; none if it is missing or null.

        Raises:
            DataError: It holds something else.
        """
        value = self.values.get(field)
        given = value if isinstance(value, list) else [value]
        texts = [self.clean(_written(answer, f"{self.where}: the field {field!r}")) for answer in given]
        return tuple(dict.fromkeys(filter(None, texts)))

    def tests(self, field: str) -> tuple[str, ...]:
        """The tests in ``field``, Python statements: a text or a list of them; none if it is missing or null.

        Raises:
            DataError: It holds something else, or what is not Python.
        """
        tests = tuple(filter(None, self.texts(field))) if self.values.get(field) is not None else ()
        for test in tests:
            if fault := python_fault(test):
                raise DataError(
                    f"{self.where}: the field {field!r} holds {test[:80]!r}, which is not Python: {fault}; a test is "
                    "a statement such as assert add(1, 2) == 3, so fix or rename the field"
                )
        return tests


@lru_cache(maxsize=4096)
def python_fault(code: str) -> str:
    """Why the text is no Python code; empty where it is."""
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return str(error) or type(error).__name__
    return ""


def _written(answer: object, where: str) -> str:
    """A final answer as people write it: 72, not 72.0, which tables make of it; empty for null."""
    if answer is None or isinstance(answer, str):
        return answer or ""
    if not isinstance(answer, Real) or isinstance(answer, bool) or not math.isfinite(answer):
        raise DataError(
            f"{where} holds {type(answer).__name__} {str(answer)[:40]!r}; a final answer is a text or a finite number, "
            "or a list of them, so fix or rename the field"
        )
    whole = math.trunc(answer)
    return str(whole if whole == answer else answer)


def strings(value: object, field: str, row: Row) -> list[str]:
    """``value`` of a row as a list of cleaned texts; :class:`DataError` if it is not a list of texts."""
    if not isinstance(value, list):
        kind = "missing or null" if value is None else f"{type(value).__name__}, not a list of texts"
        raise DataError(f"{row.where}: the field {field!r} is {kind}; fix or delete the row")
    for text in value:
        if not isinstance(text, str):
            kind = "null" if text is None else type(text).__name__
            raise DataError(
                f"{row.where}: the list in the field {field!r} holds {kind}, not text; fix or delete the row"
            )
    return [row.clean(text) for text in value]


def clean(text: str) -> str:
    r"""``text`` in NFC with \n line ends, without control characters, lone surrogates and surrounding space.

    A text of nothing but space and invisible characters (zero-width space, joiner, …) is empty.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    cleaned = unicodedata.normalize("NFC", _CONTROL.sub("", lines)).strip()
    visible = any(not (sign.isspace() or unicodedata.category(sign) == "Cf") for sign in cleaned)
    return cleaned if visible else ""


def refuse(error: DataError) -> NoReturn:
    """Raise the error of a bad row: the default of :func:`read_rows`."""
    raise error


def read_rows(path: str, split: str = "train", bad: OnBadRow = refuse, config: str | None = None) -> Iterator[Row]:
    """The rows of a local file or, if there is no such file, of a data set on the hub.

    Args:
        path: File name or hub id.
        split: Split of a data set on the hub.
        bad: Called with the error of each row that cannot be read; if it returns, the row is skipped.
        config: Configuration of a data set on the hub.

    Raises:
        DataError: The file or the data set cannot be read.
    """
    if not path.strip():
        raise DataError("no data file is named; set data.init_args.path to a file or to an id of a data set on the hub")
    return _read_hub(path, split, config) if is_hub_id(path) else _read_file(Path(path).expanduser(), bad)


def is_hub_id(path: str) -> bool:
    """Whether ``path`` looks like a hub id and there is no such file."""
    file = Path(path).expanduser()
    is_file_name = _format(file) in FORMATS or not _HUB_ID.fullmatch(path) or path.startswith(".")
    return not is_file_name and not os.path.exists(file)


def _format(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])


def read_lines(file: Path) -> list[str]:
    """The lines of a text file; only a line feed, alone or after a carriage return, ends one.

    Raises:
        DataError: The file cannot be read, is empty or is not UTF-8.
    """
    return [line.removesuffix("\r") for line in _decode(file, _content(file)).split("\n")]


def _read_file(file: Path, bad: OnBadRow) -> Iterator[Row]:
    readers = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows, ".tsv": _csv_rows}
    content = _content(file)
    kind = _format(file)
    if kind == ".parquet":
        rows = _parquet_rows(file, content)
    elif kind in readers:
        rows = readers[kind](file, _decode(file, content), bad)
    else:
        fault = f"the format {kind} is not known" if kind else "the name has no suffix"
        raise DataError(f"{file}: {fault}; use one of {', '.join(FORMATS)}")
    yield from rows


def _content(file: Path) -> bytes:
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix.lower() == ".gz" else content
    except FileNotFoundError as error:
        raise DataError(
            f"{file}: there is no such file (working directory {Path.cwd()}); check data.init_args.path"
        ) from error
    except IsADirectoryError as error:
        raise DataError(f"{file} is a folder; name a file in it ({', '.join(FORMATS)})") from error
    except OSError as error:  # includes gzip.BadGzipFile
        raise DataError(
            f"{file} cannot be read: {error.strerror or error}; check the file and its permissions"
        ) from error
    except (EOFError, zlib.error) as error:
        raise DataError(f"{file} is not a complete gzip file: {error}; download it again") from error
    if not content.strip():
        raise DataError(f"{file} is empty; give a file with at least one row")
    return content


def _decode(file: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}, line {line}: byte {error.start} is not valid UTF-8; save the file as UTF-8"
        ) from error


def _json_rows(file: Path, text: str, bad: OnBadRow) -> Iterator[Row]:
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); "
            "fix it, or rename the file to .jsonl if each line is an object"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: the JSON cannot be read ({error}); fix the file") from error
    for number, row in enumerate(_list_in(content, file), start=1):
        try:
            yield _object_row(row, f"{file}, row {number}")
        except DataError as error:
            bad(error)


def _list_in(content: object, file: Path) -> list[object]:
    """The rows of a JSON file: a list, or the one list in an object, such as ``{"data": […]}``."""
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a JSON {type(content).__name__}, not a list; give a list of objects")
    lists = {name: value for name, value in content.items() if isinstance(value, list)}
    if len(lists) == 1 and format_of(content) is None:
        return next(iter(lists.values()))
    found = ", ".join(map(repr, content)) or "nothing"
    raise DataError(
        f"{file} holds a JSON object with {found}, not a list; give a list of objects, or an object with one"
    )


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; ValueError if a key is repeated, of which ``json`` would keep the last."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = repeated([key for key, _ in pairs])
        raise ValueError(f"the key {twice[0]!r} occurs twice in an object")
    return made


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def _jsonl_rows(file: Path, text: str, bad: OnBadRow) -> Iterator[Row]:
    if text.lstrip().startswith("[") and text.rstrip().endswith("]"):
        raise DataError(f"{file} holds one JSON list, not an object on each line; rename the file to .json")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield line_row(line, f"{file}, line {number}")
            except DataError as error:
                bad(error)


def line_row(line: str, where: str) -> Row:
    """The row in a line of a .jsonl file; :class:`DataError` if the line is not a JSON object."""
    try:
        row = json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}, column {error.colno}: not valid JSON ({error.msg}); the line may be cut short, fix or delete it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: the JSON cannot be read ({error}); fix or delete the line") from error
    return _object_row(row, where)


def _object_row(row: object, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}, not an object; write it as {{field: value}}")
    return Row(row, where)


def _csv_rows(file: Path, text: str, bad: OnBadRow) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=_delimiter(file, text))
    try:
        if twice := repeated(filter(None, reader.fieldnames or ())):
            raise DataError(f"{file}: the column {twice[0]!r} occurs twice; rename or delete one of the two")
        for number, row in enumerate(reader, start=1):
            where, columns = f"{file}, row {number}", len(reader.fieldnames or ())
            if None not in row:
                cells = {name: cell for name, cell in row.items() if cell is not None}
                yield Row(cells, where + f" ({len(cells)} of {columns} cells)" * (len(cells) < columns))
                continue
            bad(
                DataError(
                    f"{where}: more cells than the {columns} columns of the header; "
                    "put cells that contain commas in double quotes"
                )
            )
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: not valid CSV ({error}); fix the quotes") from error


def _delimiter(file: Path, text: str) -> str:
    """What separates cells: tabs in .tsv files; else a comma, or a semicolon where the header has no comma."""
    if _format(file) == ".tsv":
        return "\t"
    header = text.split("\n", 1)[0]
    return ";" if ";" in header and "," not in header else ","


def _parquet_rows(file: Path, content: bytes) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        if twice := repeated(parquet.read_schema(io.BytesIO(content)).names):
            raise DataError(f"{file}: the column {twice[0]!r} occurs twice; rename or delete one of the two")
        rows = parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file} is not a complete parquet file: {error}; download it again") from error
    return _numbered(rows, str(file))


def _read_hub(name: str, split: str, config: str | None) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(name, *([config] if config else []), split=split)
    except Exception as error:  # the hub client raises a dozen unrelated classes
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name!r} is not a local file (working directory {Path.cwd()}) and could not be loaded from the hub: "
            f"{type(error).__name__}: {reason}; give the path of a local file ({', '.join(FORMATS)}), "
            "or check the name and the network"
        ) from error
    yield from _numbered(rows, name if split == "train" else f"{name} ({split})")


def _numbered(rows: Iterable[Mapping[str, object]], name: str) -> Iterator[Row]:
    return (Row(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1))
