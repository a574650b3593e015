"""The sandbox: outcomes by hand, and every way that is known to get a point without the work."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lora_gan import sandbox
from lora_gan.errors import LoraGANError
from lora_gan.sandbox import Program, Sandbox

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of processes")
TESTS = ("assert add(1, 2) == 3", "assert add(0, 0) == 1", "assert add('a', 'b') == 'ab'")
ADD = "def add(a, b):\n    "


def passed(code: str, *tests: str, timeout: float = 5.0, memory: int = 512) -> list[bool]:
    (outcome,) = Sandbox(timeout, memory, workers=1).run([Program(code, tests or TESTS)])
    return list(outcome.passed)


# outcomes


def test_outcomes_by_hand() -> None:
    assert passed(ADD + "return a + b") == [True, False, True]
    assert passed(ADD + "return 3") == [True, False, False]
    assert passed(ADD + "return 1 / 0") == passed("x = 1") == [False] * 3
    assert passed("def add(a, b: return") == passed("\0") == passed("import nothing") == [False] * 3
    assert passed("import math, re, collections, heapq\nfrom typing import List\n" + ADD + "return a + b")[0]


@pytest.mark.parametrize(
    "value",
    [
        *("None", "True", "-7", "10**40", "1.5", "float('inf')", "2j", "'é\\n'", "b'\\0'", "range(3)"),
        *("[1, [2]]", "(1, ())", "{1, 2}", "frozenset({1})", "{'a': [1], (1, 2): None}"),
    ],
)
def test_data_cross_as_they_are(value: str) -> None:
    test = f"assert same({value}) == {value} and type(same({value})) is type({value})"
    if value == "range(3)":  # an object, which is no data
        test = f"assert list(value()) == list({value}) and value()[1] == 1 and len(value()) == 3"
    assert passed(f"def same(x): return x\ndef value(): return {value}", test) == [True]


def test_subclasses_of_data_are_data() -> None:
    code = "import collections, enum\nclass Kind(str, enum.Enum):\n    A = 'a'\ndef kind(): return Kind.A\n"
    code += "def count(x): return collections.Counter(x)\ndef pair(): return collections.namedtuple('P', 'a b')(1, 2)"
    assert (
        passed(code, "assert kind() == 'a'", "assert count('aab') == {'a': 2, 'b': 1}", "assert pair() == (1, 2)")
        == [True] * 3
    )


def test_objects_of_the_code() -> None:
    code = """
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __eq__(self, other): return self.items == other.items
    def __str__(self): return "Stack"
def size(stack): return len(stack)
def count():
    n = 0
    while True:
        yield n
        n += 1
"""
    tests = (
        "s = Stack(); s.push(4); s.push([1]); assert s.pop() == [1] and len(s) == 1 and s and str(s) == 'Stack'",
        "s = Stack(); s.push(1); assert size(s) == 1 and s != Stack() and Stack() == Stack() and not Stack()",
        "try:\n    Stack().pop()\nexcept IndexError:\n    pass\nelse:\n    assert False",
        "import itertools\nassert list(itertools.islice(count(), 3)) == [0, 1, 2]",
        "def check(f):\n    assert f(Stack()) == 0\ncheck(size)",
    )
    assert passed(code, *tests) == [True] * 5


def test_any_name_of_an_argument_is_the_codes() -> None:
    names = "self", "operation", "thing", "function", "args"
    code = f"def f({', '.join(names)}): return [{', '.join(names)}]"
    assert passed(code, f"assert f({', '.join(f'{name}={n}' for n, name in enumerate(names))}) == [0, 1, 2, 3, 4]") == [
        True
    ]


def test_names_of_builtins_are_the_codes_only_where_nothing_else_is() -> None:
    code = "def sum(a, b=0): return 3\ndef sorted(x): return [1]\ndef solve(x): return x\nmath = sum"
    assert passed(code, "assert sum(1, 2) == 3", "assert sorted(solve([2])) == [1]", "assert sum(solve([2])) == 3") == [
        *(True, False, False)
    ]
    assert passed(code, "import math\nassert math.isclose(solve(1), 2)") == [False]


def test_what_is_no_data_cannot_be_given_to_the_code() -> None:
    tests = ("assert f(lambda: 1) == 1", "assert f(1) == 1")
    (outcome,) = Sandbox(workers=1).run([Program("def f(x): return 1", tests)])
    assert (outcome.passed, outcome.unsendable) == ((False, True), {tests[0]: "function"})


def test_each_program_and_each_test_has_names_of_its_own() -> None:
    first = Program("import math\nmath.pi = 3\nseen = 1", ("import math\nx = seen", "assert 'x' not in globals()"))
    second = Program("import math", ("assert 3.1 < math.pi < 3.2", "assert seen"))
    outcomes = Sandbox(workers=1).run([first, second, first])
    assert [outcome.passed for outcome in outcomes] == [(True, True), (True, False), (True, True)]
    assert outcomes[0] is outcomes[2], "equal programs run once"


# points without the work

EQUAL = "class Equal:\n    def __eq__(self, other): return True\n    __lt__ = __gt__ = __contains__ = __eq__\n"
FORGED = """
import marshal, os
def add(a, b):
    for content in (([True] * 3, {}), ("value", True)):
        data = marshal.dumps(content)
        for file in range(64):
            try: os.write(file, (len(data).to_bytes(8, "little") + data) * 9)
            except OSError: pass
    print(content)
