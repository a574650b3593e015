"""Names of settings: those that no class has are found before the classes are imported, with the likely right one."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Sequence
from typing import Any

from lora_gan.cli.configuration import content, pairs
from lora_gan.cli.help import TOPICS, group_of, listed
from lora_gan.cli.signatures import Setting, accepts_anything, find, settings_of
from lora_gan.errors import LoraGANError

ROOTS = {"model", "data", "trainer", "seed_everything", "ckpt_path", "extends", "print_config"}
ROOTS |= {"test_after_fit", "report_after_fit"}
ROOTS |= {"weights_only", "verbose", "return_predictions"}  # of the Trainer's methods
ELSEWHERE = {  # names of other programs
    "learning_rate": "model.generator.optimizer.init_args.lr (and model.discriminator.optimizer.init_args.lr)",
    "lr": "model.generator.optimizer.init_args.lr (and model.discriminator.optimizer.init_args.lr)",
    "epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "output_dir": "trainer.logger.init_args.save_dir",
    "lora_r": "model.generator.lora.rank",
    "lora_alpha": "model.generator.lora.alpha",
    "target_modules": "model.generator.lora.targets",
    "beta": "model.coefficients.kl",
    "per_device_train_batch_size": "data.batch_size",
    "max_length": "data.max_tokens, data.max_prompt_tokens, data.max_target_tokens",
    "dataset": "data.path",
    "model_name_or_path": "model.base",
}
ANY = Setting("", None, None, "", "")


class Names:
    """Reads a configuration as it grows, file by file and option by option; knows the class at each place by then."""

    def __init__(self) -> None:
        self.classes = dict(TOPICS)

    def read(self, arguments: Sequence[str]) -> None:
        """Check every name.

        Raises:
            LoraGANError: A name that no class there has.
        """
        for name, value in pairs(arguments):
            if name == "--config":
                self._entries(content(value), value)
            elif name.startswith("--"):
                self._option(name[2:], value)

    def _entries(self, given: dict[str, Any], where: str) -> None:
        for name, value in _nested(given).items():
            self._require(name.rstrip("+"), ROOTS, "", where)
            self._value(value, ANY, name, where)

    def _value(self, value: Any, setting: Setting, path: str, where: str) -> None:
        """Check what a file says at one place."""
        if isinstance(value, list):
            for number, item in enumerate(value):
                self._value(item, setting, f"{path}[{number}]", where)
        elif isinstance(value, str) and (path in TOPICS or find(value)):
            self.classes[path] = value
        elif value is None:
            self.classes.pop(path, None)
        elif isinstance(value, dict):
            if "class_path" in value:
                self.classes[path] = value["class_path"]
            inner = value.get("init_args", {}) if {"class_path", "init_args"} & set(value) else value
            known = self._settings(setting, path)
            if known is None:
                return
            for name, each in _nested(inner or {}).items():
                bare = name.rstrip("+")
                self._require(bare, known, path, where)
                self._value(each, known[bare], f"{path}.{bare}", where)

    def _option(self, option: str, value: str) -> None:
        path, *names = option.rstrip("+").split(".")
        if path not in {*ROOTS, "config"}:
            raise LoraGANError(f"no option --{option}{hint(path)}; --help lists the options")
        setting = ANY
        for name in names:
            if name in ("init_args", "class_path"):
                continue
            known = self._settings(setting, path)
            if known is None or name in ("help", "dict_kwargs") or _lists(setting):
                return
            self._require(name, known, path, f"--{option}")
            path, setting = f"{path}.{name}", known[name]
        if path in TOPICS or ("." in value and find(value)):
            self.classes[path] = value
        elif value.isidentifier() and value[0].isupper():  # a class without its import path, which the parser resolves
            self.classes.pop(path, None)

    def _settings(self, setting: Setting, path: str) -> dict[str, Setting] | None:
        """The settings at a place; None where they cannot be known from the sources."""
        group = group_of(setting)
        if group:
            return settings_of(group)
        name = self.classes.get(path, "")
        return None if accepts_anything(name) else settings_of(name)

    def _require(self, name: str, known: Any, path: str, where: str) -> None:
        if name not in known:
            of = f"{self.classes.get(path, path)} has" if path else "there is"
            raise LoraGANError(f"{where}: {of} no setting {name!r}{hint(name, list(known))}")


def hint(name: str, beside: Sequence[str] = ()) -> str:
    """Where a setting of this name is, or which of those beside it, or of all, has nearly this name."""
    if name in ELSEWHERE:
        return f"; it is {ELSEWHERE[name]} here"
    places: dict[str, list[str]] = {}
    for path in (path for topic, home in TOPICS.items() for path, _ in listed(home, f"{topic}.")):
        places.setdefault(path.rpartition(".")[2], []).append(path)
    if name not in places and (near := difflib.get_close_matches(name, beside, 1)):
        return f"; did you mean {near[0]}?"
    close = difflib.get_close_matches(name, places, 1, cutoff=0.75)
    return f"; did you mean {' or '.join(places[close[0]])}?" if close else ""


def _lists(setting: Setting) -> bool:
    """Whether a setting is a list, of whose entries an option changes the last."""
    return setting.type is not None and any(
        word in ast.unparse(setting.type) for word in ("list[", "List[", "Sequence[")
    )


def _nested(given: dict[Any, Any]) -> dict[str, Any]:
    """The entries, where ``a.b: c`` is ``a: {b: c}``."""
    result: dict[str, Any] = {}
    for name, value in given.items():
        first, *rest = str(name).split(".", 1)
        result[first] = {rest[0]: value} if rest else value
    return result
