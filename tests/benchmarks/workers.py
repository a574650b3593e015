"""Generations with two worker processes against the same in one process, and the bytes that travel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from lora_gan.coefficients import Coefficients
from lora_gan.data.datamodule import collate
from lora_gan.evolution import EvolutionModule, EvolutionStrategy, RayWorkers
from lora_gan.evolution.evaluating import EvaluatingModule
from lora_gan.evolution.remote import to_bytes
from lora_gan.evolution.tasks import MemberModule, Task
from lora_gan.evolution.workers import Done, InProcess, Workers
from lora_gan.generator import GeneratorSettings
from lora_gan.rewards import FunctionReward
from lora_gan.sampling import Sampling
from tests.helpers.steps import trainer

from .setting import LORA, Size, make_items
from .timing import Comparison

WORKERS = 2
GENETIC: tuple[type[EvaluatingModule], dict[str, Any]] = (
    EvolutionModule,
    {"population": 8, "elites": 1, "refined": 2, "refinement_steps": 8, "members_at_once": 4},
)
STRATEGY: tuple[type[EvaluatingModule], dict[str, Any]] = (EvolutionStrategy, {"population": 24, "members_at_once": 6})
KINDS = {"genetic algorithm, 8 members, 2 refined": GENETIC, "evolution strategy, 24 members": STRATEGY}


class Traffic(InProcess):
    """Runs the tasks in this process and counts the bytes that they and their results would be for a worker."""

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0

    def run(self, module: MemberModule, tasks: Sequence[Task[Done]]) -> list[Done]:
        self.sent += sum(len(to_bytes(task)) for task in tasks)
        done = super().run(module, tasks)
        self.received += sum(len(to_bytes(result)) for result in done)
        return done


class Generations(L.Callback):
    """Wall time of each generation."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._begun = perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds.append(perf_counter() - self._begun)


def distinct(response: str, target: str) -> float:
    """Share of different words."""
    words = response.split()
    return len(set(words)) / max(len(words), 1)


def run(kind: str, size: Size, folder: Path, workers: Workers, generations: int) -> tuple[float, ...]:
    """Seconds of each generation after the first, in which workers start."""
    size = replace(size, prompts=4 * size.prompts)
    cls, settings = KINDS[kind]
    module = cls(
        **settings,
        workers=workers,
        base=str(folder),
        num_generations=2,
        sampling=Sampling(max_new_tokens=size.completion_tokens),
        rewards=[FunctionReward(distinct)],
        coefficients=Coefficients(discriminator_updates=0),
        generator=GeneratorSettings(lora=LORA),
    )
    batch = collate(make_items(size, module.backbone.tokenizer))  # type: ignore[arg-type]
    timer = Generations()
    trainer(generations + 1, timer).fit(module, DataLoader([batch], batch_size=None))
    return tuple(timer.seconds[1:])


def compare_workers(size: Size, folder: Path, repeats: int) -> Iterator[Comparison]:
    """The same generations by workers and by one process, for the genetic algorithm and for the strategy."""
    for kind in KINDS:
        traffic = Traffic()
        run(kind, size, folder, traffic, 1)
        sent, received = (count / 2e6 for count in (traffic.sent, traffic.received))
        what = f"{kind}, {WORKERS} workers, {sent:.2f} MB to them and {received:.2f} MB back"
        other, ours = (run(kind, size, folder, workers, repeats) for workers in (InProcess(), RayWorkers(WORKERS)))
        yield Comparison(size.name, what, "one process", ours, other, 1.8)
