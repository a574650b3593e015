"""A run that is interrupted and resumed equals one that is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lora_gan import LoraGAN
from lora_gan.backbone import BackboneSettings
from lora_gan.discriminator.replay import Replay
from lora_gan.evolution import EvolutionModule
from lora_gan.losses import ClippedPPO
from lora_gan.module import LoraGANModule
from lora_gan.sampling import Sampling
from lora_gan.stepper import Stepper
from tests.helpers.generations import everything
from tests.helpers.steps import fit, share_of_a

from .machine import Machine
from .rows import Check, Finding, Skip
from .training import both_roles, make_batches, make_module


def with_replay(dtype: str) -> LoraGANModule:
    return make_module(replay=Replay(4, 2), dtype=dtype)


def with_ppo(dtype: str) -> LoraGANModule:
    return make_module(policy_loss=ClippedPPO(num_iterations=2), coupled=0.0, dtype=dtype)


def with_evolution(dtype: str) -> EvolutionModule:
    return everything("builtin", dtype=dtype)


def resumed(
    machine: Machine, make: Callable[[str], LoraGANModule], precision: str, deterministic: bool, steps: int
) -> Finding:
    """Steps in one run, and half of them in a run that is resumed for the other half: all weights."""
    if precision == "16-mixed" and not machine.is_cuda:
        raise Skip("16-mixed needs a CUDA GPU")
    accelerator = "gpu" if machine.is_cuda else "cpu"
    how: dict[str, Any] = {"accelerator": accelerator, "devices": 1, "precision": precision}
    how["deterministic"] = deterministic
    dtype = "float32" if precision == "32-true" else "bfloat16"
    whole, half, rest = (make(dtype) for _ in range(3))
    batches = make_batches(whole, 1)  # an epoch each, so that a resumed run goes on with the next one
    with TemporaryDirectory() as folder:
        path = Path(folder, "half.ckpt")
        fit(whole, batches, steps, **how)
        _, trainer = fit(half, batches, steps // 2, **how)
        trainer.save_checkpoint(path)
        fit(rest, batches, steps, ckpt_path=str(path), **how)
    difference = float((both_roles(whole) - both_roles(rest)).abs().max())
    moved = float((both_roles(whole) - both_roles(make(dtype))).abs().max())
    text = f"largest difference {difference:.1e}, moved {moved:.1e}"
    if not deterministic:
        text += ", printed only"
    return Finding(text, moved > 0 and (difference == 0 or not deterministic), {"difference": difference})


def moved_to_cpu(machine: Machine) -> Finding:
    """A checkpoint of the Python API, written on a GPU and loaded on a CPU."""
    with TemporaryDirectory() as folder:
        common: dict[str, Any] = {"checkpoints": folder, "seed": 0, "backbone": BackboneSettings("float32")}
        written, read = (
            LoraGAN(device=device, sampling=Sampling(max_new_tokens=4), compute_reward=share_of_a, **common)
            for device in (machine.device.type, "cpu")
        )
        written.step("Say hello.", "Hello.")
        written.save_checkpoint(1)
        read.load_checkpoint(1)
    same = torch.equal(both_roles(written.module), both_roles(read.module))
    return Finding("equal weights" if same else "other weights", same)


def nondeterministic(machine: Machine) -> Finding:
    """Operations of a step that torch reports when asked for deterministic algorithms alone."""
    module = make_module()
    stepper = Stepper(module, machine.device, "bf16-mixed")
    batches = make_batches(module, 2)
    stepper.step(batches[0])
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stepper.step(batches[1])
    messages = [str(w.message) for w in caught if "determinis" in str(w.message)]
    said = sorted({m.split(" ")[0] for m in messages if "defaults to" not in m})  # else it obeys, unless only warned
    return Finding(", ".join(said) or "none", not said, {"operations": len(said)})


def row(name: str, make: Callable[[str], Any], precision: str, deterministic: bool = True, steps: int = 4) -> Check:
    run = partial(resumed, make=make, precision=precision, deterministic=deterministic, steps=steps)
    flag = "deterministic" if deterministic else "not deterministic"
    threshold = "bit for bit" if deterministic else "printed"
    return Check("resume", f"{name}, {precision}, {flag}", threshold, run, 7)


CHECKS = [
    row("replay", with_replay, "32-true"),
    row("replay", with_replay, "bf16-mixed"),
    row("replay", with_replay, "16-mixed"),
    row("replay", with_replay, "bf16-mixed", deterministic=False),
    row("PPO", with_ppo, "bf16-mixed"),
    row("evolution", with_evolution, "bf16-mixed", steps=2),
    Check("resume", "operations that are not deterministic", "none", nondeterministic, 5),
    Check("resume", "API checkpoint, CUDA → CPU", "loads", moved_to_cpu, 8, gpus=1),
]
