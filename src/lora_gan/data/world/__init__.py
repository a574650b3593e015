"""A small world of true facts: countries, elements, animals, words, translations, arithmetic and order.

The facts stand in the ``.tsv`` tables beside this file and their wording in ``relations.yaml``, whose head explains
its keys. This module only joins the two: it knows no fact and no sentence.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

NEGATIVES = 4
SHORT = ("{object}.", "{object}", "It is {object}.")

Row = Mapping[str, str]


@dataclass(frozen=True)
class Fact:
    """One true fact and the ways to say it, to ask for it and to get it wrong."""

    relation: str
    """Name of the relation, ``"capital"``."""
    subject: str
    """What is asked about, ``"France"``; a country keeps its article, ``"the Netherlands"``."""
    object: str
    """What is asked for, ``"Paris"``."""
    statements: tuple[str, ...]
    """Sentences that state the fact; the first is the answer."""
    cues: tuple[str, ...]
    """The statements that end with the object, cut off before it, without trailing space."""
    questions: tuple[str, ...]
    """Phrasings of the question."""
    answer: str
    """The whole-sentence answer."""
    references: tuple[str, ...]
    """Every accepted answer, the answer first."""
    negatives: tuple[str, ...]
    """Answers with a wrong object of the same relation."""
    group: str
    """What must not cross a split."""


@dataclass(frozen=True)
class Relation:
    """One entry of ``relations.yaml``."""

    name: str
    table: str
    subject: str
    object: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    short: tuple[str, ...] = SHORT
    where: Row | None = None
    words: Row | None = None
    symmetric: bool = False
    field: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Entry:
    """One row of a table seen through a relation: a fact before it is put into words."""

    subject: str
    object: str
    also: tuple[str, ...]
    avoid: tuple[str, ...]
    field: str | None
    group: str
    words: Row


@cache
def facts() -> tuple[Fact, ...]:
    """All facts, in the order of ``relations.yaml`` and of the tables."""
    return tuple(fact for relation in relations() for fact in facts_of(relation))


@cache
def relations() -> tuple[Relation, ...]:
    """The relations of ``relations.yaml``."""
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(
        resources.files(__name__).joinpath("relations.yaml").read_text(encoding="utf-8")
    )
    result = []
    for name, keys in loaded.items():
        lists: dict[str, Any] = {
            key: tuple(keys.pop(key)) for key in ("statements", "questions", "short") if key in keys
        }
        result.append(Relation(name=name, words=keys.pop("with", None), **lists, **keys))
    return tuple(result)


@cache
def table(name: str) -> tuple[Row, ...]:
    """The rows of a table, each a mapping from column to cell."""
    text = resources.files(__name__).joinpath(f"{name}.tsv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


def entries(relation: Relation) -> Iterator[Entry]:
    """The entries of a relation; a symmetric one gives every row in both directions."""
    directions = [(relation.subject, relation.object)]
    if relation.symmetric:
        directions.append((relation.object, relation.subject))
    for row in table(relation.table):
        if any(row[column] != value for column, value in (relation.where or {}).items()):
            continue
        for subject, object_ in directions:
            if row[subject] and row[object_]:
                yield entry(relation, row, subject, object_)


def entry(relation: Relation, row: Row, subject: str, object_: str) -> Entry:
    """One row as an entry whose subject and object stand in the given columns."""
    words = {**row, **(relation.words or {}), "subject": row[subject], "object": row[object_]}
    group = f"{relation.name}:{row[subject]}"
    if relation.symmetric:
        group = f"{relation.name}:{'-'.join(sorted((row[subject], row[object_])))}"
    if relation.group is not None:
        group = relation.group.format_map(words)
    also, avoid = (tuple(filter(None, row.get(f"{object_}_{kind}", "").split("/"))) for kind in ("also", "avoid"))
    field = None if relation.field is None else row[relation.field]
    return Entry(row[subject], row[object_], also, avoid, field, group, words)


def facts_of(relation: Relation) -> Iterator[Fact]:
    """The facts of a relation in words."""
    rows = tuple(entries(relation))
    answer = relation.statements[0]
    for row in rows:
        statements = say(relation.statements, row)
        answers = [*statements, *say(relation.short, row)]
        for other in row.also:
            answers += say((answer, *relation.short), row, other)
        yield Fact(
            relation=relation.name,
            subject=row.subject,
            object=row.object,
            statements=statements,
            cues=tuple(
                text.removesuffix(f"{row.object}.").rstrip()
                for template, text in zip(relation.statements, statements, strict=True)
                if template.endswith("{object}.")
            ),
            questions=say(relation.questions, row),
            answer=statements[0],
            references=tuple(dict.fromkeys(answers)),
            negatives=tuple(
                text for wrong in wrong_objects(relation, row, rows) for text in say((answer,), row, wrong)
            ),
            group=row.group,
        )


def say(templates: Iterable[str], row: Entry, object_: str | None = None) -> tuple[str, ...]:
    """The templates with the words of the entry, or with another object; a sentence begins with a capital."""
    words = row.words if object_ is None else {**row.words, "object": object_}
    return tuple(
        text[:1].upper() + text[1:] if text.endswith((".", "?")) else text
        for text in (template.format_map(words) for template in templates)
    )


def wrong_objects(relation: Relation, row: Entry, rows: Iterable[Entry]) -> list[str]:
    """A fixed choice of objects of the relation that are wrong for this subject, by a hash of all three names."""

    def draw(candidate: str) -> str:
        return hashlib.sha256(f"{relation.name}\t{row.subject}\t{candidate}".encode()).hexdigest()

    others = {other.object for other in rows if other.field is None or other.field != row.field}
    wrong = sorted(others - {row.subject, row.object, *row.also, *row.avoid}, key=draw)[:NEGATIVES]
    if len(wrong) < NEGATIVES:
        raise ValueError(
            f"{relation.name} of {row.subject} has only {len(wrong)} wrong objects, needs {NEGATIVES}; add rows to "
            f"{relation.table}.tsv or shorten its _avoid cell"
        )
    return wrong
