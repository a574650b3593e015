"""Evolution runs that use every part, and bit-for-bit comparisons of runs, for the tests of workers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from lora_gan.advantages import MovingAverage
from lora_gan.backbone import LoraSettings
from lora_gan.discriminator.replay import Replay
from lora_gan.evolution import EvolutionModule, GaussianMutation
from lora_gan.evolution.lowrank import Weights, inner, total
from lora_gan.rewards import FunctionReward
from lora_gan.sampling import Sampling
from tests.helpers.settings import grouped
from tests.helpers.steps import Recorder

Run = tuple[EvolutionModule, Recorder]


def rms(weights: Weights) -> float:
    """Root mean square of all elements of all ΔW."""
    size = sum(x.size for x in weights.values())
    return math.sqrt(sum(max(float(inner(x, x)), 0.0) for x in weights.values()) / size)


def distance(x: Weights, y: Weights) -> float:
    """Root mean square of ΔW_x − ΔW_y."""
    return rms({name: total([x[name], y[name]], [1.0, -1.0]) for name in x})


def graded(response: str, target: str) -> float:
    """A number that hardly any two completions share; greedy completions of the tiny model contain no "a"."""
    return sum(ord(c) % 31 for c in response) / 100 + len(target)


def adamw(parameters: Iterable[Tensor]) -> AdamW:
    """The default optimizer; pickle cannot take the default itself, a lambda."""
    return AdamW(parameters, lr=1e-3, weight_decay=0.0)


def decaying(optimizer: Optimizer) -> StepLR:
    return StepLR(optimizer, 1, 0.9)


def everything(base: str, **changed: Any) -> EvolutionModule:
    """Elites, two refined members, a discriminator that learns, replay, schedules; fitness by the first prompt."""
    torch.manual_seed(4)
    settings: dict[str, Any] = {
        "base": base,
        "population": 4,
        "elites": 1,
        "refined": 2,
        "refinement_steps": 2,
        "members_at_once": 2,
        "evaluation_prompts": 1,
        "evaluation_num_generations": 3,
        "mutation": GaussianMutation(0.03),
        "num_generations": 2,
        "sampling": Sampling(max_new_tokens=5),
        "rewards": [FunctionReward(graded)],
        "advantage": MovingAverage(),
        "discriminator_updates": 1,
        "adversarial": 0.5,
        "replay": Replay(4, 2),
        "generator_optimizer": adamw,
        "discriminator_optimizer": adamw,
        "generator_scheduler": decaying,
        "discriminator_scheduler": decaying,
        "generator_lora": LoraSettings(4, 8),
        "discriminator_lora": LoraSettings(4, 8),
    }
    return EvolutionModule(**grouped({**settings, **changed}))


def same_runs(one: Run, other: Run) -> None:
    """Bit for bit: metrics, learning rates and weights after each generation, and the population."""
    (mine, recorded), (theirs, expected) = one, other
    logged, wanted = mine.trainer.callback_metrics, theirs.trainer.callback_metrics
    assert logged == wanted and logged["reward/total"] == recorded.reports[-1]["reward/total"]
    assert recorded.reports == expected.reports and "loss/discriminator" in recorded.reports[-1]
    assert recorded.rates == expected.rates and recorded.rates[0] != recorded.rates[-1]
    for weights, wanted in zip(recorded.weights, expected.weights, strict=True):
        same(weights, wanted)
    assert len(mine.population) == len(theirs.population)
    for member, wanted in zip(mine.population, theirs.population, strict=True):
        same(member.state(), wanted.state())
    same(mine.discriminator.replay.state_dict(), theirs.discriminator.replay.state_dict())


def same(x: Any, y: Any) -> None:
    """Equal, tensors bit for bit."""
    if isinstance(x, dict):
        assert x.keys() == y.keys()
        for name in x:
            same(x[name], y[name])
    elif isinstance(x, list | tuple):
        assert len(x) == len(y)
        for a, b in zip(x, y, strict=True):
            same(a, b)
    elif isinstance(x, Tensor):
        assert torch.equal(x, y)
    else:
        assert x == y
