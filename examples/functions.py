"""Writes functions.jsonl: small functions to write, a fifth of them with the code, all with tests.

Run: python examples/functions.py
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

OPERATIONS = {
    "+": (operator.add, ("adds {n} to {x}", "increases {x} by {n}", "returns {x} plus {n}", "gives {n} more than {x}")),
    "-": (
        operator.sub,
        ("subtracts {n} from {x}", "decreases {x} by {n}", "returns {x} minus {n}", "takes {n} off {x}"),
    ),
    "*": (operator.mul, ("multiplies {x} by {n}", "scales {x} by {n}", "returns {x} times {n}", "gives {n} times {x}")),
}
NUMBERS = range(2, 10)
ARGUMENTS = range(10, 60)  # with these no two of the functions are the same
WITH_CODE = 1 / 5


def rows(seed: int = 0) -> Iterator[dict[str, Any]]:
    """Every wording of every function once, for three names of its argument."""
    random = Random(seed)
    for sign, (operation, wordings) in OPERATIONS.items():
        for n in NUMBERS:
            for x in ("x", "n", "a"):
                for wording in wordings:
                    code = f"def f({x}): return {x} {sign} {n}"
                    tests = [f"assert f({y}) == {operation(y, n)}" for y in random.sample(ARGUMENTS, 3)]
                    yield {
                        "prompt": f"Write a function f({x}) that {wording.format(x=x, n=n)}.",
                        "completion": code if random.random() < WITH_CODE else None,
                        "tests": tests,
                    }


if __name__ == "__main__":
    path = Path(__file__).with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
