"""Log-probabilities, scores and gradients of prompt trees against the same branches as rows of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lora_gan import flex
from lora_gan.attention import TreeForward
from lora_gan.backbone import Backbone
from lora_gan.tensors import pad
from lora_gan.tree import grow, grow_scored

from .machine import Machine, relative
from .rows import Check, Finding

KIND = "sampled"
ROLES = ("generator", "discriminator")
AT_ONCE = 8  # rows in a batch
Pair = tuple[Tensor, Tensor]  # prompt and completion of a row


@dataclass(frozen=True)
class Case:
    """Prompts with their completions, all of unequal lengths."""

    prompts: list[Tensor]
    completions: list[list[Tensor]]

    @classmethod
    def draw(cls, vocabulary: int, device: torch.device, prompts: int, prompt: int, k: int, tokens: int) -> Case:
        rng = torch.Generator().manual_seed(3)

        def text(length: int) -> Tensor:
            return torch.randint(0, vocabulary - 1, (length,), generator=rng).to(device)

        completions = [[text(tokens - (b + i) % 5) for i in range(k)] for b in range(prompts)]
        return cls([text(prompt + b) for b in range(prompts)], completions)

    @property
    def pairs(self) -> list[Pair]:
        """Prompt and completion of each row."""
        return [(prompt, c) for prompt, row in zip(self.prompts, self.completions, strict=True) for c in row]


@dataclass(frozen=True)
class Values:
    """What a way of computing gives."""

    logprobs: Tensor  # (n,) of all tokens
    scores: Tensor  # (N,) the discriminator's
    gradients: dict[str, Tensor]  # by role, of its LoRA matrices


def by_tree(backbone: Backbone, case: Case) -> Values:
    """All branches of a prompt in one row."""
    with backbone.generator():
        tree = grow_scored(case.prompts, {KIND: case.completions})
        found = backbone.logprobs(tree)[KIND]
        logprobs = found[tree.branches[KIND].mask]
        weighted(logprobs).backward()
    with backbone.discriminator():
        scores = backbone.score_branches(grow(case.prompts, {KIND: case.completions}))[KIND][:, 0]
        weighted(scores).backward()
    return Values(logprobs.detach(), scores.detach(), taken_gradients(backbone))


def by_rows(backbone: Backbone, case: Case) -> Values:
    """Prompt and completion of each row by the model's own forward."""
    groups = [case.pairs[i : i + AT_ONCE] for i in range(0, len(case.pairs), AT_ONCE)]
    with backbone.generator():
        lengths = [sum(len(completion) for _, completion in group) for group in groups]
        logprobs = _backward(backbone, groups, lengths, _row_logprobs)
    with backbone.discriminator():
        scores = _backward(backbone, groups, list(map(len, groups)), _row_scores)
    return Values(logprobs, scores, taken_gradients(backbone))


def _backward(
    backbone: Backbone,
    groups: Sequence[Sequence[Pair]],
    lengths: list[int],
    compute: Callable[[Backbone, Sequence[Pair]], Tensor],
) -> Tensor:
    """The values of all groups, whose weighted sum is differentiated group by group."""
    found = []
    weights = spread(sum(lengths), backbone.device).split(lengths)
    for group, weight in zip(groups, weights, strict=True):
        values = compute(backbone, group)
        (weight * values).sum().backward()
        found.append(values.detach())
    return torch.cat(found)


def _row_logprobs(backbone: Backbone, group: Sequence[Pair]) -> Tensor:
    """Causal models ignore what follows, so the padding on the right needs no mask."""
    ids = pad([torch.cat(pair) for pair in group])
    logits = backbone.causal_lm(input_ids=ids, use_cache=False).logits[:, :, : backbone.vocabulary]
    found = []
    for row, (prompt, completion) in zip(logits, group, strict=True):
        predicted = row[len(prompt) - 1 : len(prompt) + len(completion) - 1].float().log_softmax(-1)
        found.append(predicted.gather(1, completion[:, None]).squeeze(1))
    return torch.cat(found)


def _row_scores(backbone: Backbone, group: Sequence[Pair]) -> Tensor:
    """The score is read at the last token, from the states before the language-model head."""
    ids = pad([torch.cat(pair) for pair in group])
    hidden = backbone.causal_lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    last = torch.tensor([len(p) + len(c) - 1 for p, c in group], device=ids.device)
    states = hidden[torch.arange(len(group), device=ids.device), last]
    with torch.autocast(ids.device.type, enabled=False):
        scores: Tensor = backbone.score_head(states.float())[:, 0]
    return scores


def spread(n: int, device: torch.device) -> Tensor:
    """Different weights, so that no two tokens can be confused."""
    return torch.linspace(-1, 1, n, device=device) / n


def weighted(values: Tensor) -> Tensor:
    return (values * spread(len(values), values.device)).sum()


def taken_gradients(backbone: Backbone) -> dict[str, Tensor]:
    """The gradients of both roles, which are removed."""
    return {role: taken(backbone, role) for role in ROLES}


