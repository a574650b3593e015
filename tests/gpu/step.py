"""A training step against that of TRL's GRPOTrainer: seconds, phases, peak memory."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

from lora_gan.backbone import BackboneSettings

from .decode import dtype_of
from .machine import Machine
from .models import random_base, random_model
from .rows import Check, Finding, Skip


def turns_of(machine: Machine, repeats: int = 3) -> Any:
    """Steps of both sides in turns, with gradient checkpointing on a GPU, which is TRL's default."""
    if find_spec("trl") is None:
        raise Skip("trl is not installed: pip install trl==1.16.0")
    from tests.benchmarks.steps import Ours, take_turns  # needs TRL

    dtype, size = dtype_of(machine), machine.small
    precision = "bf16-mixed" if machine.is_cuda else "32-true"
    settings = BackboneSettings(str(dtype).removeprefix("torch."), gradient_checkpointing=machine.is_cuda)
    ours = Ours(size, random_base(size, machine.device, dtype), machine.device, precision, settings)
    ours.module.waits_for_device = True  # so that the seconds of the phases are those of the GPU
    return take_turns(size, ours, random_model(size, machine.device, dtype), repeats)


def against_trl(machine: Machine, kind: str, faster: float) -> Finding:
    """ "rl" does what TRL's step does; "adversarial" also has the discriminator and the targets."""
    turns = machine.keep("turns", lambda: turns_of(machine))
    ours, theirs = turns.costs[kind], turns.costs["trl"]
    ratios = [other.seconds / mine.seconds for mine, other in zip(ours, theirs, strict=True)]
    ratio, seconds = median(ratios), median(cost.seconds for cost in ours)
    peak, other_peak = (max(cost.bytes for cost in costs) / 1e9 for costs in (ours, theirs))
    phases = ", ".join(f"{name} {spent:.2f}" for name, spent in turns.phases[kind].items())
    text = f"{seconds:.2f} s, TRL × {ratio:.2f} [{min(ratios):.2f}–{max(ratios):.2f}], {phases}"
    if machine.is_cuda:
        text += f", peak {peak:.1f} GB, TRL {other_peak:.1f} GB"
    passed = ratio >= faster and (kind != "rl" or peak <= other_peak)
    return Finding(text, passed, {"seconds": seconds, "ratio": ratio, "peak": peak, "trl_peak": other_peak})


CHECKS = [
    Check(
        "step",
        "the work of TRL's step",
        "≥ 1.5 × TRL, peak ≤ TRL's",
        partial(against_trl, kind="rl", faster=1.5),
        80,
        speed=True,
    ),
    Check(
        "step",
        "with discriminator and targets",
        "≥ 1.0 × TRL",
        partial(against_trl, kind="adversarial", faster=1.0),
        1,
        speed=True,
    ),
]
