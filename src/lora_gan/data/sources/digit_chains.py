"""Built-in data: questions about digit chains, few with the work, the others with their final answer alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Literal

from lora_gan.data.digits import Chain, answer, draw, probe_facts, question, worked
from lora_gan.data.source import Source
from lora_gan.data.templates import default_template
from lora_gan.errors import LoraGANError
from lora_gan.types import Example

TEMPLATE = default_template("{question}")
TEST, VALIDATION = 300, 100  # questions
FIRST = 20_211  # seed of the questions


class DigitChains(Source):
    """Questions about chains of operations on digits, for the base ``digits``."""

    def __init__(
        self,
        worked: int = 24,
        answers: int = 200,
        target: Literal["none", "answer"] = "none",
        length: int = 4,
        seed: int = 0,
        prompts: int = 0,
        worked_length: int | None = None,
    ) -> None:
        """
        Args:
            worked: Training questions with the work as target; they are repeated so that they are half of the rows.
            answers: Training questions with a final answer alone; likewise repeated if they are fewer.
            target: What a question without work has as target: none, for a policy gradient, or the answer's sentence.
            length: Operations in a chain.
            seed: Of the training questions; those of validation and test are always the same.
            prompts: Training questions of which nothing is known. The others are repeated so that they are half of the
                rows.
            worked_length: Operations in a training question with the work; by default ``length``.

        Raises:
            LoraGANError: There is no training question, or a chain has no operation.
        """
        super().__init__()
        if worked < 0 or answers < 0 or worked + answers < 1:
            raise LoraGANError(f"worked and answers must be at least 0, and one of them 1; got {worked} and {answers}")
        worked_length = length if worked_length is None else worked_length
        if min(length, worked_length) < 1:
            raise LoraGANError(f"length and worked_length must be at least 1, got {length} and {worked_length}")
        if prompts < 0:
            raise LoraGANError(f"prompts must be at least 0, got {prompts}")
        self.worked, self.answers, self.target, self.length, self.seed = worked, answers, target, length, seed
        self.prompts, self.worked_length = prompts, worked_length

    @property
    def name(self) -> str:
        return "digit_chains"

    @property
    def prompt_templates(self) -> tuple[str, ...]:
        return (TEMPLATE,)

    def probes(self) -> Sequence[tuple[str, str]]:
        return [(fact.cues[0], fact.object) for fact in probe_facts()]

    def rows(self) -> Iterator[Example]:
        self.forget_counts()
        held_out = _different(Random(FIRST), self.length, TEST + VALIDATION, set())
        for place, chain in enumerate(held_out):
            yield self._example(chain, worked(chain), "test" if place < TEST else "validation")
        random = Random(self.seed)
        with_work = _different(random, self.worked_length, self.worked, set(held_out))
        others = _different(random, self.length, self.answers + self.prompts, {*held_out, *with_work})
        shown = [self._example(chain, worked(chain), "train") for chain in with_work]
        known = [self._answered(chain) for chain in others[: self.answers]]
        known = _repeated(known, max(self.prompts / 2, len(shown)))
        yield from (*_repeated(shown, len(known)), *known)
        yield from (self._asked(chain) for chain in others[self.answers :])

    def _answered(self, chain: Chain) -> Example:
        return self._example(chain, answer(chain) if self.target == "answer" else "", "train")

    def _asked(self, chain: Chain) -> Example:
        asked = question(chain)
        return self.make(TEMPLATE, {"question": asked}, target="", group=asked, item=asked, split="train")

    def _example(self, chain: Chain, target: str, split: str) -> Example:
        asked = question(chain)
        known = {"answers": (str(chain.result),), "group": asked, "item": asked, "split": split}
        return self.make(TEMPLATE, {"question": asked}, target=target, references=(target,) * bool(target), **known)


def _repeated(examples: list[Example], wanted: float) -> list[Example]:
    """As often as comes closest to the wanted number of them, at least once."""
    return examples * max(1, round(wanted / max(1, len(examples))))


def _different(random: Random, length: int, count: int, taken: set[Chain]) -> list[Chain]:
    """Chains that differ from each other and from those that are taken."""
    found: dict[Chain, None] = {}
    for _ in range(1000 * count + 1):
        if len(found) == count:
            return list(found)
        chain = draw(random, length)
        if chain not in taken:
            found[chain] = None
    raise LoraGANError(f"there are no {count} different chains of length {length} beside the others; take fewer")
