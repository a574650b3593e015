"""Writes ratings.jsonl: made ratings of answers to questions about the built-in world, as the page writes them.

The raters prefer right answers to wrong ones, and of two right ones the one that only names the thing that is asked
for. Most answers that they saw are sentences, of which they say whether they are right; of some questions they saw two
answers and chose. Each question is about another fact.

Run: python examples/ratings.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from random import Random
from typing import Any

from lora_gan.data.world import Fact, facts

FACTS = 900
CHOICES = 0.4  # share of the questions with two answers
BEGIN = datetime(2026, 1, 1, tzinfo=timezone.utc)
Rating = dict[str, Any]


def rows(seed: int = 0) -> Iterator[Rating]:
    """The ratings in the order of their times."""
    random = Random(seed)
    for number, fact in enumerate(random.sample(facts(), FACTS)):
        question = random.choice(fact.questions)
        time = (BEGIN + timedelta(minutes=number)).isoformat()
        for rating in _choice(fact, random) if random.random() < CHOICES else _singles(fact, random):
            yield {"prompt": question, **rating, "time": time, "run": "made"}


def only_named(completions: Sequence[str], targets: Sequence[str]) -> float:
    """Share of completions that name what is asked for and say nothing else, as the raters like it.

    A target is the right name, or a sentence that ends in it.
    """
    pairs = zip(map(_plain, completions), map(_plain, targets), strict=True)
    named = [bool(said) and len(said.split()) <= 3 and f" {target}".endswith(f" {said}") for said, target in pairs]
    return sum(named) / max(len(named), 1)


def _choice(fact: Fact, random: Random) -> Iterator[Rating]:
    """One rating of two answers: a name over a sentence, or over a wrong name."""
    worse = fact.answer if random.random() < 2 / 3 else _wrong_name(fact, random)
    yield {"chosen": _name(fact), "rejected": worse}


def _singles(fact: Fact, random: Random) -> Iterator[Rating]:
    """Ratings of one answer each: a right sentence, a wrong one, or both."""
    saw_right, saw_wrong = random.choice([(True, False)] * 4 + [(True, True)] * 2 + [(False, True)])
    if saw_right:
        yield {"completion": fact.answer, "label": True}
    if saw_wrong:
        yield {"completion": random.choice(fact.negatives), "label": False}


def _name(fact: Fact) -> str:
    return fact.references[len(fact.statements)]


def _wrong_name(fact: Fact, random: Random) -> str:
    others = [other for other in facts() if other.relation == fact.relation and other.object != fact.object]
    return random.choice(sorted({_name(other) for other in others} - {*fact.references}))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


if __name__ == "__main__":
    lines = [json.dumps(row, ensure_ascii=False) for row in rows()]
    Path(__file__).with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
