"""Errands that are done elsewhere: what a worker needs, and that its results are those of this process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from generations import everything, same_runs
from rounds import fit
from torch import Tensor
from torch.optim import SGD

from lora_gan.adapters import save_adapter
from lora_gan.backbone import GENERATOR, Backbone
from lora_gan.callbacks import MovingAverageBaseline
from lora_gan.errors import LoraGANError, NonFiniteError
from lora_gan.evolution import RayWorkers
from lora_gan.evolution.members import Errand, MemberModule
from lora_gan.evolution.workers import Done, Here, Workers
from lora_gan.evolution.workshop import Recipe, Workshop, packed, unpacked
from lora_gan.types import PromptBatch


class Elsewhere(Workers):
    """A worker as another process has it, in this one: all that it gets are bytes."""

    def __init__(self) -> None:
        self.closed = 0
        self.workshop: Workshop | None = None

    def run(self, module: MemberModule, errands: Sequence[Errand[Done]]) -> list[Done]:
        if self.workshop is None:
            self.workshop = Workshop(packed(Recipe.like(module, "cpu")))
            self.workshop.open()
        rounds = module.trainer.global_step
        return [unpacked(self.workshop.do(packed(errand), rounds), module.device) for errand in errands]

    def close(self) -> None:
        self.closed += 1


def test_a_worker_elsewhere_does_the_same(bases: dict[str, str], batch: PromptBatch) -> None:
    elsewhere = Elsewhere()
    found = []
    for workers in (Here(), elsewhere):
        module = everything(bases["gpt2"], workers=workers)
        recorder, _ = fit(module, [batch], 3, MovingAverageBaseline())
        found.append((module, recorder))
    same_runs(*found)
    assert elsewhere.closed == 1


def test_in_another_number_format(bases: dict[str, str], batch: PromptBatch) -> None:
    found = []
    for workers in (Here(), Elsewhere()):
        module = everything(bases["gpt2"], workers=workers)
        recorder, _ = fit(module, [batch], 2, MovingAverageBaseline(), precision="bf16-mixed")
        found.append((module, recorder))
    same_runs(*found)


def test_a_worker_needs_no_adapters(
    bases: dict[str, str], make_backbone: Callable[..., Backbone], batch: PromptBatch, tmp_path: Path
) -> None:
    """Weights come with the errands: files of this machine need not be on others."""
    folder = tmp_path / "generator"
    save_adapter(make_backbone(), GENERATOR, folder)
    module = everything(bases["gpt2"], generator_adapter=str(folder), workers=Elsewhere())
    shutil.rmtree(folder)
    fit(module, [batch], 1, MovingAverageBaseline())


def test_what_is_packed_is_the_same_elsewhere() -> None:
    told: dict[str, Any] = {"weights": torch.randn(3, 4).T, "learning": {"step": torch.tensor(2.0)}, "k": (1, "a")}
    again = unpacked(packed(told), "cpu")
    assert torch.equal(again["weights"], told["weights"])
    assert again["weights"].stride() == told["weights"].stride(), "products of other strides have other last bits"
    assert again["learning"] == told["learning"] and again["k"] == told["k"]
    again = unpacked(packed(told), "meta")
    assert isinstance(again["weights"], Tensor) and again["weights"].device.type == "meta"


class Ask:
    """An errand that tells how many rounds the worker thinks the run has played."""

    def __call__(self, module: MemberModule) -> int:
        return module.trainer.global_step


def test_messages_name_the_round_of_the_run(bases: dict[str, str], batch: PromptBatch) -> None:
    elsewhere = Elsewhere()
    fit(everything(bases["gpt2"], workers=elsewhere), [batch], 1, MovingAverageBaseline())
    assert elsewhere.workshop is not None
    assert [unpacked(elsewhere.workshop.do(packed(Ask()), rounds), "cpu") for rounds in (7, 3)] == [7, 3]


def wild(parameters: Iterable[Tensor]) -> SGD:
    return SGD(parameters, lr=1e30)


def test_a_loss_that_is_no_number_ends_the_run(bases: dict[str, str], batch: PromptBatch) -> None:
    supervised = {"policy_weight": 0.0, "adversarial_weight": 0.0, "discriminator_updates": 0}
    module = everything(bases["gpt2"], generator_optimizer=wild, workers=Elsewhere(), **supervised)
    with pytest.raises(NonFiniteError, match=r"in round 0; the step was not taken.* see the run's folder"):
        fit(module, [batch], 1, MovingAverageBaseline())


def test_workers_are_closed_after_an_error(bases: dict[str, str], batch: PromptBatch) -> None:
    workers = Elsewhere()
    module = everything(bases["gpt2"], workers=workers)
    with pytest.raises(LoraGANError, match="MovingAverageBaseline"):
        fit(module, [batch], 1)
    assert workers.closed == 1


class LatePolicy(L.Callback):
    """The policy gradient sets in after the run has begun."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.knobs.set(policy_weight=1.0)


def test_the_baseline_must_be_kept_where_the_run_is(bases: dict[str, str], batch: PromptBatch) -> None:
    module = everything(bases["gpt2"], policy_weight=0.0, workers=Elsewhere())
    with pytest.raises(LoraGANError, match="needs a baseline that somebody keeps"):
        fit(module, [batch], 1, LatePolicy())


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LoraGANError, match="RayWorkers needs Ray: pip install"):
        RayWorkers()


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"gpus_per_worker": -1.0}, {"retries": -1}])
def test_settings_of_ray_workers(wrong: dict[str, Any]) -> None:
    with pytest.raises(LoraGANError, match="need workers >= 1"):
        RayWorkers(**wrong)
