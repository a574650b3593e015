"""The small world that comes with the package."""

from __future__ import annotations

from collections.abc import Iterator

from lora_gan.data.source import Source
from lora_gan.data.templates import fill
from lora_gan.data.world import Fact, facts
from lora_gan.types import Example, Message, Negative


class BuiltinWorld(Source):
    """Questions about the built-in world, each with its answer and with wrong ones; needs no download."""

    def __init__(self, template: str = "### Prompt:\n{question}\n\n### Response:\n") -> None:
        """
        Args:
            template: The prompt. It ends where the answer begins.
        """
        super().__init__()
        fill(template, question="")
        self.template = template

    @property
    def name(self) -> str:
        return "builtin"

    def rows(self) -> Iterator[Example]:
        """Every fact in every phrasing of its question."""
        for fact in facts():
            for phrasing, question in enumerate(fact.questions):
                yield self._example(fact, question, phrasing)

    def _example(self, fact: Fact, question: str, phrasing: int) -> Example:
        return Example(
            prompt=fill(self.template, question=question),
            target=fact.answer,
            references=fact.references,
            negatives=tuple(Negative(text, kind="wrong_object") for text in fact.negatives),
            group=fact.group,
            source=self.name,
            messages=(Message("user", question),),
            meta={
                "item": f"{fact.relation} | {fact.subject} | {fact.object}",
                "relation": fact.relation,
                "phrasing": str(phrasing),
            },
        )
