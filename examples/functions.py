"""Writes functions.jsonl: small functions to write, some with the code, all with tests.

Run: python examples/functions.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

Step = tuple[str, str, Callable[[int], int]]  # what is asked, the code with {} for what it is done to, what it does
NUMBERS = range(2, 10)
WORKED = 60  # rows with the code; the others have the tests alone
ROWS = 520
ARGUMENTS = range(-9, 20)


def steps() -> Iterator[Step]:
    for n in NUMBERS:
        yield f"adds {n}", f"{{}} + {n}", lambda x, n=n: x + n  # type: ignore[misc]
        yield f"subtracts {n}", f"{{}} - {n}", lambda x, n=n: x - n  # type: ignore[misc]
        yield f"multiplies by {n}", f"{{}} * {n}", lambda x, n=n: x * n  # type: ignore[misc]


def rows(seed: int = 0) -> Iterator[dict[str, object]]:
    """Functions of two steps, each pair of steps at most once."""
    random = Random(seed)
    pairs = [(first, second) for first in steps() for second in steps()]
    for number, (first, second) in enumerate(random.sample(pairs, ROWS)):
        prompt = f"Write a function f(x) that {first[0]} and then {second[0]}."
        code = f"def f(x):\n    x = {first[1].format('x')}\n    return {second[1].format('x')}"
        tests = [f"assert f({x}) == {second[2](first[2](x))}" for x in random.sample(ARGUMENTS, 3)]
        yield {"prompt": prompt, "completion": code if number < WORKED else None, "tests": tests}


if __name__ == "__main__":
    path = Path(__file__).with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
