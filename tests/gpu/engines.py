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

from .machine import Machine, randomised
from .rows import Check, Finding, Skip
from .sample import BF16, F32, kept_logprobs, prompts_of
from .tree import computing_in


def batching(machine: Machine) -> ContinuousBatching:
    """With a cache that fits the memory of a GPU, or a small one."""
    if machine.is_cuda:
        return ContinuousBatching()
    return ContinuousBatching(num_blocks=64, max_batch_tokens=64, page_size=8)


def judged(kept: dict[str, float], limit: float) -> Finding:
    """Whether the policy that samples is near enough."""
    return Finding(f"mean {kept['mean']:.1e} k3 {kept['k3']:.1e}", kept["k3"] <= limit, kept)


def continuous(machine: Machine, dtype: torch.dtype) -> Finding:
    backbone = machine.backbone(machine.small, dtype)
    prompts, how = prompts_of(machine, backbone, 4), Sampling(max_new_tokens=64 if machine.is_cuda else 6)
    with computing_in(machine, dtype), backbone.generator():
        rollout = batching(machine)(backbone, prompts, 4, how)
    return judged(kept_logprobs(machine, backbone, prompts, rollout, dtype), 1e-6 if dtype == F32 else 1e-3)


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
    return judged(kept_logprobs(machine, backbone, prompts, rollout, F32), 1e-2)


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
