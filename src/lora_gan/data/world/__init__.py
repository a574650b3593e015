"""World of true facts: countries, elements, animals, words, translations, arithmetic and order.

The facts are in the ``.tsv`` tables of this folder and their wording in ``relations.yaml``, whose header explains its
keys. This module only combines the two.
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
    """A true fact with statements, questions, and correct and wrong answers."""

    relation: str
    """Name of the relation, such as ``"capital"``."""
    subject: str
    """Subject, such as ``"France"``; a country keeps its article, ``"the Netherlands"``."""
    object: str
    """Object, which the questions ask for, such as ``"Paris"``."""
    statements: tuple[str, ...]
    """Sentences that state the fact; the first is the answer."""
    cues: tuple[str, ...]
    """Statements that end with the object, cut before the object and without trailing space."""
    questions: tuple[str, ...]
    """Phrasings of the question."""
    answer: str
    """The whole-sentence answer."""
    references: tuple[str, ...]
    """All accepted answers, ``answer`` first."""
    negatives: tuple[str, ...]
    """Answers with a wrong object of the same relation."""
    group: str
    """Facts of the same group are in the same split."""


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
    """One row of a table read by a relation: a fact without its wording."""

    subject: str
    object: str
    also: tuple[str, ...]  # objects that are accepted too
    avoid: tuple[str, ...]  # objects that are neither accepted nor safely wrong
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
    """The entry of a row, with the given columns as subject and object."""
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
    """The templates filled with the words of ``row`` or with another object; sentences start with a capital."""
    words = row.words if object_ is None else {**row.words, "object": object_}
    return tuple(
        text[:1].upper() + text[1:] if text.endswith((".", "?")) else text
        for text in (template.format_map(words) for template in templates)
    )


def wrong_objects(relation: Relation, row: Entry, rows: Iterable[Entry]) -> list[str]:
    """NEGATIVES wrong objects for a subject, chosen by a hash of relation, subject and object.

    Raises:
        ValueError: The table has too few other objects.
    """

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