"""
BESIDE = """
import _posixsubprocess, os
def add(a, b):
    command, (r, w), none = [b"/bin/true"], os.pipe(), (None, None, None, -1, None)
    _posixsubprocess.fork_exec(command, command, True, (), None, None, *[-1] * 6, r, w, False, False, -1, *none)
    return a + b
"""
ATTACKS = {
    "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit in a call": ADD + "raise SystemExit(0)",
    "os._exit": "import os\nos._exit(0)",
    "os._exit in a call": ADD + "import os; os._exit(0)",
    "an exception": "raise AssertionError",
    "an object that equals everything": EQUAL + ADD + "return Equal()",
    "one in a list": EQUAL + ADD + "return [Equal()]",
    "a number that equals everything": EQUAL + "class Number(Equal, int): pass\n" + ADD + "return Number()",
    "a forged report": FORGED,
    "built-ins replaced": "import builtins\nbuiltins.AssertionError = None\nbuiltins.compile = builtins.exec = print\n"
    "builtins.list = builtins.isinstance = builtins.type = lambda *x: True\n" + ADD + "return None",
    "names of the test replaced": "def assert_(*x): pass\n__builtins__ = {}\n" + ADD + "return None",
    "the runner replaced": "import sys\nmain = sys.modules['__main__']\nfor name in list(vars(main)):\n"
    "    setattr(main, name, lambda *x, **y: True)\n" + ADD + "return None",
    "at the end": "import atexit, signal, os\natexit.register(os._exit, 0)\nsignal.signal(14, lambda *x: os._exit(0))\n"
    + ADD
    + "return None",
    "endless recursion": ADD + "return add(a, b)",
    "a list in itself": ADD + "x = []; x.append(x); return x",
    "a deep list": ADD + "x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "a full memory": ADD + "return bytearray(10**10)",
    "a long text": ADD + "return 'a' * 10**8",
    "a fork": "import os\ndef add(a, b):\n    while True: os.fork()",
    "a fork beside the hook": BESIDE,
    "a thread": "import threading\n" + ADD + "threading.Thread(target=print).start(); return a + b",
    "a command": "import subprocess\n" + ADD + "subprocess.run(['true']); return a + b",
    "a shell": "import os\n" + ADD + "os.system('true'); return a + b",
    "a signal": "import os\n" + ADD + "os.kill(os.getppid(), 9); return a + b",
    "C": "import ctypes\n" + ADD + "ctypes.CDLL(None).getpid(); return a + b",
    "a socket": "import socket\n" + ADD + "socket.socket(); return a + b",
    "a large file": ADD + "open('x', 'wb').write(b'a' * 10**7); return a + b",
    "many files": ADD + "for n in range(99): open(str(n), 'w').close()\n    return a + b",
    "many open files": "import os\n" + ADD + "for n in range(99): os.pipe()\n    return a + b",
    "a file elsewhere": ADD + "open('/tmp/lora_gan_was_here', 'w').close(); return a + b",
    "a way out of the folder": ADD + "open('../lora_gan_was_here', 'w').close(); return a + b",
    "a file that is there": ADD + "open('/etc/passwd').read(); return a + b",
    "a deletion": "import shutil\n" + ADD + "shutil.rmtree('/nothing/of/the/name'); return a + b",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_gained_by(attack: str) -> None:
    assert passed(ATTACKS[attack]) == [False] * 3
    assert not Path("/tmp/lora_gan_was_here").exists()


def test_the_attacks_fail_for_their_own_reason() -> None:
    """Files in the own folder, an own exception and much memory are permitted."""
    harmless = "open('x', 'w').write('1'); bytearray(10**7); return a + b"
    assert passed(ADD + harmless) == [True, False, True]


@pytest.mark.parametrize(
    "loop", ["while True: pass", "import time; time.sleep(99)", "import os; os.setsid(); os.read(9, 1)"]
)
def test_what_does_not_end_is_ended(loop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that has passed before counts; nothing is left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tests = ("assert f(0) == 0", "assert f(1) == 0", "try:\n    f(1)\nexcept:\n    pass", "assert f(0) == 0")
    code = f"import os\nhold = os.pipe()\nos.dup2(hold[0], 9)\ndef f(x):\n    if x:\n        {loop}\n    return 0"
    begun = time.monotonic()
    assert passed(code, *tests, timeout=0.3) == [True, False, False, False]
    assert time.monotonic() - begun < 4
    assert list(tmp_path.iterdir()) == [] == working_in(tmp_path)


def test_a_test_that_does_not_end_is_ended_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a computation that no signal interrupts; the code goes with it, wherever it has gone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sandbox, "GRACE", 0.3)
    programs = [Program("import os\nos.setsid()\nx = 9", ("assert 9 ** x ** x == 0",)), Program("x = 1", ("assert x",))]
    assert [outcome.passed for outcome in Sandbox(0.3, workers=1).run(programs)] == [(False,), (True,)]
    assert list(tmp_path.iterdir()) == []
    if sys.platform == "linux":
        assert working_in(tmp_path) == []


def working_in(folder: Path) -> list[int]:
    """The processes with a working directory below ``folder``, after what has been ended is gone."""
    time.sleep(0.05)
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found += [int(process.name)] * os.readlink(process / "cwd").startswith(str(folder))
        except OSError:
            continue
    return found


def test_the_code_sees_no_test() -> None:
    """Not in its memory, the frames above it, the main module or the arguments."""
    spy = """
