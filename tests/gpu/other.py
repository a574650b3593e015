"""Small costs: sentence embeddings, mode switches, children of a population; and several GPUs."""

from __future__ import annotations

import subprocess
import sys
from itertools import count
from pathlib import Path

import torch

from lora_gan.backbone import Backbone
from lora_gan.errors import LoraGANError
from lora_gan.evolution.operators import MixUpdates
from lora_gan.evolution.population import read_weights
from lora_gan.sentence_encoder import sentence_encoder

from .machine import Machine, randomised
from .rows import Check, Finding, Skip

ROOT = Path(__file__).parents[2]
TESTS = ("tests/system/test_distributed.py", "-k", "two_gpus")
_numbers = count()


def embeddings(machine: Machine) -> Finding:
    """New texts; fewer on a CPU."""
    texts = 128 if machine.is_cuda else 16
    try:
        encoder = sentence_encoder("all-MiniLM-L6-v2")
    except LoraGANError as error:
        raise Skip(str(error)) from error
    encoder.model.to(machine.device)

    def work() -> None:
        encoder.encode([f"{'word ' * (5 + n % 40)}{next(_numbers)}" for n in range(texts)])

    ms = 1e3 * machine.seconds(work)
    return Finding(f"{texts} texts {ms:.1f} ms", ms <= 50, {"ms": ms})


def modes(machine: Machine) -> Finding:
    """Twelve switches to an adapter and back."""
    backbone = machine.backbone(machine.small, torch.bfloat16)

    def work() -> None:
        for _ in range(6):
            with backbone.generator(), backbone.discriminator():
                pass

    ms = 1e3 * machine.seconds(work)
    return Finding(f"{ms:.2f} ms", ms <= 5, {"ms": ms})


def children(machine: Machine) -> Finding:
    """Eight children of two parents by MixUpdates."""
    backbone: Backbone = machine.backbone(machine.small, torch.bfloat16)
    parents = [read_weights(randomised(backbone)) for _ in range(2)]
    cross, rng = MixUpdates(), torch.Generator().manual_seed(0)
    ms = 1e3 * machine.seconds(lambda: [cross(parents, rng) for _ in range(8)], 1)
    return Finding(f"{ms:.0f} ms", ms <= 1000, {"ms": ms})


def two_gpus(machine: Machine) -> Finding:
    """The tests of two processes with NCCL, which do what one does with the union of their batches."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--import-mode=importlib", *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    said = (done.stdout.strip().splitlines() or ["pytest said nothing"])[-1]
    return Finding(said, done.returncode == 0 and " passed" in said)


CHECKS = [
    Check("other", "128 texts, all-MiniLM-L6-v2", "≤ 50 ms", embeddings, 8, speed=True),
    Check("other", "12 mode switches", "≤ 5 ms", modes, 5, speed=True),
    Check("other", "8 children by MixUpdates", "≤ 1,000 ms", children, 10, speed=True),
    Check("other", "two GPUs with NCCL against one", "the tests pass", two_gpus, 120, gpus=2),
]
