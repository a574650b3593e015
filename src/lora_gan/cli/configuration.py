"""Configuration files: what each extends, and which callbacks are left when one follows another."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lora_gan.errors import LoraGANError

if TYPE_CHECKING:
    from jsonargparse import Namespace

logger = logging.getLogger("lora_gan")

CONFIGS = Path(__file__).parents[3] / "configs"  # of a checkout
CONFIG = "--config="
BY_METRIC = ("BestCheckpoint", "ModelCheckpoint")
ONCE = ("Curriculum", "LastCheckpoint", "MovingAverageBaseline", "PredictionWriter", "StepProgressBar", "TextMetrics")


def with_extended(arguments: Sequence[str]) -> list[str]:
    """The arguments with the files that their configuration files ``extends``, each once, before the first of them.

    A file that replaces the callbacks of the files before it is logged with the names of those that it removes.

    Raises:
        LoraGANError: A file is missing, extends itself, or is not a mapping in YAML.
    """
    joined = _joined(arguments)
    places = [place for place, argument in enumerate(joined) if argument.startswith(CONFIG)]
    given = [joined[place].removeprefix(CONFIG) for place in places]
    extended = list(dict.fromkeys(file for name in given for file in _extended(name)))
    callbacks: list[str] = []
    for file in [*extended, *given]:
        callbacks = _callbacks_after(callbacks, file)
    first = min(places, default=0)
    return [*joined[:first], *(f"{CONFIG}{file}" for file in extended), *joined[first:]]


def _joined(arguments: Sequence[str]) -> list[str]:
    """The arguments with each configuration file as one of them, ``--config=file``."""
    result: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, *value = argument.split("=", 1)
        result.append(f"{CONFIG}{value[0] if value else next(rest, '')}" if name in ("--config", "-c") else argument)
    return result


def pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values of the arguments, however they are joined; an option without a value has an empty one."""
    waiting = ""
    for argument in arguments:
        name, joined, value = argument.partition("=")
        if waiting and not name.startswith("--"):
            yield waiting, argument
            waiting = ""
            continue
        if waiting:
            yield waiting, ""
        waiting = "" if joined else name
        if joined:
            yield name, value
    if waiting:
        yield waiting, ""


def content(file: str) -> dict[str, Any]:
    """What a configuration file says.

    Raises:
        LoraGANError: There is no such file, or it is not a mapping in YAML.
    """
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8")) if file else None
    except OSError as error:
        raise LoraGANError(f"cannot read the configuration {file}: {error.strerror}; {_available()}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise LoraGANError(f"the configuration {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        what = f"the configuration {file} is empty" if found is None else f"{file} is not a configuration"
        what = what if file else "--config needs a file"
        raise LoraGANError(f"{what}; it looks like configs/base.yaml: model, data, trainer and their settings")
    return found


def _available() -> str:
    names = sorted(path.name for path in CONFIGS.glob("*.yaml"))
    return f"{CONFIGS} has {', '.join(names)}" if names else "give its path from the folder that you are in"


def _extended(file: str) -> list[str]:
    """Paths of all files that the file extends, the first of them first."""
    said, chain = content(file), [str(Path(file).resolve())]
    while name := said.get("extends"):
        folder = Path(chain[0]).parent
        if not isinstance(name, str):
            raise LoraGANError(f"{chain[0]}: extends must be the name of one file, got {name!r}")
        found = [str(path.resolve()) for path in (folder / name, CONFIGS / name) if path.is_file()]
        if not found:
            raise LoraGANError(
                f"{chain[0]} extends {name}, and there is no such file in {folder} or {CONFIGS}: copy it there, or "
                "give its path"
            )
        new = [path for path in found if path not in chain]
        if not new:
            raise LoraGANError(f"{chain[0]} extends {name}, which is the file itself or one that extends it")
        said = content(new[0])
        chain.insert(0, new[0])
    return chain[:-1]


def _callbacks_after(before: list[str], file: str) -> list[str]:
    """Names of the callbacks as a further file leaves them."""
    trainer = content(file).get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    if "callbacks" in trainer:
        given = _callback_names(trainer["callbacks"])
        if removed := [name for name in before if name not in given]:
            logger.warning(
                "%s replaces the callbacks before it and removes %s; callbacks+ adds instead", file, ", ".join(removed)
            )
        before = given
    return before + _callback_names(trainer.get("callbacks+"))


def _callback_names(given: Any) -> list[str]:
    entries = given if isinstance(given, list) else [given] if given else []
    return [_callback_name(entry if isinstance(entry, dict) else {"class_path": entry}) for entry in entries]


def _callback_name(entry: Mapping[str, Any]) -> str:
    """Its class, and the name of the file that it writes, if it has one."""
    file = (entry.get("init_args") or {}).get("filename")
    return str(entry.get("class_path", "")).rpartition(".")[2] + (f" ({file})" if file else "")


def last_of_each_kind(callbacks: list[Namespace]) -> list[Namespace]:
    """The callbacks, where a later one takes the place of an earlier one of its kind.

    Of one kind are callbacks of which a run needs one only, and those that write checkpoints with the same file name.
    """
    kept: dict[Any, Namespace] = {}
    for number, callback in enumerate(callbacks):
        name, settings = callback.class_path.rpartition(".")[2], callback.get("init_args") or {}
        kind: Any = name if name in ONCE else number
        file = settings.get("filename") or ("best-{step}" if name == "BestCheckpoint" else None)
        if name in BY_METRIC and file:
            kind = (settings.get("dirpath"), file)
        if kind in kept and kept[kind] != callback:
            logger.info("callbacks: the last %s that is given takes the place of the one before it", name)
        kept[kind] = callback
    return list(kept.values())
