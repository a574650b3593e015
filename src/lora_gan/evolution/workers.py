"""Who does the errands of a generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

from lora_gan.evolution.members import Errand, MemberModule

Done = TypeVar("Done")


class Workers(ABC):
    """Does errands; the results do not depend on who does them, nor on the order."""

    @abstractmethod
    def run(self, module: MemberModule, errands: Sequence[Errand[Done]]) -> list[Done]:
        """The result of each.

        Args:
            module: That of this process.
            errands: What is to be done.
        """


class Here(Workers):
    """This process, one errand after the other."""

    def run(self, module: MemberModule, errands: Sequence[Errand[Done]]) -> list[Done]:
        return [errand(module) for errand in errands]
