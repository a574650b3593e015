"""Ray workers in real processes on this machine; needs ``pip install ray``.

Each worker imports torch and Lightning, which takes most of the time.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from lora_gan.callbacks import MovingAverageBaseline
from lora_gan.cli import main
from lora_gan.errors import LoraGANError
from lora_gan.evolution import EvolutionStrategy, RankOneNoise, RayWorkers, ray_workers
from lora_gan.evolution.noise import Perturbed
from lora_gan.evolution.remote import to_bytes
from lora_gan.evolution.tasks import EvaluateTask
from lora_gan.evolution.workers import InProcess
from lora_gan.rewards import FunctionReward
from lora_gan.types import PromptBatch
from tests.conftest import tiny
from tests.helpers.generations import Run, adamw, everything, graded, same, same_runs
from tests.helpers.settings import grouped
from tests.helpers.steps import fit
from tests.system.test_configs import pressed
from tests.system.test_configs import rows as rows  # the fixture

ray = pytest.importorskip("ray", reason="needs Ray: pip install ray")
from ray.cluster_utils import Cluster  # noqa: E402

Fatal = Callable[[str, str], float]
EVALUATED, REFINED = "a", "4"  # targets: fitness uses the first prompt, refinement all


class SignalRecorder(L.Callback):
    """Records the handlers of SIGTERM and SIGINT in each generation."""

    def __init__(self) -> None:
        self.handlers: set[Any] = set()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.handlers.add((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)))


def fatal(folder: Path, *targets: str, once: bool = True) -> Fatal:
    """The reward :func:`graded`, which kills the worker when it gets one of the targets."""
    run = os.getpid()

    def graded_or_killed(response: str, target: str) -> float:
        if target in targets and os.getpid() != run and (_first(folder / target) or not once):
            os.kill(os.getpid(), signal.SIGKILL)
        return graded(response, target)

    return graded_or_killed


def _first(mark: Path) -> bool:
    """Whether no worker has made the mark before; two workers cannot both be the first."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def train(base: str, batch: PromptBatch, *callbacks: L.Callback, **changed: Any) -> Run:
    module = everything(base, **changed)
    recorder, _ = fit(module, [batch], 3, MovingAverageBaseline(), *callbacks)
    return module, recorder


@pytest.fixture(scope="module")
def reference(bases: dict[str, str], make_batch: Callable[..., PromptBatch]) -> tuple[Run, PromptBatch]:
    """The reference run in one process; all others must equal it."""
    batch = make_batch(("Say a", EVALUATED, "b"), ("Q: hello?", "hi", "x", "yz"), ("2+2=", REFINED))
    return train(bases["gpt2"], batch), batch