import gc, os, sys
def spy(given):
    needle, frame = "".join(("xyz", "zy")), sys._getframe()
    seen = [repr([sys.argv, os.environ]), *map(repr, vars(sys.modules["__main__"]).values())]
    while frame:
        seen += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    for thing in gc.get_objects():
        seen += gc.get_referents(thing)
    return any(type(x) is str and needle in x and x != needle for x in seen)
"""
    assert passed(spy, "assert spy('') is False, 'xyzzy'", "assert spy('another xyzzy')") == [True, True]


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_without_the_hook_there_is_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernel alone: a child without the audit hook cannot reach a server of this machine."""
    if not Sandbox(workers=1).check().network:
        pytest.skip("this machine permits no namespaces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\ndef reach(): socket.create_connection(('127.0.0.1', {port}), 1)\n"
        tests = ("try:\n    reach()\nexcept PermissionError:\n    pass", "try:\n    reach()\nexcept OSError:\n    pass")
        assert passed(code, *tests) == [True, True], "the hook"
        copy = tmp_path / "child.py"
        copy.write_text(sandbox.CHILD.read_text().replace("    sys.addaudithook(refuse)\n", ""))
        monkeypatch.setattr(sandbox, "CHILD", copy)
        assert passed(code, *tests) == [False, True], "the kernel: network is unreachable"


def test_programs_run_at_once() -> None:
    programs = [Program(f"import time\ntime.sleep(0.4)\nx = {n}", (f"assert x == {n}",)) for n in range(8)]
    begun = time.monotonic()
    assert all(outcome.passed == (True,) for outcome in Sandbox(workers=8).run(programs))
    assert time.monotonic() - begun < 0.4 * 8


def test_a_sandbox_that_cannot_run_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Sandbox().run([]) == []
    with pytest.raises(LoraGANError, match=r"raise its memory \(1 MiB\)|cannot run a program"):
        Sandbox(memory=1).check()
    broken = tmp_path / "child.py"
    broken.write_text("raise RuntimeError('no')")
    monkeypatch.setattr(sandbox, "CHILD", broken)
    with pytest.raises(LoraGANError, match=r"the sandbox does not start: (?s:.*)RuntimeError: no"):
        Sandbox().check()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(LoraGANError, match="on Linux and macOS only"):
        Sandbox().check()
