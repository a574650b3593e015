"""Time and memory of log-probabilities and entropies over a large vocabulary."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_gan.sampling import Sampling
from lora_gan.stepper import Stepper
from lora_gan.tree import grow_scored
from tests.benchmarks.setting import Size

from .decode import dtype_of, in_use
from .machine import Machine
from .models import random_base
from .rows import Check, Finding
from .training import make_batches, make_module
from .tree import KIND, Case, taken, weighted

MOST = 1.5e9  # bytes above the inputs


def little_more(size: Size) -> Size:
    """The same width and vocabulary with one small layer."""
    layers = {"num_hidden_layers": 1, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    return replace(size, name=f"{size.name}, head", model=size.model | layers)


def head(machine: Machine) -> Finding:
    """Forward and backward pass of a model that is little more than its head, against the head's three products.

    These are the logits, and the gradients of log-probability and of entropy at the hidden states.
    """
    backbone = machine.backbone(little_more(machine.small), dtype_of(machine))
    prompts, k, tokens = (16, 8, 132) if machine.is_cuda else (2, 4, 20)
    case = Case.draw(backbone.vocabulary, machine.device, prompts, 16, k, tokens)
    n = sum(len(completion) for _, completion in case.pairs)

    def work() -> None:
        with in_use(machine, backbone):
            tree = grow_scored(case.prompts, {KIND: case.completions})
            predicted = backbone.predict(tree, with_entropy=True)[KIND]
            assert predicted.entropy is not None
            (weighted(predicted.logprobs.flatten()) + weighted(predicted.entropy.flatten())).backward()
            taken(backbone, "generator")

    weight: Tensor = backbone.causal_lm.get_output_embeddings().weight
    states = torch.randn(n, weight.shape[1], device=machine.device, dtype=weight.dtype)

    def products() -> None:
        for part in states.split(2048):
            logits = part @ weight.T
            for _ in range(2):
                logits @ weight

    seconds, least = machine.seconds(work), machine.seconds(products)
    ratio, shape = seconds / least, f"{n:,} tokens × {len(weight):,}"
    text = f"{shape}: {1e3 * seconds:.1f} ms, products {1e3 * least:.1f} ms: × {ratio:.2f}"
    if not machine.is_cuda:
        return Finding(text, True, {"seconds": seconds})
    peak = machine.peak(work)
    passed = seconds <= 1.5 * least and peak <= MOST
    return Finding(f"{text}, peak {peak / 1e9:.2f} GB", passed, {"seconds": seconds, "peak": peak})


def coupled(machine: Machine) -> Finding:
    """A step whose generator learns by the coupled loss alone, through distributions over the whole vocabulary."""
    dtype, tokens = dtype_of(machine), 256 if machine.is_cuda else 8
    module = make_module(
        base=random_base(little_more(machine.small), machine.device, dtype),
        dtype=str(dtype).removeprefix("torch."),
        num_generations=4,
        sampling=Sampling(max_new_tokens=tokens),
        supervised=0.0,
        policy=0.0,
        coupled=1.0,
        kl=0.0,
    )
    stepper = Stepper(module, machine.device, "bf16-mixed" if machine.is_cuda else "32-true")
    batches = make_batches(module, 2)
    stepper.step(batches[0])
    text = f"{3 * 4 * tokens:,} tokens × {machine.small.model['vocab_size']:,}"
    if not machine.is_cuda:
        stepper.step(batches[1])
        return Finding(text, True)
    peak = machine.peak(lambda: stepper.step(batches[1]))
    return Finding(f"{text}: peak {peak / 1e9:.2f} GB", peak <= 2 * MOST, {"peak": peak})


CHECKS = [
    Check("head", "log-probabilities and entropies", "≤ 1.5 × the products, peak ≤ 1.5 GB", head, 10, speed=True),
    Check("head", "step with the coupled loss", "peak ≤ 3 GB", coupled, 8, speed=True),
]
