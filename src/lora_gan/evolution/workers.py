"""Who does the errands of a generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import lightning as L

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

    def close(self) -> None:  # noqa: B027 — most have nothing to give back
        """Give back what was taken for a run; the next one takes it again."""


class Here(Workers):
    """This process, one errand after the other."""

    def run(self, module: MemberModule, errands: Sequence[Errand[Done]]) -> list[Done]:
        return [errand(module) for errand in errands]


class EndOfWork(L.Callback):
    """Closes the workers when a run ends, by an error, too."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.workers.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.workers.close()
