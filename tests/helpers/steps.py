"""Steps in a real trainer on a tiny model, for the tests of every part that takes part in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from lora_gan.module import LoraGANModule
from lora_gan.step_callback import OUTPUT
from lora_gan.types import PromptBatch, StepOutput

Build = Callable[..., LoraGANModule]


def share_of_a(response: str, target: str) -> float:
    return response.count("a") / max(len(response), 1)


def half(**settings: Any) -> MixedPrecision:
    """16-mixed on a CPU, with a scaler of these settings; Lightning's own would be for CUDA."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **settings))


class Recorder(L.Callback):
    """Keeps what each step reported and the backbone's weights after it."""

    def __init__(self) -> None:
        self.reports: list[dict[str, float]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.rates: list[list[float]] = []
        self.outputs: list[StepOutput] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        output: StepOutput = outputs[OUTPUT]
        self.outputs.append(output)
        self.reports.append({name: float(value) for name, value in output.metrics.items()})
        self.weights.append(state(pl_module))
        self.rates.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])


def state(module: LoraGANModule) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.backbone.state_dict().items()}


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def trainer(steps: int, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    quiet = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        callbacks=list(callbacks),
        **{**quiet, **settings},
    )


def fit(
    module: LoraGANModule, batches: Sequence[PromptBatch], steps: int, *callbacks: L.Callback, **settings: Any
) -> tuple[Recorder, L.Trainer]:
    recorder = Recorder()
    ckpt_path = settings.pop("ckpt_path", None)
    torch.manual_seed(5)
    runner = trainer(steps, recorder, *callbacks, **settings)
    runner.fit(module, DataLoader(list(batches), batch_size=None), ckpt_path=ckpt_path, weights_only=True)
    return recorder, runner


def differing(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """Names of the values in two checkpoints that are not bit for bit the same."""
    if isinstance(one, dict) and isinstance(other, dict):
        if set(one) != set(other):
            yield f"{name}: {set(one) ^ set(other)}"
        for key in set(one) & set(other):
            yield from differing(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differing(*pair, f"{name}[{index}]")
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield f"{name}: {one} {other}"
    elif repr(one) != repr(other):
        yield f"{name}: {one!r} {other!r}"
