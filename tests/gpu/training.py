"""Modules and batches for the checks that train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_gan.advantages import LeaveOneOut
from lora_gan.backbone import DISCRIMINATOR, GENERATOR
from lora_gan.data.datamodule import collate
from lora_gan.data.tokenizer import encode
from lora_gan.module import LoraGANModule
from lora_gan.rewards import FunctionReward
from lora_gan.sampling import Sampling
from lora_gan.types import Example, PromptBatch
from tests.benchmarks.setting import LORA
from tests.helpers.settings import grouped
from tests.helpers.steps import share_of_a

TEXTS = ("Say hello.", "What is 2 + 2?", "Name a colour.", "Where is Rome?", "Who wrote this?", "Count to three.")


def make_module(**settings: Any) -> LoraGANModule:
    """A module on the built-in base with all of the losses; the same weights at each call."""
    torch.manual_seed(4)
    common: dict[str, Any] = {
        "base": "builtin",
        "dtype": "float32",
        "num_generations": 2,
        "sampling": Sampling(max_new_tokens=12),
        "rewards": [FunctionReward(share_of_a)],
        "advantage": LeaveOneOut(),
        "adversarial": 0.3,
        "coupled": 0.1,
        "kl": 0.05,
        "generator_lora": LORA,
        "discriminator_lora": LORA,
    }
    return LoraGANModule(**grouped({**common, **settings}))


def make_batches(module: LoraGANModule, count: int, targets: bool = True) -> list[PromptBatch]:
    """Batches of three prompts, on the CPU; without targets nothing is supervised and no pair can be made."""
    batches = []
    for n in range(count):
        texts = [f"{TEXTS[(3 * n + i) % len(TEXTS)]} ({n})" for i in range(3)]
        wanted = [" Yes, it is." if targets else ""] * 3
        examples = [Example(t, w, (w,) if w else (), group=t) for t, w in zip(texts, wanted, strict=True)]
        batches.append(collate(encode(module.backbone.tokenizer, examples)))
    return batches


def weights_of(module: LoraGANModule, role: str) -> Tensor:
    """All trained weights of a role as one vector, on the CPU."""
    return nn.utils.parameters_to_vector(module.backbone.parameters_of(role)).detach().float().cpu().clone()


def both_roles(module: LoraGANModule) -> Tensor:
    return torch.cat([weights_of(module, role) for role in (GENERATOR, DISCRIMINATOR)])


def base_weights(module: LoraGANModule) -> dict[str, Tensor]:
    """Copies of the frozen weights."""
    parameters: Mapping[str, nn.Parameter] = dict(module.backbone.lm.named_parameters())
    return {name: p.detach().cpu().clone() for name, p in parameters.items() if "lora_" not in name}