def test_two_processes_equal_one(
    bases: dict[str, str], reference: tuple[Run, PromptBatch], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if a worker is killed during a refinement."""
    alone, batch = reference
    reward, signals = FunctionReward(fatal(tmp_path, REFINED), name="graded"), SignalRecorder()
    same_runs(alone, train(bases["gpt2"], batch, signals, workers=RayWorkers(2), rewards=[reward]))
    assert caplog.text.count("a worker failed and is replaced (1 of 3)") == 1
    assert len(signals.handlers) == 1, "Ray must not change the handlers of Ctrl-C and SIGTERM"
    assert not ray.is_initialized(), "the run must stop its cluster"


def test_an_error_of_a_task_is_raised_unchanged(bases: dict[str, str], reference: tuple[Run, PromptBatch]) -> None:
    def two(responses: list[str], targets: list[str]) -> list[float]:
        return [0.0, 1.0]

    reward = FunctionReward(two, batched=True)
    with pytest.raises(LoraGANError, match=r"^reward 'two' is batched: it must return 3 numbers"):
        train(bases["gpt2"], reference[1], workers=RayWorkers(1), rewards=[reward])
    assert not ray.is_initialized()


def test_a_cluster_that_is_too_small_is_refused(bases: dict[str, str], reference: tuple[Run, PromptBatch]) -> None:
    """A cluster that the calling program started is not stopped."""
    ray.init("local", num_cpus=1, include_dashboard=False)
    try:
        with pytest.raises(
            LoraGANError, match=r"has 1 CPUs and 0 GPUs, enough for 1 workers of 1 CPU and 0 GPUs: set "
        ):
            train(bases["gpt2"], reference[1], workers=RayWorkers(2))
        assert ray.is_initialized()
    finally:
        ray.shutdown()


@pytest.mark.parametrize("address", ["auto", "nonsense", "127.0.0.1:1", "ray://127.0.0.1:1"])
def test_an_address_without_a_cluster_is_refused(
    address: str,
    bases: dict[str, str],
    reference: tuple[Run, PromptBatch],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where a running cluster leaves its address
    with pytest.raises(LoraGANError, match=f"no Ray cluster at '{address}': start one with `ray start --head`"):
        train(bases["gpt2"], reference[1], workers=RayWorkers(1, address=address))


@pytest.mark.slow
def test_several_failures(
    bases: dict[str, str], reference: tuple[Run, PromptBatch], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of them in an evaluation."""
    alone, batch = reference
    reward = FunctionReward(fatal(tmp_path, EVALUATED, REFINED), name="graded")
    same_runs(alone, train(bases["gpt2"], batch, workers=RayWorkers(2), rewards=[reward]))
    assert {path.name for path in tmp_path.iterdir()} == {EVALUATED, REFINED}
    assert caplog.text.count("a worker failed and is replaced (1 of 3)") == 2


@pytest.mark.slow
def test_a_strategy_in_two_processes_equals_one(
    bases: dict[str, str], reference: tuple[Run, PromptBatch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if a worker is killed during an evaluation; tasks carry the mean and seeds, not the members."""
    sent: list[EvaluateTask] = []

    def recorded(value: Any, *pickler: Any) -> bytes:
        sent.extend([value] if isinstance(value, EvaluateTask) else [])
        return to_bytes(value, *pickler)

    monkeypatch.setattr(ray_workers, "to_bytes", recorded)
    recorders = []
    for workers, reward in ((InProcess(), graded), (RayWorkers(2), fatal(tmp_path, EVALUATED))):
        torch.manual_seed(4)
        rewards = [FunctionReward(reward, name="graded")]
        settings = {**tiny(bases["gpt2"]), "rewards": rewards, "workers": workers, "discriminator_updates": 0}
        settings |= {"generator_optimizer": adamw, "discriminator_optimizer": adamw, "noise": RankOneNoise()}
        module = EvolutionStrategy(**grouped({**settings, "population": 12, "members_at_once": 6}))
        recorders.append(fit(module, [reference[1]], 2)[0])
    alone, together = recorders
    assert (tmp_path / EVALUATED).exists()
    assert alone.reports == together.reports
    same(alone.weights, together.weights)
    assert [len(task.members) for task in sent] == [6] * 4
    assert all(isinstance(task.members, Perturbed) for task in sent)
    task = sent[0]
    weights = sum(w.nbytes for x in task.members[0].values() for w in (x.a, x.b))
    assert len(to_bytes(task)) < len(to_bytes(replace(task, members=[*task.members]))) - 4 * weights


@pytest.mark.slow
def test_too_little_memory_ends_the_run(
    bases: dict[str, str], reference: tuple[Run, PromptBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray kills workers where memory runs out; here 1 % of it is too much."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    with pytest.raises(LoraGANError, match=r"a task failed on 2 workers in a row.*running low on memory"):
        train(bases["gpt2"], reference[1], workers=RayWorkers(1, retries=1))
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_task_that_kills_every_worker_ends_the_run(
    bases: dict[str, str], reference: tuple[Run, PromptBatch], tmp_path: Path
) -> None:
    reward = FunctionReward(fatal(tmp_path, EVALUATED, once=False), name="graded")
    with pytest.raises(LoraGANError, match="a task failed on 2 workers in a row"):
        train(bases["gpt2"], reference[1], workers=RayWorkers(1, retries=1), rewards=[reward])
    assert not ray.is_initialized()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster started before the run: two nodes with one CPU each."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    found.add_node(num_cpus=1)
    yield found
    found.shutdown()


class LostMachine(L.Callback):
    """Removes a node in the second generation."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            self.cluster.remove_node(self.cluster.list_all_nodes()[-1])


@pytest.mark.slow
def test_a_machine_is_lost(
    bases: dict[str, str], reference: tuple[Run, PromptBatch], cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """The remaining workers continue; tasks of the lost node run again."""
    alone, batch = reference
    workers = RayWorkers(2, address=cluster.address)
    same_runs(alone, train(bases["gpt2"], batch, LostMachine(cluster), workers=workers))
    assert "a worker failed and is replaced" in caplog.text


@pytest.mark.slow
def test_from_the_command_line(bases: dict[str, str], rows: Path, tmp_path: Path) -> None:
    config = pressed("evolve", bases["gpt2"], rows, tmp_path)
    settings = config["model"]["init_args"]
    settings |= {"population": 4, "members_at_once": 2, "refinement_steps": 1, "evaluation_prompts": 2}
    settings["start"]["init_args"] |= {"trunk": 2, "branch": 1}
    config["trainer"]["max_steps"] = 2
    experiment, overlay = tmp_path / "evolve.yaml", tmp_path / "workers.yaml"
    experiment.write_text(yaml.safe_dump(config), encoding="utf-8")
    workers = {"class_path": "lora_gan.evolution.RayWorkers", "init_args": {"workers": 2}}
    overlay.write_text(yaml.safe_dump({"model": {"init_args": {"workers": workers}}}), encoding="utf-8")
    for configs in ([experiment], [experiment, overlay]):
        main(["fit", *(f"--config={path}" for path in configs), "--test_after_fit=false"])
    alone, together = sorted(tmp_path.glob("evolve/version_*/adapters/generator/adapter_model.safetensors"))
    assert alone.read_bytes() == together.read_bytes()
