"""Completions against transformers' generate, against scoring passes, and against the distribution itself."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lora_gan.backbone import Backbone
from lora_gan.evolution.multi_lora import sample_population
from lora_gan.evolution.population import member_loaded, read_weights
from lora_gan.sampling import Sampling, draw_uniform, prepare, sample
from lora_gan.tensors import kl_k3
from lora_gan.tree import grow_scored
from lora_gan.types import Rollout
from tests.benchmarks.setting import left_padded

from .machine import Machine, randomised
from .rows import Check, Finding, warned
from .tree import computing_in

KIND = "sampled"
F32, BF16 = torch.float32, torch.bfloat16


def prompts_of(machine: Machine, backbone: Backbone, count: int) -> list[Tensor]:
    """Random prompts of unequal lengths."""
    rng = torch.Generator().manual_seed(5)
    length = 48 if machine.is_cuda else 8
    return [
        torch.randint(0, backbone.vocabulary - 1, (length + b % 7,), generator=rng).to(machine.device)
        for b in range(count)
    ]


def ways(machine: Machine) -> Finding:
    """Whether the fast ways are right here: trees in one row, and the own decoder."""
    found = []
    for size, dtype in ((machine.small, F32), (machine.small, BF16), ("builtin", F32)):
        with warned() as lines:
            backbone = machine.backbone(size, dtype)
            with computing_in(machine, dtype):
                prepare(backbone)
        found += lines
    return Finding("; ".join(found) or "no warning", not found)


# greedy decoding


@torch.no_grad()
def greedy(machine: Machine, dtype: torch.dtype) -> Finding:
    """Most likely tokens; where texts differ first, the gap between the two largest logits has to be rounding."""
    backbone = machine.backbone(machine.small, dtype)
    prompts = prompts_of(machine, backbone, 64 if machine.is_cuda else 8)
    new = 32 if machine.is_cuda else 8
    with computing_in(machine, dtype), backbone.generator():
        ours = sample(backbone, prompts, 1, Sampling(max_new_tokens=new, do_sample=False)).ids
        padded, real = left_padded(prompts)
        theirs = backbone.causal_lm.generate(
            input_ids=padded,
            attention_mask=real,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=backbone.tokenizer.pad_token_id,
        )[:, padded.shape[1] :]
        gaps = [_gap(backbone, p, a, b) for p, a, b in zip(prompts, ours, theirs, strict=True) if not torch.equal(a, b)]
    share, widest = 1 - len(gaps) / len(prompts), max(gaps, default=0.0)
    text = f"{share:.0%} of {len(prompts)} texts equal, widest gap at a difference {widest:.3f}"
    passed = widest < (1e-4 if dtype == torch.float32 else 0.1)
    return Finding(text, passed, {"share": share, "gap": widest})


def _gap(backbone: Backbone, prompt: Tensor, one: Tensor, other: Tensor) -> float:
    """Between the logits of the two most likely tokens where two completions differ first."""
    first = int((one != other).int().argmax())
    logits = backbone.causal_lm(input_ids=torch.cat([prompt, one[:first]])[None], logits_to_keep=1).logits[0, -1]
    best = logits[: backbone.vocabulary].float().topk(2).values
    return float(best[0] - best[1])


# log-probabilities


@torch.no_grad()
def scored(machine: Machine, dtype: torch.dtype, temperature: float) -> Finding:
    """The log-probabilities kept while sampling against those of a pass over the prompt tree."""
    backbone = machine.backbone(machine.small, dtype)
    prompts, k = prompts_of(machine, backbone, 8 if machine.is_cuda else 4), 4
    how = Sampling(max_new_tokens=64 if machine.is_cuda else 8, temperature=temperature)
    with computing_in(machine, dtype), backbone.generator():
        rollout = sample(backbone, prompts, k, how)
    kept = kept_logprobs(machine, backbone, prompts, rollout, dtype, temperature)
    most, mean, k3 = kept["max"], kept["mean"], kept["k3"]
    passed = most <= 1e-4 if dtype == torch.float32 else mean <= 0.01 and k3 <= 1e-3
    return Finding(f"max {most:.1e} mean {mean:.1e} k3 {k3:.1e}", passed, kept)


@torch.no_grad()
def kept_logprobs(
    machine: Machine,
    backbone: Backbone,
    prompts: list[Tensor],
    rollout: Rollout,
    dtype: torch.dtype,
    temperature: float = 1.0,
) -> dict[str, float]:
    """How far the log-probabilities of a rollout are from those of a pass over the prompt tree."""
    tree = grow_scored(prompts, {KIND: rollout.by_prompt(len(prompts))})
    with computing_in(machine, dtype), backbone.generator():
        wanted = backbone.logprobs(tree, {KIND: temperature})[KIND][rollout.mask]
    found = rollout.logprobs[rollout.mask]
    error = (found - wanted).abs()
    return {"max": float(error.max()), "mean": float(error.mean()), "k3": float(kl_k3(found, wanted).mean())}


# the distribution


@torch.no_grad()
def distribution(machine: Machine) -> Finding:
    """First tokens of one prompt against the softmax of its logits (χ² test; rare tokens are taken together)."""
    backbone = machine.backbone("builtin")
    text = "The capital of"
    prompt = torch.tensor(backbone.tokenizer.encode(text, add_special_tokens=False), device=machine.device)
    n, at_once = 20_000, 2_000
    with backbone.generator():
        how = Sampling(max_new_tokens=1)
        drawn = torch.cat([sample(backbone, [prompt], at_once, how).ids[:, 0] for _ in range(n // at_once)])
        logits = backbone.causal_lm(input_ids=prompt[None]).logits[0, -1, : backbone.vocabulary]
    expected = n * logits.double().softmax(-1).cpu()
    counts = torch.bincount(drawn.cpu(), minlength=len(expected)).double()
    frequent = expected >= 5
    expected, counts = (torch.cat([x[frequent], x[~frequent].sum()[None]]) for x in (expected, counts))
    statistic, freedom = ((counts - expected).square() / expected).sum(), torch.tensor(len(expected) - 1.0)
    p = float(torch.special.gammaincc(freedom.double() / 2, statistic / 2))
    return Finding(f"χ² {statistic:.0f} of {freedom:.0f} degrees, p {p:.3f}", p > 1e-3, {"p": p})


# equal random numbers


@torch.no_grad()
def on_cpu_and_gpu(machine: Machine) -> Finding:
    """The same random numbers on both devices."""
    backbone, texts = machine.backbone("builtin"), ["Say hello.", "What is 2 + 2?", "Name a colour."]
    how = Sampling(max_new_tokens=32)
    prompts = [torch.tensor(backbone.tokenizer.encode(t, add_special_tokens=False)) for t in texts]
    uniform = draw_uniform(len(prompts) * 16, how, torch.device("cpu"), torch.Generator().manual_seed(0))
    rollouts = []
    for device in (machine.device, torch.device("cpu")):
        backbone.to(device)
        with backbone.generator():
            rollouts.append(sample(backbone, [p.to(device) for p in prompts], 16, how, uniform.to(device)))
    backbone.to(machine.device)
    share = equal_share(*rollouts)
    return Finding(f"{share:.2%} of tokens equal", share >= 0.99, {"share": share})


@torch.no_grad()
def population(machine: Machine) -> Finding:
    """Four members in one decode against one after another."""
    backbone = machine.backbone("builtin")
    how, members = Sampling(max_new_tokens=16), []
    for _ in range(4):
        members.append(read_weights(randomised(backbone, 0.05)))
    texts = ["Say hello.", "What is 2 + 2?"]
    ids = [torch.tensor(backbone.tokenizer.encode(t, add_special_tokens=False), device=machine.device) for t in texts]
    uniform = draw_uniform(len(ids) * 4, how, machine.device)
    together = sample_population(backbone, members, ids, 4, how, uniform)
    apart = []
    for weights in members:
        with member_loaded(backbone, weights), backbone.generator():
            apart.append(sample(backbone, ids, 4, how, uniform))
    share = sum(equal_share(a, b) for a, b in zip(together, apart, strict=True)) / len(members)
    return Finding(f"{share:.2%} of tokens equal", share >= 0.99, {"share": share})


def equal_share(one: Rollout, other: Rollout) -> float:
    """Share of the tokens that are equal, of all that one of the two has."""
    width = max(one.ids.shape[1], other.ids.shape[1])
    a, b = (
        torch.nn.functional.pad(r.ids.cpu() + 1, (0, width - r.ids.shape[1])) * _mask(r, width) for r in (one, other)
    )
    counted = (a != 0) | (b != 0)
    return float((a == b)[counted].float().mean())


def _mask(rollout: Rollout, width: int) -> Tensor:
    return torch.nn.functional.pad(rollout.mask.cpu(), (0, width - rollout.mask.shape[1]))


CHECKS = [
    Check("sample", "the fast ways are in use", "no warning of a slower one", ways, 5),
    Check("sample", "greedy against generate, float32", "gaps at differences < 1e-4", partial(greedy, dtype=F32), 10),
    Check("sample", "greedy against generate, bfloat16", "gaps at differences < 0.1", partial(greedy, dtype=BF16), 10),
    *(
        Check(
            "sample",
            f"log-probabilities against predict, float32, T {t}",
            "max ≤ 1e-4",
            partial(scored, dtype=F32, temperature=t),
            5,
        )
        for t in (1.0, 0.7)
    ),
    *(
        Check(
            "sample",
            f"log-probabilities against predict, bfloat16, T {t}",
            "mean ≤ 0.01, k3 ≤ 1e-3",
            partial(scored, dtype=BF16, temperature=t),
            5,
        )
        for t in (1.0, 0.7)
    ),
    Check("sample", "20,000 first tokens against the softmax", "p > 1e-3", distribution, 5),
    Check("sample", "the same random numbers on CPU and GPU", "≥ 99 % equal", on_cpu_and_gpu, 10, gpus=1),
    Check("sample", "a population against one member at a time", "≥ 99 % equal", population, 5),
]
