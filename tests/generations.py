"""Runs of evolution in which every part takes part, for the tests of who does the errands."""

from __future__ import annotations

import math
from typing import Any

import torch
from rounds import Recorder
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR

from lora_gan.advantages import MovingAverage
from lora_gan.backbone import LoraSettings
from lora_gan.evolution import EvolutionModule, GaussianMutation
from lora_gan.evolution.lowrank import Weights, inner, total
from lora_gan.replay import Replay
from lora_gan.rewards import FunctionReward
from lora_gan.sampling import Sampling

Run = tuple[EvolutionModule, Recorder]


def rms(weights: Weights) -> float:
    """Root mean square of all numbers of all ΔW."""
    size = sum(x.size for x in weights.values())
    return math.sqrt(sum(max(inner(x, x), 0.0) for x in weights.values()) / size)


def distance(x: Weights, y: Weights) -> float:
    """Root mean square of ΔW_x − ΔW_y, of two members alone."""
    return rms({name: total([x[name], y[name]], [1.0, -1.0]) for name in x})


def graded(response: str, target: str) -> float:
    """A number that hardly any two answers share; greedy answers of the tiny model contain no "a"."""
    return sum(ord(c) % 31 for c in response) / 100 + len(target)


def falling(optimizer: Optimizer) -> StepLR:
    return StepLR(optimizer, 1, 0.9)


def everything(base: str, **changed: Any) -> EvolutionModule:
    """Elites, two refined members, a discriminator that learns, replay, schedules; fitness by the first prompt."""
    torch.manual_seed(4)
    settings: dict[str, Any] = {
        "base": base,
        "population": 4,
        "elites": 1,
        "refined": 2,
        "refinement_rounds": 2,
        "members_at_once": 2,
        "evaluation_prompts": 1,
        "evaluation_answers": 3,
        "mutation": GaussianMutation(0.03),
        "answers_per_prompt": 2,
        "sampling": Sampling(max_new_tokens=5),
        "rewards": [FunctionReward(graded)],
        "advantage": MovingAverage(),
        "discriminator_updates": 1,
        "adversarial_weight": 0.5,
        "replay": Replay(4, 2),
        "generator_scheduler": falling,
        "discriminator_scheduler": falling,
        "generator_lora": LoraSettings(4, 8),
        "discriminator_lora": LoraSettings(4, 8),
    }
    return EvolutionModule(**{**settings, **changed})


def same_runs(one: Run, other: Run) -> None:
    """Bit for bit: what was logged, reports, learning rates and weights after each generation, and the population."""
    (mine, told), (theirs, heard) = one, other
    logged, wanted = mine.trainer.callback_metrics, theirs.trainer.callback_metrics
    assert logged == wanted and logged["reward/total"] == told.reports[-1]["reward/total"]
    assert told.reports == heard.reports and "loss/discriminator" in told.reports[-1]
    assert told.rates == heard.rates and told.rates[0] != told.rates[-1]
    for weights, wanted in zip(told.weights, heard.weights, strict=True):
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
