"""Peak memory of log-probabilities, entropies and whole steps, against logits that are all there at once.

Each side of a comparison runs in a process of its own, with one thread: peak resident memory above that of its inputs
(Linux), and CPU seconds, the median of the repeats, or one step. The usual way is written with torch's functions. For a
whole step it is the logits that the model's own head makes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import nn

from lora_gan.attention import TreeForward
from lora_gan.coefficients import Coefficients
from lora_gan.head import Logits, Statistic, entropy, log_probability, statistics
from lora_gan.optimization import OptimizationSettings

from .growth import Cost, Step, cost_of
from .peak import environment
from .setting import SIZES, save_model

OURS, USUAL = "ours", "all logits"
HEADER = f"""\
| what | {USUAL}, MB | ours, MB | times less | {USUAL}, s | ours, s | times faster |
|---|---:|---:|---:|---:|---:|---:|"""


@dataclass(frozen=True)
class Shape:
    """Tokens before a head with random weights, in float32."""

    name: str
    vocabulary: int
    width: int
    tokens: int


SHAPES = {
    "gpt2": Shape("GPT-2 124M", 50_257, 768, 768),
    "qwen": Shape("Qwen2.5-0.5B", 151_936, 896, 512),
    "tiny": Shape("tiny", 1000, 8, 16),
}
COUPLED = Coefficients(supervised=1.0, adversarial=0.5, kl=0.04, entropy=0.01, coupled=0.3)
CASES = {
    **{f"{name} logprobs": f"{SHAPES[name].name}, log-probabilities, forward + backward" for name in ("gpt2", "qwen")},
    **{f"{name} both": f"{SHAPES[name].name}, the same with entropies" for name in ("gpt2", "qwen")},
    "gpt2 step": "GPT-2 124M, a training step",
    "gpt2 apart": "GPT-2 124M, a step with micro_batch_size: 1",
    "gpt2 coupled": "GPT-2 124M, a step with entropy and the coupled loss",
}


def print_memory(repeats: int) -> None:
    """Measure all cases and print their table."""
    print(HEADER, flush=True)
    for case, what in CASES.items():
        usual, ours = (_in_own_process(case, side, repeats) for side in (USUAL, OURS))
        print(row(what, usual, ours), flush=True)
    print()


def row(what: str, usual: Cost, ours: Cost) -> str:
    """A line of the table."""
    less, faster = usual.megabytes / max(ours.megabytes, 1e-9), usual.seconds / ours.seconds
    memory = f"{usual.megabytes:,.0f} | {ours.megabytes:,.0f} | **{less:.1f}**"
    return f"| {what} | {memory} | {usual.seconds:.2f} | {ours.seconds:.2f} | {faster:.2f} |"


def _in_own_process(case: str, side: str, repeats: int) -> Cost:
    command = [sys.executable, "-m", "tests.benchmarks.memory", case, side, str(repeats)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


# in the process of a case


def measure(case: str, side: str, repeats: int) -> Cost:
    """The cost of one side."""
    torch.set_num_threads(1)
    name, _, what = case.partition(" ")
    if what in ("logprobs", "both"):
        return cost_of(Head(SHAPES[name], what == "both").side(side), repeats)
    with TemporaryDirectory() as folder:
        step = Step(SIZES[name], save_model(SIZES[name], Path(folder)))
        if what == "coupled":
            step.module.coefficients.set(**asdict(COUPLED))
        if what == "apart":
            step.module.optimization.settings = OptimizationSettings(micro_batch_size=1)
        with nullcontext() if side == OURS else mock.patch.object(TreeForward, "plain_head", None):
            return cost_of(step, 1)


class Head:
    """Hidden states with gradient, a frozen head, labels.

    Args:
        shape: The sizes.
        with_entropy: Whether there are entropies in the loss, too.
    """

    def __init__(self, shape: Shape, with_entropy: bool) -> None:
        torch.manual_seed(0)
        self.with_entropy = with_entropy
        self.layer = nn.Linear(shape.width, shape.vocabulary, bias=False).requires_grad_(False)
        nn.init.normal_(self.layer.weight, std=0.1)
        self.states = torch.randn(shape.tokens, shape.width, requires_grad=True)
        self.labels = torch.randint(shape.vocabulary, (shape.tokens,))
        self.weights = torch.randn(2, shape.tokens) / shape.tokens

    def side(self, side: str) -> Callable[[], Any]:
        """The work of one side."""
        return self.ours if side == OURS else self.usual

    def ours(self) -> torch.Tensor:
        """The gradient at the states, a few tokens at a time."""
        wanted = [Statistic(of) for of in (log_probability, entropy)[: 1 + self.with_entropy]]
        found = statistics(Logits(self.states, len(self.layer.weight), self.layer), self.labels, wanted)
        (gradient,) = torch.autograd.grad((found * self.weights[: len(wanted)]).sum(), self.states)
        return gradient

    def usual(self) -> torch.Tensor:
        """The same by plain torch."""
        logp = self.layer(self.states).log_softmax(-1)
        loss = (logp.gather(-1, self.labels[:, None])[:, 0] * self.weights[0]).sum()
        if self.with_entropy:
            loss = loss - ((logp.exp() * logp).sum(-1) * self.weights[1]).sum()
        (gradient,) = torch.autograd.grad(loss, self.states)
        return gradient


if __name__ == "__main__":
    print(json.dumps(asdict(measure(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
