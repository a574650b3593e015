"""The discriminator of a saved run, to score completions outside of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_gan.backbone import Backbone
from lora_gan.discriminator.models import DiscriminatorModel
from lora_gan.errors import LoraGANError
from lora_gan.types import DiscriminatorBatch

PREFIX = "discriminator.model."  # of its weights in a checkpoint


def restore(
    model: DiscriminatorModel, described: Mapping[str, str], weights: Mapping[str, Tensor], backbone: Backbone
) -> None:
    """Give the discriminator that a run's configuration names the weights of its checkpoint.

    Args:
        model: As the configuration names it.
        described: Its class and input format according to the checkpoint.
        weights: The checkpoint's ``state_dict``.
        backbone: With the adapters of the checkpoint.

    Raises:
        LoraGANError: It cannot score completions here; the message says why.
    """
    name = "{class} that reads {input_format}".format(**described)
    if described != describe(model):
        raise LoraGANError(
            f"the discriminator of this run is a {name}, and its config.yaml is missing or another run's"
        )
    if model.input_format.reads_target:
        raise LoraGANError(f"the discriminator of this run is a {name}; use predict for completions with rewards")
    model.build(backbone)
    model.load_state_dict({k.removeprefix(PREFIX): v for k, v in weights.items() if k.startswith(PREFIX)}, strict=False)
    model.to(backbone.device)
    if not model.has_learned(backbone):
        raise LoraGANError("the discriminator of this run has never been trained")


def describe(model: DiscriminatorModel) -> dict[str, str]:
    """Its class and input format, as a checkpoint holds them."""
    return {"class": type(model).__name__, "input_format": type(model.input_format).__name__}


@torch.no_grad()
def score(
    model: DiscriminatorModel, backbone: Backbone, prompts: Sequence[Tensor], completions: Sequence[Sequence[Tensor]]
) -> Tensor:
    """(N,) scores of completions (T,) that end in EOS, some for each of B prompts (P,)."""
    nothing = tuple(prompt[:0] for prompt in prompts)
    with model.mode(backbone):
        found = model(backbone, DiscriminatorBatch(tuple(prompts), nothing, {"completion": completions}))
    scores: Tensor = found["completion"][:, 0]
    return scores
