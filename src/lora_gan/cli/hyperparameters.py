"""Hyperparameters: the settings that make a run what it is, in one flat table, as loggers show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_gan.report.settings import differences

Plain = bool | int | float | str


def hyperparameters(settings: Mapping[str, Any]) -> dict[str, Plain]:
    """Seed, length, and what differs from the defaults in model and data, by full names.

    A class is a setting of its own, such as ``model.advantage: LeaveOneOut``; its arguments follow its name.
    """
    found: dict[str, Any] = {
        "seed_everything": settings["seed_everything"],
        "max_steps": settings["trainer"]["max_steps"],
    }
    changed = [one for one in differences(settings) if one.name.partition(".")[0] in ("model", "data")]
    found |= {one.name: one.given if isinstance(one.given, Plain) else one.value for one in changed}
    return found
