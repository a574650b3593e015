"""Speed of the decoding against transformers' generate and the memory bandwidth; CUDA graphs, merged weights, int8."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_gan.backbone import Backbone
from lora_gan.sampling import Sampling, draw_uniform, sample
from lora_gan.tensors import kl_k3
from lora_gan.tree import grow_scored
from tests.benchmarks.passes import Passes
from tests.benchmarks.setting import Size

from .machine import Machine
from .models import Q8
from .rows import Check, Finding, Skip, warned
from .sample import KIND, equal_share, prompts_of
from .tree import computing_in

GOAL = {"q06": 0.30, "q8": 0.60}  # share of the floor at 64 rows
ROWS = (8, 64, 256)


def dtype_of(machine: Machine) -> torch.dtype:
    return torch.bfloat16 if machine.is_cuda else torch.float32


def in_use(machine: Machine, backbone: Backbone) -> AbstractContextManager[Any]:
    """The generator's mode in the precision that a trainer would have."""
    stack = ExitStack()
    stack.enter_context(computing_in(machine, dtype_of(machine)))
    stack.enter_context(backbone.generator())
    return stack


def speed(machine: Machine, rows: int, large: bool = False) -> Finding:
    """Milliseconds for each token, the prompts' share included."""
    size, k = Q8 if large else machine.small, min(8, rows)
    shape = replace(size, prompts=rows // k, num_generations=k)
    backbone = machine.backbone(size, dtype_of(machine))
    side = Passes(shape, backbone)
    with computing_in(machine, dtype_of(machine)):
        ours, theirs = machine.seconds(lambda: side.sampler(1.0), 3), machine.seconds(lambda: side.generate(1.0), 1)
    tokens = size.completion_tokens
    floor = _floor(machine, backbone, shape)
    ratio, share = theirs / ours, floor * tokens / ours
    goal = GOAL.get(size.name) if rows == 64 else None
    text = (
        f"{1e3 * ours / tokens:.1f} ms/token, {rows * tokens / ours:,.0f} tokens/s, generate "
        f"{1e3 * theirs / tokens:.1f} ms: × {ratio:.2f}, floor {1e3 * floor:.2f} ms = {share:.2f}"
    )
    if goal:
        text += f" (goal {goal}{'' if share >= goal else ', missed'})"
    return Finding(text, ratio >= 1.2, {"ms": 1e3 * ours / tokens, "ratio": ratio, "share": share})


def _floor(machine: Machine, backbone: Backbone, size: Size) -> float:
    """Seconds a token that reading the weights and the keys and values takes."""
    model, settings = backbone.causal_lm, size.model
    words = {id(p) for p in model.get_input_embeddings().parameters()}
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in words)
    each: int = 2 * settings["num_hidden_layers"] * settings["num_key_value_heads"] * settings["head_dim"]
    length = size.prompt_tokens + size.completion_tokens / 2
    cache = each * length * size.prompts * size.num_generations * model.dtype.itemsize
    return float(weights + cache) / machine.bandwidth


@torch.no_grad()
def static_generate(machine: Machine, rows: int = 64) -> Finding:
    """generate with a static cache, which transformers compiles: how far it is from ours."""
    backbone, k = machine.backbone(machine.small, dtype_of(machine)), 8
    side = Passes(replace(machine.small, prompts=rows // k, num_generations=k), backbone)
    tokens = machine.small.completion_tokens

    def theirs() -> Tensor:
        ids: Tensor = backbone.causal_lm.generate(
            input_ids=side.padded.repeat_interleave(k, 0),
            attention_mask=side.real.repeat_interleave(k, 0),
            max_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            cache_implementation="static",
            pad_token_id=backbone.tokenizer.pad_token_id,
        )
        return ids

    with in_use(machine, backbone):
        try:
            other = machine.seconds(theirs, 1)
        except Exception as error:
            raise Skip(f"generate with a static cache failed: {type(error).__name__}") from error
        ours = machine.seconds(lambda: side.sampler(1.0), 1)
    text = f"{1e3 * other / tokens:.1f} ms/token, ours {1e3 * ours / tokens:.1f} ms: × {other / ours:.2f}"
    return Finding(text, True, {"ratio": other / ours})


# the same tokens


@torch.no_grad()
def graphs(machine: Machine) -> Finding:
    """Replayed steps against the same steps launched one by one; some completions end early, so that rows leave."""
    found = []
    backbone, prompts = machine.backbone("builtin", torch.bfloat16), ["Say hello.", "What is 2 + 2?", "Name a colour."]
    ids = [torch.tensor(backbone.tokenizer.encode(p, add_special_tokens=False), device=machine.device) for p in prompts]
    how = Sampling(max_new_tokens=64)
    uniform = draw_uniform(len(ids) * 24, how, machine.device)
    with warned() as lines, in_use(machine, backbone):
        for used in (True, False):
            found.append(sample(backbone, ids, 24, replace(how, cuda_graphs=used), uniform))
    share = equal_share(*found)
    text = f"{share:.2%} of tokens equal; {'; '.join(lines) or 'no warning'}"
    return Finding(text, share == 1 and not lines, {"share": share})


@torch.no_grad()
def other_weights(machine: Machine, **settings: Any) -> Finding:
    """Log-probabilities of a decode with other weights against a pass with those that learn."""
    backbone = machine.backbone(machine.small, dtype_of(machine))
    prompts = prompts_of(machine, backbone, 8 if machine.is_cuda else 4)
    how = Sampling(max_new_tokens=64 if machine.is_cuda else 8, **settings)
    with in_use(machine, backbone):
        rollout = sample(backbone, prompts, 4, how)
        tree = grow_scored(prompts, {KIND: rollout.by_prompt(len(prompts))})
        wanted = backbone.logprobs(tree)[KIND][rollout.mask]
    found = rollout.logprobs[rollout.mask]
    mean, k3 = float((found - wanted).abs().mean()), float(kl_k3(found, wanted).mean())
    return Finding(f"mean {mean:.1e} k3 {k3:.1e}", k3 <= 1e-3, {"mean": mean, "k3": k3})


def int8(machine: Machine) -> Finding:
    if machine.is_cuda:
        raise Skip("sampling.base: int8 is for CPUs")
    return other_weights(machine, base="int8")


CHECKS = [
    *(Check("decode", f"{n} rows", "≥ 1.2 × generate", partial(speed, rows=n), 12, speed=True) for n in ROWS),
    *(
        Check("decode", f"8B, {n} rows", "≥ 1.2 × generate", partial(speed, rows=n, large=True), 25, large=True)
        for n in ROWS
    ),
    Check("decode", "generate with a static cache, compiled", "printed", static_generate, 90, gpus=1, large=True),
    Check("decode", "CUDA graphs against steps without", "100 % equal, no warning", graphs, 10, gpus=1),
    Check("decode", "merged weights against predict", "k3 ≤ 1e-3", partial(other_weights, merge_lora=True), 3),
    Check("decode", "int8 base against predict", "k3 ≤ 1e-3", int8, 3),
]
