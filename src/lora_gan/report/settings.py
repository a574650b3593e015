"""Settings of a run that differ from the defaults in the signatures of their classes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from importlib import import_module
from typing import Any

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Difference:
    """A setting and its default."""

    name: str
    given: Any  # of a class its name
    default: str

    @property
    def value(self) -> str:
        """The setting as a text."""
        return as_text(self.given)


def differences(config: Mapping[str, Any]) -> list[Difference]:
    """Settings of ``config.yaml`` that differ from the defaults of the classes it names.

    A class that cannot be imported shows all its settings, with unknown defaults.
    """
    found = [Difference("seed_everything", config.get("seed_everything"), "0")]
    for name in ("model", "data"):
        found += _of_value(name, config.get(name), {})
    trainer = {"class_path": "lightning.pytorch.Trainer", "init_args": config.get("trainer") or {}}
    found += _of_arguments("trainer", trainer)
    return [one for one in found if one.value != one.default]


def _of_value(name: str, value: Any, default: Any) -> Iterator[Difference]:
    """Differences of one setting; a class is a setting, followed by those of its arguments."""
    if isinstance(value, Mapping) and "class_path" in value:
        chosen = str(value["class_path"]).rpartition(".")[2]
        yield Difference(name, chosen, "none" if default in (None, {}) else as_text(default))
        yield from _of_arguments(name, value)
    elif isinstance(value, list) and any(isinstance(one, Mapping) and "class_path" in one for one in value):
        for number, one in enumerate(value):
            yield from _of_value(f"{name}[{number}]", one, None)
    elif isinstance(value, Mapping):
        known = _fields(default)
        for key, inside in value.items():
            yield from _of_value(f"{name}.{key}", inside, known.get(key, UNKNOWN if known else None))
    else:
        yield Difference(name, value, as_text(default))


def _of_arguments(name: str, chosen: Mapping[str, Any]) -> Iterator[Difference]:
    defaults = _defaults(str(chosen["class_path"]))
    for key, value in (chosen.get("init_args") or {}).items():
        yield from _of_value(f"{name}.{key}", value, defaults.get(key, UNKNOWN))


def _defaults(path: str) -> dict[str, Any]:
    """Defaults of a class's arguments, those of its bases included; empty where it cannot be imported or read."""
    module, _, name = path.rpartition(".")
    try:
        chosen = getattr(import_module(module), name)
        readers = (
            [vars(base)["__init__"] for base in chosen.__mro__ if "__init__" in vars(base)]
            if isinstance(chosen, type)
            else [chosen]
        )
        found: dict[str, Any] = {}
        for reader in readers:
            for key, parameter in inspect.signature(reader).parameters.items():
                if parameter.default is not parameter.empty:
                    found.setdefault(key, parameter.default)
        return found
    except Exception:  # another's class; its settings are shown without their defaults
        return {}


def _fields(default: Any) -> dict[str, Any]:
    """Values of a group of settings."""
    if is_dataclass(default) and not isinstance(default, type):
        return asdict(default)
    return dict(default) if isinstance(default, Mapping) else {}


def as_text(value: Any) -> str:
    """A setting as a person writes it."""
    if isinstance(value, str | bool | int | float) or value is None:
        return str(float(value) if isinstance(value, int) and not isinstance(value, bool) else value).removesuffix(".0")
    if isinstance(value, list | tuple):
        return ", ".join(as_text(one) for one in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {as_text(one)}" for key, one in value.items())
    if inspect.isclass(value) or inspect.isroutine(value):
        return value.__name__
    return type(value).__name__
