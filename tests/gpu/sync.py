"""How often the host waits for the GPU, and how many operations it launches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lora_gan.sampling import Sampling, sample
from lora_gan.stepper import Stepper

from .machine import Machine
from .rows import Check, Finding
from .sample import prompts_of
from .training import make_batches, make_module

SHORT, LONG = 32, 96  # tokens; from the difference follows what each token costs


def waits(work: Callable[[], Any]) -> int:
    """How often ``work`` waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(w.message) for w in caught)


def launches(work: Callable[[], Any]) -> int:
    """How many kernels and graphs ``work`` launches."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        work()
        torch.cuda.synchronize()
    return sum(event.count for event in profiled.key_averages() if "Launch" in event.key)


def decoding(machine: Machine) -> Finding:
    """Per token of a decode of 64 rows."""
    backbone = machine.backbone(machine.small, torch.bfloat16)
    prompts = prompts_of(machine, backbone, 8)

    def decode(tokens: int) -> None:
        with torch.autocast(machine.device.type, torch.bfloat16), backbone.generator():
            sample(backbone, prompts, 8, Sampling(max_new_tokens=tokens))

    decode(SHORT)
    waited, launched = (
        (count(lambda: decode(LONG)) - count(lambda: decode(SHORT))) / (LONG - SHORT) for count in (waits, launches)
    )
    text = f"{waited:.2f} waits and {launched:.0f} launches a token"
    return Finding(text, waited <= 0.1 and 0 < launched <= 30, {"waits": waited, "launches": launched})


def stepping(machine: Machine) -> Finding:
    """A training step with all losses, its sampling included."""
    module = make_module(dtype="bfloat16")
    stepper = Stepper(module, machine.device, "bf16-mixed")
    batches = make_batches(module, 3)
    for batch in batches[:2]:
        stepper.step(batch)
    waited = waits(lambda: stepper.step(batches[2]))
    return Finding(f"{waited} waits", waited <= 100, {"waits": waited})


CHECKS = [
    Check("sync", "decoding", "≤ 0.1 waits and ≤ 30 launches a token", decoding, 15, gpus=1),
    Check("sync", "training step", "≤ 100 waits", stepping, 8, gpus=1),
]
