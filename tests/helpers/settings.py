"""Settings of a module by their own names, whichever group they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lora_gan.backbone import BackboneSettings
from lora_gan.coefficients import Coefficients
from lora_gan.discriminator import DiscriminatorSettings
from lora_gan.generator import GeneratorSettings
from lora_gan.optimization import OptimizationSettings

GROUPS = {
    "coefficients": Coefficients,
    "generator": GeneratorSettings,
    "discriminator": DiscriminatorSettings,
    "backbone": BackboneSettings,
    "optimization": OptimizationSettings,
}


def in_groups(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``{"policy": 0.0, "generator_lora": x}`` → ``{"coefficients": {"policy": 0.0}, "generator": {"lora": x}}``.

    What both roles have is named after the role: ``generator_optimizer``, ``discriminator_lora`` and so on.
    """
    rest = dict(settings)
    groups: dict[str, Any] = {}
    for group, kind in GROUPS.items():
        inside = {}
        for field in fields(kind):
            both = field.name in ("lora", "optimizer", "scheduler", "adapter")
            name = f"{group}_{field.name}" if both else field.name
            if name in rest:
                inside[field.name] = rest.pop(name)
        if inside:
            groups[group] = inside
    return {**rest, **groups}


def grouped(settings: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`in_groups` as a module's constructor takes them."""
    named = in_groups(settings)
    return {name: GROUPS[name](**value) if name in GROUPS else value for name, value in named.items()}
