"""Time and memory of log-probabilities and entropies over a large vocabulary."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_gan.tree import grow_scored

from .decode import dtype_of, in_use
from .machine import Machine
from .rows import Check, Finding
from .tree import KIND, Case, taken, weighted

MOST = 1.5e9  # bytes above the inputs


def head(machine: Machine) -> Finding:
    """Forward and backward pass of a model that is little more than its head, against the head's two products."""
    whole = machine.small
    layers = {"num_hidden_layers": 1, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    size = replace(whole, name=f"{whole.name}, head", model=whole.model | layers)
    backbone = machine.backbone(size, dtype_of(machine))
    prompts, k, tokens = (16, 8, 132) if machine.is_cuda else (2, 4, 20)
    case = Case.draw(backbone.vocabulary, machine.device, prompts, 16, k, tokens)
    n = sum(len(completion) for _, completion in case.pairs)

    def work() -> None:
        with in_use(machine, backbone):
            predicted = backbone.predict(grow_scored(case.prompts, {KIND: case.completions}))[KIND]
            (weighted(predicted.logprobs.flatten()) + weighted(predicted.entropy.flatten())).backward()
            taken(backbone, "generator")

    weight: Tensor = backbone.causal_lm.get_output_embeddings().weight
    states = torch.randn(n, weight.shape[1], device=machine.device, dtype=weight.dtype)

    def products() -> None:
        for part in states.split(2048):
            (part @ weight.T) @ weight

    seconds, least = machine.seconds(work), machine.seconds(products)
    ratio, shape = seconds / least, f"{n:,} tokens × {len(weight):,}"
    text = f"{shape}: {1e3 * seconds:.1f} ms, products {1e3 * least:.1f} ms: × {ratio:.2f}"
    if not machine.is_cuda:
        return Finding(text, True, {"seconds": seconds})
    peak = machine.peak(work)
    passed = seconds <= 1.5 * least and peak <= MOST
    return Finding(f"{text}, peak {peak / 1e9:.2f} GB", passed, {"seconds": seconds, "peak": peak})


CHECKS = [Check("head", "log-probabilities and entropies", "≤ 1.5 × the products, peak ≤ 1.5 GB", head, 10, speed=True)]
