"""Built-in data: questions about a small world of facts; needs no download."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from random import Random

from lora_gan.data.source import Source
from lora_gan.data.splits import assign_splits, one_wording_each
from lora_gan.data.templates import default_template, fill
from lora_gan.data.world import Fact, facts
from lora_gan.data.world import relations as world_relations
from lora_gan.errors import LoraGANError
from lora_gan.types import Example, Negative


class BuiltinWorld(Source):
    """Questions about the built-in world with correct and wrong answers."""

    def __init__(self, template: str = default_template("{question}"), relations: list[str] | None = None) -> None:
        """
        Args:
            template: Prompt; it ends where the completion begins.
            relations: Relations whose facts are asked for, such as ``capital``; by default all.

        Raises:
            DataError: The template names an unknown field.
            LoraGANError: There is no relation of that name.
        """
        super().__init__()
        fill(template, question="")
        self.template = template
        if relations is not None:
            known = [relation.name for relation in world_relations()]
            if not relations or set(relations) - set(known):
                raise LoraGANError(
                    f"relations must be some of {', '.join(known)}; got {', '.join(relations) or 'none'}"
                )
        self.relations = relations

    @property
    def name(self) -> str:
        return "builtin"

    @property
    def prompt_templates(self) -> tuple[str, ...]:
        return (self.template,)

    def probes(self) -> Sequence[tuple[str, str]]:
        return [(fact.cues[0], fact.object) for fact in facts()]

    def rows(self) -> Iterator[Example]:
        """Every fact in every phrasing of its question."""
        for fact in self._facts():
            for phrasing, question in enumerate(fact.questions):
                yield self._example(fact, question, phrasing)

    def _facts(self) -> Iterator[Fact]:
        return (fact for fact in facts() if self.relations is None or fact.relation in self.relations)

    def _example(self, fact: Fact, question: str, phrasing: int) -> Example:
        return self.make(
            self.template,
            {"question": question},
            target=fact.answer,
            references=fact.references,
            negatives=tuple(Negative(text, kind="wrong_object") for text in fact.negatives),
            group=fact.group,
            item=f"{fact.relation} | {fact.subject} | {fact.object}",
            meta={"relation": fact.relation, "phrasing": str(phrasing)},
        )


def stream(validation: int = 64) -> Iterator[dict[str, str]]:
    """Endless rows of questions, to try online learning.

    The first rows are about facts of the validation split, all later rows about facts of the training split.

    Args:
        validation: Largest number of rows about the validation split.
    """
    placed = assign_splits(list(BuiltinWorld().rows()), {"validation": 0.1, "test": 0.2}, seed=0)
    held_out, asked = placed["validation"].examples, placed["train"].examples
    chosen = one_wording_each(held_out, seed=0)[:validation]
    order = Random(0)
    yield from (_row(held_out[i]) for i in chosen)
    while True:
        yield from (_row(example) for example in order.sample(asked, len(asked)))


def _row(example: Example) -> dict[str, str]:
    return {"instruction": example.messages[0].content, "input": "", "output": example.target}


def main() -> None:
    """Print :func:`stream` as JSON lines until the reader closes the pipe."""
    try:
        for row in stream():
            print(json.dumps(row, ensure_ascii=False), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
