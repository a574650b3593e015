"""Imports go one way: types ← tensors ← {tree, rewards, …} ← {backbone, sampling} ← module ← cli."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import lora_gan

PACKAGE = Path(lora_gan.__file__).parent
LAYERS = [
    {"errors"},
    {"types", "checkpoint_files"},
    {"tensors", "embedding", "metrics", "packing", "processes"},
    {"tree", "rewards", "objectives", "advantages", "losses", "negatives", "payoffs", "replay"},
    {"backbone", "sampling", "knobs", "choices"},
    {"judges", "discriminator", "coupling"},
    {"adapters", "checkpoints"},
    {"module", "saved", "steps"},
    {"evolution"},
    {"api", "callbacks", "export"},
    {"cli"},
]
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
USE_MODULE = {"__init__", "api", "callbacks", "cli", "evolution", "saved"}


def imports() -> dict[str, set[str]]:
    """For each part of the package the parts that it imports anywhere, also inside functions."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            used = {name.split(".")[1] for name in names if name.startswith("lora_gan.")}
            found.setdefault(part, set()).update(used - {part})
    return found


def test_imports_go_one_way() -> None:
    found = imports()
    assert "backbone" in found["sampling"] and "module" in found["cli"], "the reader of imports works"
    wrong = [(part, used) for part, rest in found.items() for used in rest if RANK.get(part, 99) < RANK.get(used, 0)]
    assert wrong == []
    same = {(p, u) for p, rest in found.items() for u in rest if p in RANK and RANK[p] == RANK.get(u)}
    assert same <= {
        ("sampling", "backbone"),
        ("discriminator", "judges"),
        ("coupling", "discriminator"),
        ("coupling", "judges"),
    }


def test_the_module_is_used_from_above_only() -> None:
    found = imports()
    assert {part for part, used in found.items() if "module" in used} <= USE_MODULE
    assert "callbacks" not in set().union(*(used for part, used in found.items() if part != "cli"))


def test_the_command_line_starts_without_slow_packages() -> None:
    slow = "{'sentence_transformers', 'datasets', 'ray'}"
    told = f"import sys, lora_gan.cli; print(sorted({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout == "[]\n"
