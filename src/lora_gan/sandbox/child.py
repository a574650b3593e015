"""Child of the sandbox: a script of the standard library alone that runs one program after another.

For each program it forks twice. The *tester* has the tests; the *program* has the code and never sees a test. A name
of the code stands in a test for a :class:`Remote`, whose calls are sent to the program; what comes back is data, not
objects with methods of the code's own. So the outcome is decided in a process in which nothing of the code runs.
"""

from __future__ import annotations

import builtins
import ctypes
import marshal
import operator
import os
import resource
import signal
import sys
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:  # each import that is left out makes the start faster
    from collections.abc import Callable, Iterable, Mapping
    from types import FrameType
    from typing import Any, NoReturn

NOBODY = 65534  # the user whom a root hands over to
MEBIBYTE = 1 << 20
LONGEST = MEBIBYTE  # bytes of one value that the program gives to the tester
FILE_SIZE = MEBIBYTE  # bytes of a file that the program writes
FILES = 16  # files that are open at once, and files that the program may write
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)
SHADOWED = frozenset((*dir(builtins), *sys.stdlib_module_names))
EVENTS = """
    socket. subprocess. ctypes. pty. shutil. syslog. fcntl. resource. signal.pthread_kill
    os.exec os.fork os.kill os.posix_spawn os.spawn os.system os.putenv os.chdir os.chflags os.chmod os.chown os.link
    os.lockf os.mkdir os.remove os.rename os.rmdir os.setxattr os.symlink os.truncate os.utime
"""
REFUSED = tuple(EVENTS.split())  # beginnings of the audit events that a program has no use for
READ = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr", "glob.glob")


# messages: plain data over pipes


def send(pipe: int, data: bytes) -> None:
    """Write a message: its length in 8 bytes, then the bytes."""
    rest = memoryview(len(data).to_bytes(8, "little") + data)
    while rest:
        rest = rest[os.write(pipe, rest) :]


def receive(pipe: int, longest: int | None = None) -> bytes:
    """Read a message, and not one byte more; ``EOFError`` where there is none, or a longer one."""
    length = int.from_bytes(_exactly(pipe, 8), "little")
    if longest is not None and length > longest:
        raise EOFError
    return _exactly(pipe, length)


def _exactly(pipe: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.read(pipe, min(length, MEBIBYTE))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


EXACT = (type(None), bool, int, float, complex, str, bytes)
PLAIN: dict[type, Callable[[Any], Any]] = {int: int.__int__, float: float.__float__, str: str.__str__}  # of subclasses
CONTAINERS: dict[str, type[Any]] = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}


def encoded(value: Any, handle: Callable[[Any], int]) -> Any:
    """``value`` for ``marshal``: plain data as they are, containers as (name, items), others by their number."""
    if type(value) in EXACT:
        return value
    for kind, plain in PLAIN.items():
        if isinstance(value, kind):
            return plain(value)
    for name, container in CONTAINERS.items():
        if isinstance(value, container):
            return name, [encoded(item, handle) for item in value]
    if isinstance(value, dict):
        return "dict", [(encoded(key, handle), encoded(item, handle)) for key, item in value.items()]
    return "object", handle(value)


def decoded(data: Any, thing: Callable[[int], Any]) -> Any:
    """The value of :func:`encoded` data."""
    if type(data) is not tuple:
        return data
    kind, items = data
    if kind == "object":
        return thing(items)
    if kind == "dict":
        return {decoded(key, thing): decoded(item, thing) for key, item in items}
    return CONTAINERS[kind](decoded(item, thing) for item in items)


# the program: the code, which answers calls


OPERATIONS: dict[str, Callable[..., Any]] = {
    "attribute": getattr,
    "bool": bool,
    "call": lambda function, /, *args, **kwargs: function(*args, **kwargs),
    "equal": operator.eq,
    "item": operator.getitem,
    "iter": iter,
    "len": len,
    "next": next,
    "str": str,
}


