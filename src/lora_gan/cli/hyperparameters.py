"""Hyperparameters: the settings of a run in one flat table, as loggers show them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Plain = bool | int | float | str


def hyperparameters(settings: Mapping[str, Any]) -> dict[str, Plain]:
    """Seed, length, model and data of a run by their full names; what is not set is left out.

    A class is a setting of its own, such as ``model.advantage: LeaveOneOut``; its arguments follow its name.
    """
    chosen = {name: settings.get(name) for name in ("seed_everything", "model", "data")}
    return dict(_flat(chosen | {"max_steps": settings["trainer"]["max_steps"]}, ""))


def _flat(value: Any, name: str) -> Iterator[tuple[str, Plain]]:
    if isinstance(value, Mapping) and "class_path" in value:
        yield name, value["class_path"].rpartition(".")[2]
        value = value.get("init_args") or {}
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for key, inside in value.items():
            yield from _flat(inside, f"{name}.{key}" if name else str(key))
    elif value is not None:
        yield name, value if isinstance(value, Plain) else str(value)
