"""Sandbox: runs short programs against tests in processes with limits.

It guards against accidents (endless loops, a full memory or disk, calls over the network) and against the ways in which
a policy gets a reward without solving the task. It is no wall against an author who wants to break out: for such code
run the whole training in a container or a virtual machine.
"""

from __future__ import annotations

import ast
import marshal
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Timer
from typing import Any

from lora_gan.errors import LoraGANError

CHILD = Path(__file__).with_name("child.py")
GRACE = 5.0  # seconds beyond its own limit after which a worker is ended from outside
LIBRARIES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # some interpreters do not start without them


@dataclass(frozen=True)
class Program:
    """Python code and its tests.

    ``tests`` are Python statements, such as ``assert add(1, 2) == 3``, each with names of its own.
    """

    code: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a program."""

    passed: tuple[bool, ...]  # one for each test
    unsendable: Mapping[str, str]  # tests that cannot be run → type of what they give to the code


@dataclass(frozen=True)
class Guarantees:
    """What the kernel refuses to a program, besides the hook that is always there."""

    network: bool  # it has a network of its own, with nothing in it
    processes: bool  # it can start neither processes nor threads


@dataclass(frozen=True)
class Sandbox:
    """Limits of a program.

    Args:
        timeout: Seconds of a program with all of its tests, and whole seconds of computing time.
        memory: MiB of its address space.
        workers: Programs that run at once.
    """

    timeout: float = 5.0
    memory: int = 512
    workers: int = 2

    def check(self) -> Guarantees:
        """Run a program that passes, to see that this machine can do it.

        Raises:
            LoraGANError: It cannot.
        """
        if sys.platform == "win32" or not sys.executable:
            raise LoraGANError("programs run on Linux and macOS only, where processes have limits; use another reward")
        code = "import collections, heapq, itertools, math, re\nfrom typing import List\ndef one():\n    return 1"
        with _Worker(self) as worker:
            if worker.run(Program(code, ("assert one() == 1",))).passed != (True,):
                raise LoraGANError(
                    f"a first program failed in the sandbox; raise its memory ({self.memory} MiB) or its timeout "
                    f"({self.timeout} s), and check that {os.path.dirname(os.__file__)} can be read"
                )
            return worker.guarantees

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        """The outcomes of some programs; equal ones run once.

        Raises:
            LoraGANError: The sandbox itself does not work; a program that fails is an outcome.
        """
        different = list(dict.fromkeys(programs))
        count = min(self.workers, len(different))
        with ExitStack() as stack, ThreadPoolExecutor(max(count, 1)) as pool:
            idle: SimpleQueue[_Worker] = SimpleQueue()
            for _ in range(count):
                idle.put(stack.enter_context(_Worker(self)))

            def run(program: Program) -> Outcome:
                worker = idle.get()
                try:
                    return worker.run(program)
                finally:
                    idle.put(worker)

            found = dict(zip(different, pool.map(run, different), strict=True))
        return [found[program] for program in programs]


@lru_cache(maxsize=4096)
def names_in(test: str) -> tuple[str, ...]:
    """The names that stand in a test, in their order, each once."""
    return tuple(dict.fromkeys(node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)))


class _Worker:
    """A process that runs one program after another; a new one takes its place where it has ended."""

    def __init__(self, limits: Sandbox) -> None:
        self.limits = limits
        self.process: subprocess.Popen[bytes] | None = None
        self.guarantees = Guarantees(network=False, processes=False)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def run(self, program: Program) -> Outcome:
        try:
            with self._time_limit(), TemporaryDirectory(prefix="lora_gan_", ignore_cleanup_errors=True) as folder:
                self._write(b"\1", *self._job(program, os.path.realpath(folder)))
                passed, unsendable = self._read()
        except _Ended as ended:
            if message := str(ended):
                raise LoraGANError(f"the sandbox cannot run a program: {message}") from None
            return Outcome((False,) * len(program.tests), {})
        return Outcome(tuple(passed), unsendable)

    def _job(self, program: Program, folder: str) -> tuple[bytes, bytes]:
        code = program.code.encode("utf-8", "replace").decode()  # without halves of characters
        limits = {"timeout": self.limits.timeout, "memory": self.limits.memory}
        job = {"code": code, "folder": folder, **limits}
        return _message(job), _message([(test, names_in(test)) for test in program.tests])

    @contextmanager
    def _time_limit(self) -> Iterator[None]:
        process = self.process = self.process or self._started()
        timer = Timer(self.limits.timeout + GRACE, _kill, [process])
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={name: os.environ[name] for name in LIBRARIES if name in os.environ} | {"PYTHONHASHSEED": "0"},
        )
        self.process = process
        try:
            self.guarantees = Guarantees(**self._read())
        except _Ended as ended:
            raise LoraGANError(f"the sandbox does not start: {ended or 'no message'}") from None
        return process

    def _write(self, *messages: bytes) -> None:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(b"".join(messages))
            self.process.stdin.flush()
        except OSError:
            raise _Ended(self.end()) from None

    def _read(self) -> Any:
        assert self.process is not None and self.process.stdout is not None
        length = int.from_bytes(self.process.stdout.read(8), "little")
        data = self.process.stdout.read(length)
        if not data or len(data) < length:
            raise _Ended(self.end())
        return marshal.loads(data)

    def end(self) -> str:
        """End the process and all that belongs to it; what it wrote about its own errors."""
        process, self.process = self.process, None
        if process is None:
            return ""
        _kill(process)
        with suppress(OSError):  # the pipe is broken where the process had ended
            return process.communicate()[1].decode(errors="replace").strip()
        return ""


class _Ended(Exception):
    """A worker has ended; the text is its error, empty where a program made it end."""


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _message(content: Any) -> bytes:
    data = marshal.dumps(content)
    return len(data).to_bytes(8, "little") + data
