"""JSON schema of configuration files, for editors, and completion scripts for shells; both read from the signatures."""

from __future__ import annotations

import argparse
import ast
import re
from importlib import import_module
from typing import Any

from lora_gan.cli.help import COMMANDS, FUNCTIONS, OPTIONS, TOPICS, group_of, listed
from lora_gan.cli.signatures import Setting, accepts_anything, exported, find, is_a, is_group, resolve, settings_of
from lora_gan.errors import LoraGANError

OFFER = [  # packages whose classes are offered by name
    "lora_gan",
    "lora_gan.rewards",
    "lora_gan.advantages",
    "lora_gan.losses",
    "lora_gan.discriminator",
    "lora_gan.callbacks",
    "lora_gan.data",
    "lora_gan.evolution",
    "lora_gan.pretrain",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
]
PLAIN = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "None": "null"}
LISTS = {"list", "List", "Sequence", "Iterable", "tuple", "Tuple"}
MAPPINGS = {"dict", "Dict", "Mapping"}
UNIONS = {"Union", "Optional"}
SHELLS = ("bash", "zsh", "tcsh")
Schema = dict[str, Any]


class SchemaWriter:
    """Collects the definitions of the classes that a configuration can name."""

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {}
        self.offered = {path: _home(path) for package in OFFER for path in exported(package)}

    def write(self) -> Schema:
        """The schema of a configuration file."""
        properties: Schema = {
            "extends": {"type": ["string", "null"], "description": "The file that this one builds on."},
            "seed_everything": {"type": ["integer", "boolean"]},
            "test_after_fit": {"type": "boolean"},
            "report_after_fit": {"type": "boolean"},
            "ckpt_path": {"type": ["string", "null"]},
            "weights_only": {},
            "model": self._class("lightning.pytorch.LightningModule"),
            "data": self._class("lightning.pytorch.LightningDataModule"),
            "trainer": self._settings(TOPICS["trainer"]),
        }
        return {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "title": "Configuration of lora-gan",
            **self._object(properties),
            "definitions": self.definitions,
        }

    def _settings(self, path: str) -> Schema:
        """A reference to the settings of a class or group."""
        key = _home(path)
        if key not in self.definitions:
            self.definitions[key] = {}  # a class may contain itself
            properties = {name: self._setting(setting) for name, setting in settings_of(path).items()}
            self.definitions[key] = self._object(properties, open_ended=accepts_anything(path))
        return {"$ref": f"#/definitions/{key}"}

    def _object(self, properties: Schema, open_ended: bool = False) -> Schema:
        added = {f"{name}+": schema for name, schema in properties.items() if "array" in str(schema)}
        schema: Schema = {"type": "object", "properties": {**properties, **added}}
        return schema if open_ended else {**schema, "additionalProperties": False}

    def _setting(self, setting: Setting) -> Schema:
        group = group_of(setting)
        schema = self._settings(group) if group else self._type(setting.type, setting.module)
        found: Schema = {"description": setting.text} if setting.text else {}
        if isinstance(setting.default, ast.Constant):
            found["default"] = setting.default.value
        return {**found, "allOf": [schema]} if "$ref" in schema else {**found, **schema}

    def _type(self, node: ast.expr | None, module: str) -> Schema:
        """The schema of an annotation; {}, which allows everything, where it is none of a configuration's types."""
        if isinstance(node, ast.Constant):
            return {"type": "null"} if node.value is None else {}
        if isinstance(node, ast.BinOp):
            return _any_of([self._type(node.left, module), self._type(node.right, module)])
        if isinstance(node, ast.Subscript):
            return self._generic(ast.unparse(node.value).rpartition(".")[2], _parts(node.slice), module)
        if isinstance(node, ast.Name) and node.id in PLAIN:
            return {"type": PLAIN[node.id]}
        path = resolve(node, module) if isinstance(node, ast.Name | ast.Attribute) else None
        found = find(path) if path else None
        if found is not None and isinstance(found.node, ast.Assign):
            return self._type(found.node.value, found.module)
        if path is None or found is None or not isinstance(found.node, ast.ClassDef):
            return {}
        return self._settings(path) if is_group(path) else self._class(path)

    def _generic(self, name: str, parts: list[ast.expr], module: str) -> Schema:
        if name in UNIONS:
            return _any_of([self._type(part, module) for part in parts] + [{"type": "null"}] * (name == "Optional"))
        if name == "Literal":
            return {"enum": [part.value for part in parts if isinstance(part, ast.Constant)]}
        if name in LISTS:
            return {"type": "array", "items": self._type(parts[0], module)}
        return {"type": "object"} if name in MAPPINGS else {}

    def _class(self, base: str) -> Schema:
        """A class by its name, or by its name and its arguments; those of the classes offered here are known."""
        known = {path: home for path, home in self.offered.items() if is_a(path, base)}
        arguments = [
            {
                "if": {"required": ["class_path"], "properties": {"class_path": {"enum": sorted({path, home})}}},
                "then": {"properties": {"init_args": self._settings(path)}},
            }
            for path, home in known.items()
        ]
        key = f"one of {_home(base)}"
        self.definitions[key] = {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "object",
                    "properties": {
                        "class_path": {"anyOf": [{"enum": sorted(known)}, {"type": "string"}]},
                        "init_args": {"type": "object"},
                        "dict_kwargs": {"type": "object"},
                    },
                    "additionalProperties": False,
                    "allOf": arguments,
                },
            ]
        }
        return {"$ref": f"#/definitions/{key}"}


def _home(path: str) -> str:
    found = find(path)
    return found.path if found else path


def _parts(node: ast.expr) -> list[ast.expr]:
    return list(node.elts) if isinstance(node, ast.Tuple) else [node]


def _any_of(schemas: list[Schema]) -> Schema:
    """One of several; everything where one of them allows everything."""
    return {} if {} in schemas else {"anyOf": schemas}


def completion(shell: str) -> str:
    """The script that completes commands, options and settings in a shell.

    Raises:
        LoraGANError: The shell is not known, or shtab is missing.
    """
    try:
        shtab = import_module("shtab")
    except ImportError as error:
        raise LoraGANError("completion needs shtab: pip install shtab") from error
    if shell not in SHELLS:
        raise LoraGANError(f"completion takes one of {', '.join(SHELLS)}, got {shell!r}")
    script: str = shtab.complete(_parser(), shell=shell)
    return script


def _parser() -> argparse.ArgumentParser:
    """A parser that knows every command with its options, to be read by shtab."""
    parser = argparse.ArgumentParser("lora-gan")
    commands = parser.add_subparsers()
    settings = [path for topic, home in TOPICS.items() for path, _ in listed(home, f"--{topic}.")]
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in FUNCTIONS:
            options = [f"--{each}" for each in settings_of(FUNCTIONS[name])]
        else:
            options = [] if name in ("schema", "completion") else re.findall(r"--\w+", " ".join(OPTIONS)) + settings
        for option in options:
            command.add_argument(option)
    return parser
