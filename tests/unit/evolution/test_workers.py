"""Remote workers: what they need, and that their results equal those of the main process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from lora_gan.backbone import GENERATOR, Backbone
from lora_gan.callbacks import MovingAverageBaseline
from lora_gan.checkpointing.adapters import save_adapter
from lora_gan.errors import LoraGANError, NonFiniteError
from lora_gan.evolution import RayWorkers
from lora_gan.evolution.remote import WorkerActor, WorkerSpec, from_bytes, to_bytes
from lora_gan.evolution.tasks import Evaluations, MemberModule, Task
from lora_gan.evolution.workers import Done, InProcess, Workers
from lora_gan.rewards import FunctionReward
from lora_gan.types import PromptBatch, Rollout
from tests.helpers.generations import everything, same_runs
from tests.helpers.steps import fit


class BytesWorker(Workers):
    """A remote worker in this process: it exchanges nothing but bytes."""

    def __init__(self) -> None:
        self.closed = 0
        self.worker_actor: WorkerActor | None = None

    def run(self, module: MemberModule, tasks: Sequence[Task[Done]]) -> list[Done]:
        if self.worker_actor is None:
            self.worker_actor = WorkerActor(to_bytes(WorkerSpec.like(module, "cpu")))
            self.worker_actor.open()
        steps = module.trainer.global_step
        return [from_bytes(self.worker_actor.run(to_bytes(task), steps), module.device) for task in tasks]

    def close(self) -> None:
        self.closed += 1


def test_a_remote_worker_gives_the_same_results(bases: dict[str, str], batch: PromptBatch) -> None:
    remote = BytesWorker()
    found = []
    for workers in (InProcess(), remote):
        module = everything(bases["gpt2"], workers=workers)
        recorder, _ = fit(module, [batch], 3, MovingAverageBaseline())
        found.append((module, recorder))
    same_runs(*found)
    assert remote.closed == 1


class Results(InProcess):
    """Keeps the results of all tasks."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def run(self, module: MemberModule, tasks: Sequence[Task[Done]]) -> list[Done]:
        done = super().run(module, tasks)
        self.kept += done
        return done


def test_results_hold_only_what_is_used(bases: dict[str, str], batch: PromptBatch) -> None:
    """The completions of the fittest of a task, and the discriminator after the refinement of the best member."""
    results = Results()
    fit(everything(bases["gpt2"], workers=results), [batch], 1, MovingAverageBaseline())
    evaluated, refined = results.kept[:2], results.kept[2:]
    assert [len(one.fitness) for one in evaluated] == [2, 2]
    assert [len(one.rollout) for one in evaluated] == [3, 3]  # one prompt, three completions, one of two members
    assert [one.shared_state is not None for one in refined] == [True, False]


def test_joined_evaluations_have_the_completions_of_the_fittest() -> None:
    first, second, third = (Rollout.empty(torch.device("cpu")) for _ in range(3))
    joined = Evaluations.joined(
        [Evaluations((0.5, 1.0), first), Evaluations((2.0,), second), Evaluations((2.0,), third)]
    )
    assert joined.fitness == (0.5, 1.0, 2.0, 2.0)
    assert joined.rollout is second, "of equal ones the first"


def test_mixed_precision(bases: dict[str, str], batch: PromptBatch) -> None:
    found = []
    for workers in (InProcess(), BytesWorker()):
        module = everything(bases["gpt2"], workers=workers)
        recorder, _ = fit(module, [batch], 2, MovingAverageBaseline(), precision="bf16-mixed")
        found.append((module, recorder))
    same_runs(*found)


def test_a_worker_needs_no_adapter_files(
    bases: dict[str, str], make_backbone: Callable[..., Backbone], batch: PromptBatch, tmp_path: Path
) -> None:
    """Weights travel with the tasks: other machines need no files of this one."""
    folder = tmp_path / "generator"
    save_adapter(make_backbone(), GENERATOR, folder)
    module = everything(bases["gpt2"], generator_adapter=str(folder), workers=BytesWorker())
    shutil.rmtree(folder)
    fit(module, [batch], 1, MovingAverageBaseline())


def test_bytes_keep_values_and_strides() -> None:
    value: dict[str, Any] = {"weights": torch.randn(3, 4).T, "state": {"step": torch.tensor(2.0)}, "k": (1, "a")}
    again = from_bytes(to_bytes(value), "cpu")
    assert torch.equal(again["weights"], value["weights"])
    assert again["weights"].stride() == value["weights"].stride(), "strides change the last bits of products"
    assert again["state"] == value["state"] and again["k"] == value["k"]
    again = from_bytes(to_bytes(value), "meta")
    assert isinstance(again["weights"], Tensor) and again["weights"].device.type == "meta"


class GlobalStep:
    """A task that returns the worker's global step."""

    def __call__(self, module: MemberModule) -> int:
        return module.trainer.global_step


def test_workers_know_the_step_of_the_run(bases: dict[str, str], batch: PromptBatch) -> None:
    remote = BytesWorker()
    fit(everything(bases["gpt2"], workers=remote), [batch], 1, MovingAverageBaseline())
    assert remote.worker_actor is not None
    assert [from_bytes(remote.worker_actor.run(to_bytes(GlobalStep()), steps), "cpu") for steps in (7, 3)] == [7, 3]


def diverging(parameters: Iterable[Tensor]) -> SGD:
    return SGD(parameters, lr=1e30)


def test_a_non_finite_loss_ends_the_run(bases: dict[str, str], batch: PromptBatch) -> None:
    supervised = {"policy": 0.0, "adversarial": 0.0, "discriminator_updates": 0}
    module = everything(bases["gpt2"], generator_optimizer=diverging, workers=BytesWorker(), **supervised)
    with pytest.raises(NonFiniteError, match=r"in step 0; the optimizer step was not taken"):
        fit(module, [batch], 1, MovingAverageBaseline())


def two(responses: list[str], targets: list[str]) -> list[float]:
    return [0.0, 1.0]


def test_workers_are_closed_after_an_error(bases: dict[str, str], batch: PromptBatch) -> None:
    workers = BytesWorker()
    module = everything(bases["gpt2"], workers=workers, rewards=[FunctionReward(two, batched=True)])
    with pytest.raises(LoraGANError, match="reward 'two' is batched"):
        fit(module, [batch], 1)
    assert workers.closed == 1


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LoraGANError, match="RayWorkers needs Ray: pip install"):
        RayWorkers()


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"gpus_per_worker": -1.0}, {"retries": -1}])
def test_settings_of_ray_workers(wrong: dict[str, Any]) -> None:
    with pytest.raises(LoraGANError, match="need workers >= 1"):
        RayWorkers(**wrong)
