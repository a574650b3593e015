"""Code reward: the program in a completion against the tests of its prompt."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError
from lora_gan.final_answer import FinalAnswer, find_answer
from lora_gan.rewards.base import Reward
from lora_gan.sandbox import Outcome, Program, Sandbox
from lora_gan.types import PromptBatch, RewardContext

log = logging.getLogger("lora_gan")

FENCED = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py)\b[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE | re.I)


class CodeReward(Reward):
    """Share of the prompt's tests that the completion's Python code passes; 0 where there is no code that runs.

    The code is the last block fenced as ``python``; without one, what the module's ``final_answer`` finds, or the whole
    completion. Prompts without tests (``Example.tests``, the field ``tests`` of the rows) are left out.

    Each completion runs in a process of its own that ends with it: with limits of time, memory and files, in an empty
    folder, without network, further processes and threads, with the standard library only. The tests run in another
    process, which sends calls and gets data back; so the code cannot see its tests, and has no influence on them but
    by what its functions return. This guards against accidents and against rewards that nothing was done for. It is
    no wall against an author who wants to break out: train on such prompts in a container or a virtual machine.

    What gets through: a completion that knows the values which are asked for, such as one that returns the constant
    of a single test; and, where a test compares two objects of classes of the completion, its own ``__eq__``. What a
    test gives to the code must be data (numbers, texts, lists, …) or objects that come from it.

    Args:
        weight: Factor in the total reward.
        partial: The share of the tests; false: 1 if all of them pass, else 0.
        timeout: Seconds for a completion with all of its tests.
        memory: MiB of a completion's address space. macOS does not limit it.
        workers: Completions that run at once.
        name: Name in the logs, ``reward/<name>``.

    Raises:
        LoraGANError: A limit is out of range, or the machine cannot run programs with limits, as Windows.
    """

    def __init__(
        self,
        weight: float = 1.0,
        partial: bool = True,
        timeout: float = 3.0,
        memory: int = 512,
        workers: int = 2,
        name: str = "code",
    ) -> None:
        super().__init__(weight, name)
        if not 0 < timeout < math.inf or memory < 1 or workers < 1:
            raise LoraGANError(
                f"timeout must be above 0, memory and workers at least 1; got {timeout}, {memory} and {workers}"
            )
        self.partial = partial
        self.sandbox = Sandbox(timeout, memory, workers)
        self.warned: set[str] = set()
        missing = [what for what, there in vars(self.sandbox.check()).items() if not there]
        if missing:
            log.warning(
                "reward %s: the kernel does not keep completions from %s here; a hook in Python refuses it alone",
                name,
                " and ".join(missing),
            )

    def applies(self, batch: PromptBatch, k: int) -> list[bool]:
        return [bool(example.tests) for example in batch.examples]

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        tests = [batch.examples[n // context.num_generations].tests for n in range(len(completions))]
        programs = [
            Program(code_in(completion, context.final_answer), given)
            for completion, given in zip(completions, tests, strict=True)
        ]
        written = [program for program in programs if program.code]
        outcomes = dict(zip(written, self.sandbox.run(written), strict=True))
        return torch.tensor([self._score(outcomes.get(program)) for program in programs], dtype=torch.float32)

    def _score(self, outcome: Outcome | None) -> float:
        if outcome is None:
            return 0.0
        for test, kind in outcome.unsendable.items():
            if test not in self.warned:
                self.warned.add(test)
                log.warning(
                    "reward %s: no completion can pass the test %r: it gives the code a %s, not data; rewrite or "
                    "delete the test",
                    self.name,
                    test,
                    kind,
                )
        share = sum(outcome.passed) / len(outcome.passed)
        return share if self.partial else float(share == 1)


def code_in(completion: str, final_answer: FinalAnswer | None) -> str:
    """The code of a completion; empty where it has none."""
    blocks = FENCED.findall(completion)
    return (blocks[-1] if blocks else find_answer(completion, final_answer) or "").strip("\n")