def taken(backbone: Backbone, role: str) -> Tensor:
    """The gradient of a role as one vector, which is removed."""
    parameters = [p for p in backbone.parameters_of(role) if p.grad is not None]
    found = torch.cat([p.grad.flatten().float() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return found


# the checks


def case_of(machine: Machine, backbone: Backbone, long: bool) -> Case:
    """Long ones have 4,200 tokens on a GPU, enough for FlexAttention where it is used."""
    if machine.is_cuda:
        shape = (2, 128, 8, 512) if long else (4, 64, 4, 48)
    else:
        shape = (2, 32, 4, 24) if long else (3, 12, 3, 8)
    return Case.draw(backbone.vocabulary, machine.device, *shape)


def computing_in(machine: Machine, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast, as a trainer in a mixed precision; nothing in float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(machine.device.type, dtype)


def in_float32(machine: Machine, long: bool) -> Finding:
    """Tree against rows, both in float32."""
    backbone = machine.backbone(machine.small)
    case = case_of(machine, backbone, long)
    tree, rows = by_tree(backbone, case), by_rows(backbone, case)
    logp = (tree.logprobs - rows.logprobs).abs()
    score = float((tree.scores - rows.scores).abs().max())
    gradient = max(relative(tree.gradients[role], rows.gradients[role]) for role in ROLES)
    text = f"logp max {logp.max():.1e} mean {logp.mean():.1e}, score max {score:.1e}, gradient {gradient:.1e}"
    passed = max(float(logp.max()), score, gradient) <= 1e-4
    return Finding(text, passed, {"logp": float(logp.max()), "score": score, "gradient": gradient})


def in_16_bits(machine: Machine, dtype: torch.dtype, long: bool) -> Finding:
    """The errors of tree and rows under autocast, both against rows of the same weights in float32."""
    backbone = machine.backbone(machine.small, dtype)
    case = case_of(machine, backbone, long)
    with computing_in(machine, dtype):
        tree, rows = by_tree(backbone, case), by_rows(backbone, case)
    exact = by_rows(copy.deepcopy(backbone).float(), case)
    logp, noise = (float((x.logprobs - exact.logprobs).abs().max()) for x in (tree, rows))
    score, score_noise = (float((x.scores - exact.scores).abs().max()) for x in (tree, rows))
    cosine = min(float(cosine_similarity(tree.gradients[r], rows.gradients[r], dim=0)) for r in ROLES)
    text = f"logp {logp:.4f} (rows {noise:.4f}), score {score:.4f} (rows {score_noise:.4f}), cosine {cosine:.5f}"
    passed = logp <= 2 * noise and score <= 2 * score_noise and cosine >= 0.999
    return Finding(text, passed, {"logp": logp, "noise": noise, "score": score, "cosine": cosine})


def by_flex(machine: Machine, dtype: torch.dtype) -> Finding:
    """The same long trees by FlexAttention and by SDPA."""
    backbone = machine.backbone(machine.small, dtype)
    case = case_of(machine, backbone, long=True)
    with computing_in(machine, dtype):
        with backbone.reference():
            taken_by_model = TreeForward(backbone.causal_lm).takes_blocks()
        with flex_from(0):
            one = by_tree(backbone, case)
        with flex_from(NEVER):
            other = by_tree(backbone, case)
    logp, score = float((one.logprobs - other.logprobs).abs().max()), float((one.scores - other.scores).abs().max())
    gradient = max(relative(one.gradients[role], other.gradients[role]) for role in ROLES)
    text = f"logp {logp:.1e}, score {score:.1e}, gradient {gradient:.1e}{'' if taken_by_model else ', NOT TAKEN'}"
    limit = 1e-4 if dtype == torch.float32 else 5e-2
    return Finding(text, taken_by_model and max(logp, score, gradient) <= limit, {"logp": logp, "gradient": gradient})


def flex_from(columns: int) -> AbstractContextManager[object]:
    """FlexAttention for trees with more columns than this, on a GPU."""
    return patch.object(flex, "LONG", columns)


NEVER = 1 << 40
BITS = partial(in_16_bits, dtype=torch.bfloat16)
ERROR = "error ≤ 2 × that of rows; gradient cosine ≥ 0.999"
CHECKS = [
    Check("tree", "tree against rows, float32", "each ≤ 1e-4", partial(in_float32, long=False), 10),
    Check("tree", "long trees against rows, float32", "each ≤ 1e-4", partial(in_float32, long=True), 15),
    Check("tree", "tree against rows, bfloat16", ERROR, partial(BITS, long=False), 10),
    Check("tree", "long trees against rows, bfloat16", ERROR, partial(BITS, long=True), 15),
    Check(
        "tree", "FlexAttention against SDPA, float32", "each ≤ 1e-4", partial(by_flex, dtype=torch.float32), 30, gpus=1
    ),
    Check(
        "tree",
        "FlexAttention against SDPA, bfloat16",
        "each ≤ 0.05",
        partial(by_flex, dtype=torch.bfloat16),
        30,
        gpus=1,
    ),
]