def answer_calls(code: str, requests: int, replies: int) -> NoReturn:
    """Run the code, send its names, then what is asked for, until the tester is gone."""
    module = ModuleType("completion")
    sys.modules["completion"] = module
    objects: list[Any] = []

    def number(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def result(action: Callable[[], Any]) -> bytes:
        try:
            return marshal.dumps(("value", encoded(action(), number)))
        except BaseException as error:  # SystemExit, too
            return marshal.dumps(("raised", ([kind.__name__ for kind in type(error).__mro__], _said(error))))

    def run() -> list[str]:
        exec(compile(code, "<completion>", "exec"), module.__dict__)
        return [name for name in module.__dict__ if type(name) is str]

    def asked() -> Any:
        name, thing, args, kwargs = marshal.loads(receive(requests))
        if name == "name":
            return module.__dict__[thing]
        given = decoded(args, objects.__getitem__)
        return OPERATIONS[name](objects[thing], *given, **decoded(kwargs, objects.__getitem__))

    send(replies, result(run))
    while True:
        send(replies, result(asked))


def _said(error: BaseException) -> str:
    try:
        return str.__str__(str(error))[:200]
    except BaseException:
        return ""


def guard(readable: tuple[str, ...], writable: str) -> None:
    """An audit hook that refuses what a program has no use for: a guard against accidents, not a wall."""
    left, refused, read = iter(range(FILES)), REFUSED, READ  # of this call: the code cannot replace them by name
    following, writing = next, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def inside(path: Any, folders: tuple[str, ...]) -> bool:
        if type(path) is int or path is None:  # an open file; the working directory
            return True
        if type(path) is not str or ".." in path.split("/"):
            return False
        return not path.startswith("/") or path.startswith(folders)

    def refuse(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, flags = args[0], args[2] if type(args[2]) is int else writing
            writes = flags & writing and type(path) is not int
            allowed = inside(path, (writable,) if writes else (*readable, writable))
            if not allowed or (writes and following(left, None) is None):
                raise PermissionError(f"the sandbox refuses to open {path!r}")
        elif event.startswith(refused) or (event in read and not inside(args[0], (*readable, writable))):
            raise PermissionError(f"the sandbox refuses {event}")

    sys.addaudithook(refuse)


# the tester


class _Gone(BaseException):
    """The program has ended, or the time is over; no ``except Exception`` of a test holds it up."""


class Unsendable(Exception):
    """A test gives the code something other than data and objects of the code."""


class Program:
    """The program, as the tester sees it: two pipes."""

    def __init__(self, requests: int, replies: int) -> None:
        self.requests = requests
        self.replies = replies
        self.ended = False

    def ask(self, operation: str, thing: Any, /, *args: Any, **kwargs: Any) -> Any:
        """What an operation on an object of the code gives; its exceptions are raised here as built-in ones."""
        if self.ended:
            raise _Gone
        given = operation, thing, encoded(args, _number), encoded(kwargs, _number)
        try:
            send(self.requests, marshal.dumps(given))
        except OSError as error:
            self.ended = True
            raise _Gone from error
        return self.reply()

    def reply(self) -> Any:
        try:
            kind, found = marshal.loads(receive(self.replies, LONGEST))
            if kind == "value":
                return decoded(found, lambda number: Remote(self, number))
            names, message = found
        except (EOFError, ValueError, TypeError, KeyError, RecursionError, MemoryError) as error:
            self.ended = True
            raise _Gone from error
        raise _builtin_exception(names)(message)


def _builtin_exception(names: Any) -> type[Exception]:
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            return kind
    return RuntimeError


class Remote:
    """An object of the code. It is never equal to data, so an object that equals everything gains nothing."""

    __slots__ = ("_number", "_program")

    def __init__(self, program: Program, number: int) -> None:
        self._program = program
        self._number = number

    def __getattr__(self, name: str) -> Any:
        return self._program.ask("attribute", self._number, name)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._program.ask("call", self._number, *args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return self._program.ask("equal", self._number, other) is True if isinstance(other, Remote) else NotImplemented

    __hash__ = object.__hash__

    def __getitem__(self, key: Any) -> Any:
        return self._program.ask("item", self._number, key)

    def __bool__(self) -> bool:
        return self._program.ask("bool", self._number) is True

    def __len__(self) -> Any:
        return self._program.ask("len", self._number)

    def __iter__(self) -> Any:
        return self._program.ask("iter", self._number)

    def __next__(self) -> Any:
        return self._program.ask("next", self._number)

    def __str__(self) -> Any:
        return self._program.ask("str", self._number)


def _number(value: Any) -> int:
    if type(value) is Remote:
        return value._number
    raise Unsendable(type(value).__name__)


def run_tests(
    tests: list[tuple[str, list[str]]], program: Program, passed: list[bool], unsendable: dict[str, str]
) -> None:
    """Run the tests, statements and the names in them, and note which pass; none where the code itself fails."""
    try:
        available = frozenset(program.reply())
        for number, (test, used) in enumerate(tests):
            try:
                names = {name: program.ask("name", name) for name in taken(used, available)}
                exec(compile(test, "<test>", "exec"), names | {"__name__": "test"})
                passed[number] = not program.ended
            except Unsendable as error:
                unsendable[test] = str(error)
            except BaseException:  # whatever it is, the test has not passed
                continue
    except BaseException:
        return


def taken(used: Iterable[str], available: frozenset[str]) -> frozenset[str]:
    """The names of a test that stand for those of the code.

    Built-in functions and modules of the standard library stay what they are, unless the test uses nothing else of the
    code: ``sum`` in ``assert sum(1, 2) == 3`` is the code's.
    """
    there = available.intersection(used)
    return there - SHADOWED or there


# processes


def run_program(nobody: bool) -> None:
    """Be the tester of one program: it reads the code and forks the program, and only then reads the tests."""
    job = marshal.loads(receive(0))
    limit(job, nobody)
    requests, replies = os.pipe(), os.pipe()
    tester = os.getpid()
    forked = os.fork()
    if not forked:
        try:
            become_program(job, tester, requests[0], replies[1])
        except BaseException as error:
            os.write(2, f"{error!r} ".encode())
        finally:
            os._exit(1)
    os.close(requests[0])
    os.close(replies[1])
    tests = marshal.loads(receive(0))
    program = Program(requests[1], replies[0])
    receive(program.replies)  # it is ready; nothing of the code has run
    out = os.dup(1)
    silence()
    passed: list[bool] = [False] * len(tests)
    unsendable: dict[str, str] = {}
    ring(job["timeout"], program)
    try:
        run_tests(tests, program, passed, unsendable)
    finally:
        program.ended = True
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        os.kill(forked, signal.SIGKILL)
        os.waitpid(forked, 0)
    send(out, marshal.dumps((passed, unsendable)))


def become_program(job: Mapping[str, Any], tester: int, requests: int, replies: int) -> NoReturn:
    """Run the code of a job, with no file open but its ends of the pipes."""
    end_with(tester)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # neither processes nor threads
    os.environ.clear()
    requests, replies = os.dup(requests), os.dup(replies)
    silence()
    guard((os.path.dirname(os.__file__) + "/", os.devnull), job["folder"] + "/")
    for file in range(3, FILES):
        if file not in (requests, replies):
            try:
                os.close(file)
            except OSError:  # it was not open
                continue
    send(replies, b"")
    answer_calls(job["code"], requests, replies)


def limit(job: Mapping[str, Any], nobody: bool) -> None:
    """Go to the folder, give up the rights of root, and set the limits of the kernel."""
    os.chdir(job["folder"])
    if nobody:
        os.chown(job["folder"], NOBODY, NOBODY)
    give_up_root(nobody)
    memory = job["memory"] * MEBIBYTE if sys.platform == "linux" else resource.RLIM_INFINITY
    seconds = int(job["timeout"]) + 1
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_NOFILE, FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))


def silence() -> None:
    """Nothing is read, and what is printed is lost."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)


def ring(seconds: float, program: Program) -> None:
    """Interrupt the tests after some seconds, and again if a test holds that up."""

    def over(number: int, frame: FrameType | None) -> None:
        program.ended = True
        raise _Gone

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)


def end_with(parent: int) -> None:
    """End when the parent ends, however that happens. Linux only."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def give_up_root(become_nobody: bool) -> None:
    """As root: become nobody; or keep what root owns, without any capability, and count as nobody's process."""
    if os.geteuid() or sys.platform != "linux":
        return
    try:
        os.setgroups([])
        os.setresgid(*(NOBODY,) * 3 if become_nobody else (-1, -1, -1))
        os.setresuid(NOBODY, *(NOBODY, NOBODY) if become_nobody else (0, 0))
    except PermissionError:  # root of a container, without the capabilities of root
        return
    version_and_process, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    LIBC.capset(version_and_process, none)


def holds(check: Callable[[], bool]) -> bool:
    """What a check finds in a process of its own; False where it raises."""
    forked = os.fork()
    if not forked:
        status = 1
        try:
            status = not check()
        finally:
            os._exit(status)
    return os.waitpid(forked, 0)[1] == 0


def nobody_can_read() -> bool:
    give_up_root(True)
    with open(os.__file__, "rb"):
        return os.getuid() == NOBODY


def forks_are_refused(nobody: bool) -> bool:
    give_up_root(nobody)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    try:
        if not os.fork():
            os._exit(0)
    except OSError:
        return True
    return False


def leave_network() -> bool:
    """Take a network of one's own, with nothing in it. Linux, where it is permitted."""
    if sys.platform != "linux":
        return False
    kinds = CLONE_NEWNET if not os.geteuid() else CLONE_NEWUSER | CLONE_NEWNET
    return bool(LIBC.unshare(kinds) == 0)


def main() -> None:
    del sys.path[0]  # the folder of this file
    nobody = not os.geteuid() and holds(nobody_can_read)  # before a namespace of users, which has no root
    network = leave_network()
    processes = holds(lambda: forks_are_refused(nobody))
    send(1, marshal.dumps({"network": network, "processes": processes}))
    while os.read(0, 1):
        forked = os.fork()
        if not forked:
            status = 1
            try:
                run_program(nobody)
                status = 0
            except BaseException as error:
                os.write(2, f"{error!r} ".encode())
            finally:
                os._exit(status)
        if os.waitpid(forked, 0)[1]:
            os._exit(1)


if __name__ == "__main__":
    main()
