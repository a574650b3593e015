"""Engines of other libraries: their log-probabilities against a pass of the model that learns, and their speed."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from time import perf_counter

import torch

from lora_gan.backbone import Backbone, LoraSettings
from lora_gan.bases import SMOLLM2
from lora_gan.engines import ContinuousBatching, Engine, InProcess, Vllm
from lora_gan.errors import LoraGANError
from lora_gan.sampling import Sampling
from lora_gan.tensors import kl_k3
from lora_gan.tree import grow_scored
from lora_gan.types import Rollout

from .machine import Machine, randomised
from .rows import Check, Finding, Skip
from .sample import BF16, F32, KIND, prompts_of
from .tree import computing_in


def batching(machine: Machine) -> ContinuousBatching:
    """With a cache that fits the memory of a GPU, or a small one."""
    if machine.is_cuda:
        return ContinuousBatching()
    return ContinuousBatching(num_blocks=64, max_batch_tokens=64, page_size=8)


@torch.no_grad()
def mismatch(backbone: Backbone, rollout: Rollout, machine: Machine, dtype: torch.dtype, limit: float) -> Finding:
    """The log-probabilities of an engine against those of a pass over the prompt tree."""
    prompts = prompts_of(machine, backbone, rollout.ids.shape[0] // rollout.num_generations)
    tree = grow_scored(prompts, {KIND: rollout.by_prompt(len(prompts))})
    with computing_in(machine, dtype), backbone.generator():
        wanted = backbone.logprobs(tree, {KIND: 1.0})[KIND][rollout.mask]
    found = rollout.logprobs[rollout.mask]
    mean, k3 = float((found - wanted).abs().mean()), float(kl_k3(found, wanted).mean())
    return Finding(f"mean {mean:.1e} k3 {k3:.1e}", k3 <= limit, {"mean": mean, "k3": k3})


def continuous(machine: Machine, dtype: torch.dtype) -> Finding:
    backbone = machine.backbone(machine.small, dtype)
    prompts, how = prompts_of(machine, backbone, 4), Sampling(max_new_tokens=64 if machine.is_cuda else 6)
    with computing_in(machine, dtype), backbone.generator():
        rollout = batching(machine)(backbone, prompts, 4, how)
    return mismatch(backbone, rollout, machine, dtype, 1e-6 if dtype == F32 else 1e-3)


def vllm(machine: Machine) -> Finding:
    """SmolLM2 with a random adapter, which is loaded twice with other weights."""
    if not machine.is_cuda or find_spec("vllm") is None:
        raise Skip("needs a CUDA GPU and vllm")
    try:
        backbone = Backbone(SMOLLM2, LoraSettings(rank=8), LoraSettings(rank=8)).to(machine.device)
    except LoraGANError as error:
        raise Skip(f"needs SmolLM2: {error}") from error
    engine, prompts, how = Vllm(0.3, 512), prompts_of(machine, backbone, 8), Sampling(max_new_tokens=64)
    for _ in range(2):
        randomised(backbone, 0.02)
        rollout = engine(backbone, prompts, 4, how)
    return mismatch(backbone, rollout, machine, F32, 1e-2)


def speed(machine: Machine) -> Finding:
    """Tokens a second of continuous batching against this process."""
    backbone = machine.backbone(machine.small, BF16)
    prompts, how = prompts_of(machine, backbone, 32), Sampling(max_new_tokens=128)
    took = {}
    for engine in (InProcess(), batching(machine)):
        with computing_in(machine, BF16), backbone.generator():
            took[type(engine).__name__] = min(timed(engine, backbone, prompts, how) for _ in range(2))
    ratio = took["InProcess"] / took["ContinuousBatching"]
    return Finding(f"{ratio:.2f} times this process", True, {"ratio": ratio})


def timed(engine: Engine, backbone: Backbone, prompts: list[torch.Tensor], how: Sampling) -> float:
    """Seconds for 8 completions of each prompt."""
    begun = perf_counter()
    engine(backbone, prompts, 8, how)
    torch.cuda.synchronize()
    return perf_counter() - begun


CHECKS = [
    Check("engines", "continuous batching, float32", "k3 ≤ 1e-6", partial(continuous, dtype=F32), 3),
    Check("engines", "continuous batching, bfloat16", "k3 ≤ 1e-3", partial(continuous, dtype=BF16), 3),
    Check("engines", "vLLM with an adapter", "k3 ≤ 1e-2", vllm, 90, gpus=1, large=True),
    Check("engines", "speed of continuous batching", "measured only", speed, 6, gpus=1, speed=True),
]
