"""The discriminator of a saved run, to score completions outside of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from lora_gan.backbone import Backbone
from lora_gan.discriminator.models import AdapterDiscriminator, DiscriminatorModel
from lora_gan.errors import LoraGANError
from lora_gan.types import DiscriminatorBatch

PREFIX = "discriminator.model."  # of its weights in a checkpoint


def restore(
    chosen: Any, described: Mapping[str, str], weights: Mapping[str, Tensor], backbone: Backbone
) -> DiscriminatorModel:
    """The discriminator that a run's configuration names, with the weights of its checkpoint.

    Args:
        chosen: ``model.discriminator.model`` of the configuration; None is the default.
        described: Its class and input format according to the checkpoint.
        weights: The checkpoint's ``state_dict``.
        backbone: With the adapters of the checkpoint.

    Raises:
        LoraGANError: It cannot score completions here; the message says why.
    """
    name = "{class} that reads {input_format}".format(**described)
    model = _built(chosen)
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
    return model


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


def _built(chosen: Any) -> DiscriminatorModel:
    if chosen is None:
        return AdapterDiscriminator()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=DiscriminatorModel)
    try:
        model: DiscriminatorModel = parser.instantiate_classes(parser.parse_object({"model": chosen})).model
    except ArgumentError as error:
        raise LoraGANError(
            f"the discriminator of this run cannot be built: {error}; start from the folder that holds it"
        ) from error
    return model
