"""Workers: where the tasks of a generation run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import lightning as L

from lora_gan.evolution.tasks import MemberModule, Task

Done = TypeVar("Done")


class Workers(ABC):
    """Runs tasks; the results do not depend on the worker nor on the order."""

    @abstractmethod
    def run(self, module: MemberModule, tasks: Sequence[Task[Done]]) -> list[Done]:
        """The result of each task, in order.

        Args:
            module: The module of this process.
            tasks: The tasks.
        """

    def close(self) -> None:  # noqa: B027 — most have nothing to release
        """Release resources; the next run acquires them again."""


class InProcess(Workers):
    """Runs the tasks in this process, one after the other."""

    def run(self, module: MemberModule, tasks: Sequence[Task[Done]]) -> list[Done]:
        return [task(module) for task in tasks]


class CloseWorkers(L.Callback):
    """Closes the workers when a run ends, also after an error."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.workers.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.workers.close()
