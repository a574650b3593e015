"""World of digit chains: sums, differences and products of which the last digit is kept, one after another.

A question gives a digit and some operations; the answer needs the digits in between. Each step is one of 300 facts, but
the chains are so many that no answer can be known by heart, and multiplication makes them non-linear. The base for it,
``base: digits``, has read single steps, chains, and chains behind the operations they are made of, and no question.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from operator import add, mul, sub
from random import Random

from lora_gan.data.world import Fact

OPERATIONS = {"plus": add, "minus": sub, "times": mul}
FACTORS = (3, 7, 9)  # of products: times 1 changes nothing, and the others make several digits one
CLOSING = "The last digit is"
FILL = (
    *("work", "out", "the", "sum", "in", "order", "from", "left", "to", "right", "step", "by", "now", "then", "here"),
    *("it", "so", "we", "write", "list", "numbers", "below"),
)
ENDS = (":", ".", ";", "\n", "\n\n", ":\n", "\n\n###", ",")
STEP = re.compile(r"(\d+) (plus|minus|times) (\d+) is (\d+)\.")
DOCUMENTS = 250_000
PROBES = 100


@dataclass(frozen=True)
class Chain:
    """A digit and operations on it, from left to right."""

    start: int
    operations: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        """Such as "6 times 3 minus 6"."""
        return " ".join([str(self.start), *(f"{name} {number}" for name, number in self.operations)])

    @property
    def digits(self) -> list[int]:
        """The start, and the last digit after each operation."""
        return list(
            accumulate(self.operations, lambda digit, operation: last_digit(digit, *operation), initial=self.start)
        )

    @property
    def steps(self) -> list[str]:
        """Such as "6 times 3 is 8." and "8 minus 6 is 2."."""
        return [step(digit, *operation) for digit, operation in zip(self.digits, self.operations, strict=False)]

    @property
    def result(self) -> int:
        """The last digit."""
        return self.digits[-1]


def last_digit(digit: int, name: str, number: int) -> int:
    """Of a sum, a difference or a product, from 0 to 9."""
    return int(OPERATIONS[name](digit, number)) % 10


def step(digit: int, name: str, number: int) -> str:
    """A fact, such as "6 times 3 is 8."."""
    return f"{digit} {name} {number} is {last_digit(digit, name, number)}."


def valid_steps(text: str) -> float:
    """Share of the steps in a text that are right; 0 where it has none."""
    steps = STEP.findall(text)
    right = [last_digit(int(digit), name, int(number)) == int(found) for digit, name, number, found in steps]
    return sum(right) / len(right) if right else 0.0


def draw(random: Random, length: int) -> Chain:
    """A random chain of so many operations."""
    operations = []
    for _ in range(length):
        name = random.choice(list(OPERATIONS))
        operations.append((name, random.choice(FACTORS) if name == "times" else random.randint(1, 9)))
    return Chain(random.randint(0, 9), tuple(operations))


def question(chain: Chain) -> str:
    return f"What is {chain.text}?"


def answer(chain: Chain) -> str:
    """The final answer as a sentence."""
    return f"{CLOSING} {chain.result}."


def worked(chain: Chain) -> str:
    """The steps and the final answer."""
    return " ".join([*chain.steps, answer(chain)])


def facts(documents: int = DOCUMENTS, seed: int = 0) -> tuple[Fact, ...]:
    """The text for the pretraining, and single steps and chains to probe what was learned."""
    random = Random(seed)
    read = [_fact("text", _document(random)) for _ in range(documents)]
    return (*probe_facts(seed), *read)


def probe_facts(seed: int = 0) -> tuple[Fact, ...]:
    """Single steps and chains behind their operations."""
    return (*_single_steps(), *_chains_behind_their_list(Random(seed + 1)))


def _document(random: Random) -> str:
    kind = random.random()
    if kind < 0.65:
        return _list_and_chain(random)
    if kind < 0.75:
        return step(random.randint(0, 9), random.choice(list(OPERATIONS)), random.randint(0, 9))
    return _maybe_closed(random, draw(random, random.randint(1, 5)))


def _list_and_chain(random: Random) -> str:
    """A chain behind its operations, with words between the two, so that copying does not depend on the distance."""
    chain = draw(random, random.randint(1, 5))
    before, between = _filler(random, 8), _filler(random, 12)
    head = f"{before} " * bool(before) + chain.text + random.choice(ENDS)
    head += f" {between}{random.choice(ENDS)}" if between else ""
    return head + " " * (not head.endswith("\n")) + _maybe_closed(random, chain)


def _maybe_closed(random: Random, chain: Chain) -> str:
    return worked(chain) if random.random() < 0.5 else " ".join(chain.steps)


def _filler(random: Random, most: int) -> str:
    count = min(random.choice((0, 0, 1, 2, 3, 4, 6, 8, 10, 12)), most)
    return " ".join(random.choice(FILL) for _ in range(count))


def _single_steps() -> Iterator[Fact]:
    for name in OPERATIONS:
        for digit in range(10):
            for number in range(10):
                text = step(digit, name, number)
                yield _fact(name, cue=text[:-3], obj=text[-2:-1])


def _chains_behind_their_list(random: Random) -> Iterator[Fact]:
    for _ in range(PROBES):
        chain = draw(random, 4)
        cue, obj = f"the list {chain.text}.\n\nwork in order:", " ".join(chain.steps).removesuffix(".")
        yield _fact("chain", cue=cue, obj=obj, asked=question(chain))


def _fact(relation: str, text: str = "", cue: str = "", obj: str = "", asked: str = "") -> Fact:
    """A text to read, or a cue that is to be completed with ``obj``; questions are for the vocabulary alone."""
    return Fact(
        relation=relation,
        subject="",
        object=obj,
        statements=(text,) * bool(text),
        cues=(cue,) * bool(cue),
        questions=(asked,) * bool(asked),
        answer="",
        references=(),
        negatives=(),
        group="",
    )
