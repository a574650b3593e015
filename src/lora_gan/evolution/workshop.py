"""Where errands are done in another process: it builds a module of the same settings, and the errand brings the rest.

What goes between the processes are bytes.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_gan.evolution.members import Errand, MemberModule
from lora_gan.steps import Steps

BROUGHT = ("generator_adapter", "discriminator_adapter")  # settings of weights, which errands bring


class Worker(MemberModule):
    """Does errands: each is a step of its trainer, and so has its number format, its optimizers and its hooks."""

    def training_step(self, errand: Errand[Any], batch_idx: int) -> dict[str, Any]:  # type: ignore[override]
        with self._counted_round():
            return {"done": errand(self)}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch

    def _check_baseline(self) -> None:
        """The callbacks are where the run is, and so is this check."""

    @property
    def _last_good(self) -> str:
        return "see the run's folder"


@dataclass(frozen=True)
class Recipe:
    """What a worker is made of."""

    settings: Mapping[str, Any]  # of the module
    device: str  # "cpu" or "cuda"
    precision: Any  # of the run's trainer
    threads: int  # of torch; sums depend on it in their last bits

    @classmethod
    def like(cls, module: MemberModule, device: str) -> Recipe:
        """That of a module in a run, to compute on ``device``."""
        settings = {name: value for name, value in module.settings.items() if name not in BROUGHT}
        return cls(settings, device, module.trainer.precision, torch.get_num_threads())


class Workshop:
    """A worker in its own process.

    Args:
        recipe: A :class:`Recipe`, packed.
    """

    def __init__(self, recipe: bytes) -> None:
        self._recipe = recipe

    def open(self) -> None:
        """Build the worker.

        Raises:
            LoraGANError: What the settings name is not to be had here.
        """
        recipe: Recipe = unpacked(self._recipe, "cpu")
        torch.set_num_threads(recipe.threads)
        self._steps = Steps(Worker(**recipe.settings), torch.device(recipe.device), recipe.precision)

    def do(self, errand: bytes, rounds: int) -> bytes:
        """The packed result of a packed errand.

        Args:
            errand: What is to be done.
            rounds: How many the run has played, for messages.
        """
        self._steps.rounds = rounds
        return packed(self._steps.play(unpacked(errand, self._steps.module.device))["done"])


def packed(value: object, pickler: Any = pickle) -> bytes:
    """The value as bytes, whichever devices its tensors are on."""
    file = io.BytesIO()
    torch.save(value, file, pickle_module=pickler)
    return file.getvalue()


def unpacked(data: bytes, device: torch.device | str) -> Any:
    """What was packed, its tensors on ``device``."""
    return torch.load(io.BytesIO(data), map_location=device, weights_only=False)
