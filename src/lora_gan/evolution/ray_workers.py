"""Ray workers: processes on one or several machines."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

from lora_gan.errors import LoraGANError
from lora_gan.evolution.remote import WorkerActor, WorkerSpec, from_bytes, to_bytes
from lora_gan.evolution.tasks import MemberModule, Task
from lora_gan.evolution.workers import Done, Workers

log = logging.getLogger("lora_gan")

QUIET = {"log_to_driver": False, "logging_level": logging.ERROR}


class RayWorkers(Workers):
    """Workers in processes of a Ray cluster; on equal machines the results equal those of one process, bit for bit.

    Each worker builds the module once, from its settings: lora-gan, the base and the files of the rewards must be on
    every machine. Members, discriminator and all other learned state travel with the tasks. Tasks go to the next free
    worker. If a worker fails, its task is retried and a new worker replaces it. With 16-mixed precision each process
    has its own loss scale, so the last bits may differ.

    Args:
        workers: Number of processes; each takes one CPU of the cluster.
        address: Address of a running cluster: "auto" (the one of this machine), "host:port" or "ray://host:port"; by
            default a cluster is started on this machine for the run.
        gpus_per_worker: GPUs of each worker, 0.5 to share one; with 0 the workers compute on the CPU.
        retries: Number of times that a task is retried after its worker failed.

    Raises:
        LoraGANError: Ray is not installed, or a setting is out of range.
    """

    def __init__(
        self, workers: int = 2, address: str | None = None, gpus_per_worker: float = 0.0, retries: int = 3
    ) -> None:
        if workers < 1 or not gpus_per_worker >= 0 or retries < 0:
            raise LoraGANError(
                "need workers >= 1, gpus_per_worker >= 0 and retries >= 0, got "
                f"{workers}, {gpus_per_worker} and {retries}"
            )
        self.workers = workers
        self.address = address
        self.gpus_per_worker = gpus_per_worker
        self.retries = retries
        self._pool: _WorkerPool | None = None
        self._connected = False  # whether this object connected to Ray, not the calling program
        _ray()

    def run(self, module: MemberModule, tasks: Sequence[Task[Done]]) -> list[Done]:
        if self._pool is None:
            self._pool = self._start_pool(module)
        done = self._pool.run([to_bytes(task) for task in tasks], module.trainer.global_step)
        return [from_bytes(result, module.device) for result in done]

    def close(self) -> None:
        self._pool = None
        if self._connected:
            _ray().shutdown()
        self._connected = False

    def _start_pool(self, module: MemberModule) -> _WorkerPool:
        ray = _ray()
        if not ray.is_initialized():
            self._connect()
        self._check_capacity(ray.cluster_resources())
        if module.device.type == "cuda" and not self.gpus_per_worker:
            log.warning("workers compute on the CPU: to use GPUs, set gpus_per_worker, such as 0.5")
        log.info("starting %d workers", self.workers)
        spec = WorkerSpec.like(module, "cuda" if self.gpus_per_worker else "cpu")
        return _WorkerPool(to_bytes(spec, ray.cloudpickle), self.workers, self.gpus_per_worker, self.retries)

    def _connect(self) -> None:
        with _keep_signal_handlers():
            if self.address is None:
                _start_cluster(self.workers)
            else:
                _join_cluster(self.address)
        self._connected = True

    def _check_capacity(self, resources: dict[str, float]) -> None:
        cpus, gpus = (resources.get(kind, 0.0) for kind in ("CPU", "GPU"))
        capacity = min(cpus, gpus / self.gpus_per_worker if self.gpus_per_worker else cpus)
        if capacity < self.workers:
            raise LoraGANError(
                f"the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs, enough for {int(capacity)} workers of 1 CPU and "
                f"{self.gpus_per_worker:g} GPUs: set workers to that, or add machines with "
                "`ray start --address <head>:6379`"
            )


class _WorkerPool:
    """Worker processes that run one task at a time.

    They are actors, not Ray's stateless tasks: a process that Ray reuses for another task may be lent another GPU than
    that on which its module is, so that after a failure two workers can share one. Actors are not restarted by Ray but
    replaced: a call to a restarting actor fails in seconds, and is repeated on no other, even if its machine is lost.

    Args:
        spec: The :class:`WorkerSpec` as bytes.
        size: Number of workers.
        gpus: GPUs of each worker.
        retries: As in :class:`RayWorkers`.
    """

    def __init__(self, spec: bytes, size: int, gpus: float, retries: int) -> None:
        self._ray = _ray()
        self._spec = self._ray.put(spec)
        self._actor = self._ray.remote(num_cpus=1, num_gpus=gpus)(WorkerActor)
        self._retries = retries
        self._free: list[Any] = []
        self._busy: dict[Any, tuple[Any, int | None]] = {}  # pending call → worker and task index; None: starting
        for _ in range(size):
            self._start_worker()

    def run(self, tasks: Sequence[bytes], global_step: int) -> list[bytes]:
        """The result of each task, in order; tasks go to the next free worker."""
        waiting, failures = deque(range(len(tasks))), Counter[int | None]()
        results: dict[int, bytes] = {}
        while len(results) < len(tasks):
            while waiting and self._free:
                worker, index = self._free.pop(), waiting.popleft()
                self._busy[worker.run.remote(tasks[index], global_step)] = worker, index
            [ended], _ = self._ray.wait(list(self._busy))
            worker, task = self._busy.pop(ended)
            try:
                result = self._ray.get(ended)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from error  # as the worker raised it
            except self._ray.exceptions.RayError as failure:  # process or machine lost, or killed to free memory
                failures[task] += 1
                self._on_worker_failure(failure, failures[task])
                waiting.extendleft(() if task is None else (task,))
            else:
                self._free.append(worker)
                if task is not None:
                    results[task] = result
        return [results[index] for index in range(len(tasks))]

    def _start_worker(self) -> None:
        worker = self._actor.remote(self._spec)
        self._busy[worker.open.remote()] = worker, None

    def _on_worker_failure(self, failure: Exception, failures: int) -> None:
        """Replace the worker, unless the same task has failed too often."""
        message = shorten(str(failure), 500)
        if failures > self._retries:
            raise LoraGANError(
                f"a task failed on {failures} workers in a row, likely out of memory: use fewer workers or "
                f"machines with more memory; last error: {message}"
            ) from failure
        log.warning("a worker failed and is replaced (%d of %d): %s", failures, self._retries, message)
        self._start_worker()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise LoraGANError("RayWorkers needs Ray: pip install 'lora-gan[ray]', or pip install ray") from error
    return ray


def _start_cluster(cpus: int) -> None:
    """Start a cluster on this machine, without dashboard and usage reports, with this process's import path."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    path = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
    _ray().init("local", num_cpus=cpus, include_dashboard=False, runtime_env=path, **QUIET)


def _join_cluster(address: str) -> None:
    """Join a running cluster; check the address first, because Ray retries a wrong one for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    try:
        if colon:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        _ray().init(address, **QUIET)
    except (OSError, ValueError) as error:
        raise LoraGANError(
            f"no Ray cluster at {address!r}: start one with `ray start --head`, or leave address out ({error})"
        ) from error


@contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Restore the signal handlers that Ray replaces: those of a run save a checkpoint."""
    main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items() if main_thread else ():
            signal.signal(number, handler)
