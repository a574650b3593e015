"""Workers in several processes, on this machine or on several, through Ray."""

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
from typing import Any

from lora_gan.errors import LoraGANError
from lora_gan.evolution.members import Errand, MemberModule
from lora_gan.evolution.workers import Done, Workers
from lora_gan.evolution.workshop import Recipe, Workshop, packed, unpacked

log = logging.getLogger("lora_gan")

QUIET = {"log_to_driver": False, "logging_level": logging.ERROR}


class RayWorkers(Workers):
    """Processes of a Ray cluster; their results are those of this process, bit for bit on equal machines.

    Each builds the module once, from its settings: lora-gan, the base and what the rewards read must be on every
    machine. Members, the discriminator and all else that is learned travel with the errands. An errand goes to whoever
    is free; where a worker dies, another does its errand and a new one takes its place. With 16-mixed precision each
    process has a loss scale of its own, so the last bits may differ.

    Args:
        workers: Processes, each with a CPU of the cluster.
        address: Of a running cluster: "auto" (that of this machine), "host:port" or "ray://host:port"; by default one
            is started on this machine for the time of the run.
        gpus_per_worker: GPUs of each, 0.5 to share one; 0: they compute on the CPU.
        retries: How often an errand is tried again when its worker has died.
    """

    def __init__(
        self, workers: int = 2, address: str | None = None, gpus_per_worker: float = 0.0, retries: int = 3
    ) -> None:
        if workers < 1 or gpus_per_worker < 0 or retries < 0:
            raise LoraGANError(
                "need workers >= 1, gpus_per_worker >= 0 and retries >= 0, got "
                f"{workers}, {gpus_per_worker} and {retries}"
            )
        self.workers = workers
        self.address = address
        self.gpus_per_worker = gpus_per_worker
        self.retries = retries
        self._crew: _Crew | None = None
        self._connected = False  # by us, and not by the program around
        _ray()

    def run(self, module: MemberModule, errands: Sequence[Errand[Done]]) -> list[Done]:
        if self._crew is None:
            self._crew = self._hire(module)
        done = self._crew.do([packed(errand) for errand in errands], module.trainer.global_step)
        return [unpacked(result, module.device) for result in done]

    def close(self) -> None:
        self._crew = None
        if self._connected:
            _ray().shutdown()
        self._connected = False

    def _hire(self, module: MemberModule) -> _Crew:
        ray = _ray()
        if not ray.is_initialized():
            self._connect()
        self._check_room(ray.cluster_resources())
        if module.device.type == "cuda" and not self.gpus_per_worker:
            log.warning("the workers compute on the CPU: set gpus_per_worker, to 0.5 say, if they shall use GPUs, too")
        log.info("%d workers are starting", self.workers)
        recipe = Recipe.like(module, "cuda" if self.gpus_per_worker else "cpu")
        return _Crew(packed(recipe, ray.cloudpickle), self.workers, self.gpus_per_worker, self.retries)

    def _connect(self) -> None:
        with _same_signals():
            if self.address is None:
                _start(self.workers)
            else:
                _join(self.address)
        self._connected = True

    def _check_room(self, there: dict[str, float]) -> None:
        cpus, gpus = (there.get(kind, 0.0) for kind in ("CPU", "GPU"))
        room = min(cpus, gpus / self.gpus_per_worker if self.gpus_per_worker else cpus)
        if room < self.workers:
            raise LoraGANError(
                f"the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs, room for {int(room)} workers of 1 CPU and "
                f"{self.gpus_per_worker:g} GPUs: set workers to that, or let more machines join by "
                "`ray start --address <head>:6379`"
            )


class _Crew:
    """Processes that do errands, one at a time.

    Args:
        recipe: What each is made of, packed.
        size: How many.
        gpus: Of each.
        retries: As in :class:`RayWorkers`.
    """

    def __init__(self, recipe: bytes, size: int, gpus: float, retries: int) -> None:
        self._ray = _ray()
        self._recipe = self._ray.put(recipe)
        self._workshop = self._ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(Workshop)
        self._retries = retries
        self._free: list[Any] = []
        self._busy: dict[Any, tuple[Any, int | None]] = {}  # by what is awaited: worker and errand; None: it opens
        for _ in range(size):
            self._employ()

    def do(self, errands: Sequence[bytes], rounds: int) -> list[bytes]:
        """The result of each, by whoever is free."""
        waiting, deaths = deque(range(len(errands))), Counter[int | None]()
        results: dict[int, bytes] = {}
        while len(results) < len(errands):
            while waiting and self._free:
                worker, number = self._free.pop(), waiting.popleft()
                self._busy[worker.do.remote(errands[number], rounds)] = worker, number
            ended = self._ray.wait(list(self._busy))[0][0]
            worker, task = self._busy.pop(ended)
            try:
                result = self._result(ended)
            except _deaths() as death:
                deaths[task] += 1
                self._mourn(death, deaths[task])
                if task is not None:
                    waiting.appendleft(task)
                continue
            self._free.append(worker)
            if task is not None:
                results[task] = result
        return [results[number] for number in range(len(errands))]

    def _employ(self) -> None:
        worker = self._workshop.remote(self._recipe)
        self._busy[worker.open.remote()] = worker, None

    def _result(self, ended: Any) -> Any:
        """What came out; a mistake as it was raised there."""
        try:
            return self._ray.get(ended)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error

    def _mourn(self, death: Exception, deaths: int) -> None:
        """Replace a worker, unless too many have died of the same."""
        told = " ".join(str(death).split())
        if deaths > self._retries:
            raise LoraGANError(
                f"{deaths} workers have died one after the other of the same errand; is there memory enough for them? "
                f"The last: {told}"
            ) from death
        log.warning("a worker has died and is replaced (%d of %d): %s", deaths, self._retries, told)
        self._employ()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise LoraGANError("RayWorkers needs Ray: pip install 'lora-gan[ray]', or pip install ray") from error
    return ray


def _start(cpus: int) -> None:
    """A cluster on this machine: without dashboard and reports, and with this process's import path."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    path = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
    _ray().init("local", num_cpus=cpus, include_dashboard=False, runtime_env=path, **QUIET)


def _join(address: str) -> None:
    """A running cluster; Ray would knock at a wrong address for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    try:
        if colon:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        _ray().init(address, **QUIET)
    except (OSError, ValueError) as error:
        raise LoraGANError(
            f"no Ray cluster answers at {address!r}: start one by `ray start --head`, or leave address out ({error})"
        ) from error


def _deaths() -> tuple[type[Exception], ...]:
    """What Ray says of a process, or of a machine, that is no more."""
    errors = _ray().exceptions
    return errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError


@contextmanager
def _same_signals() -> Iterator[None]:
    """Ray sets handlers of its own, and a run has some that save it."""
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items() if here else ():
            signal.signal(number, handler)
