"""Imports of the package go one way, from higher ranks to lower ones, and every module has a rank."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import lora_gan

PACKAGE = Path(lora_gan.__file__).parent
LAYERS = [
    {"errors"},
    {"atomic", "context", "final_answer", "program", "sandbox", "wheels"},
    {
        "types",
        "tensors",
        "bases",
        "dropout",
        "head",
        "distributed",
        "lightning_compat",
        "number_formats",
        "text_metrics",
        "sentence_encoder",
    },
    {"best_of", "dynamic_sampling"},
    {"data", "tree", "advantages", "losses", "coefficients", "onednn", "results", "rewards"},
    {"flex"},
    {"attention"},
    {"backbone", "multiple_choice", "optimization", "pretrain", "step_metrics"},
    {"sampling", "discriminator", "teacher", "policy"},
    {"generator"},
    {"step_callback"},
    {"baseline", "checkpointing"},
    {"engines", "evaluation", "inference", "stepper"},
    {"module"},
    {"evolution", "export"},
    {"callbacks", "api"},
    {"report"},
    {"run_end", "ui"},
    {"cli"},
    {"__init__", "__main__"},
]
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
SAME_RANK: set[tuple[str, str]] = set()  # (importer, imported) of one rank
USE_MODULE = {"__init__", "api", "cli", "evolution", "run_end"}


def parts() -> set[str]:
    """Modules and packages at the top of the package."""
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    return modules | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def imports() -> dict[str, set[str]]:
    """For each part of the package the parts that it imports anywhere, also inside functions."""
    found: dict[str, set[str]] = {part: set() for part in parts()}
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                whole = node.module == "lora_gan"
                names += [f"lora_gan.{a.name}" for a in node.names] if whole else [node.module or ""]
            used = {name.split(".")[1] for name in names if name.startswith("lora_gan.")}
            found[part].update(used - {part})
    return found


def test_every_part_has_one_rank() -> None:
    assert sum(map(len, LAYERS)) == len(RANK), "a part stands in two layers"
    assert parts() == set(RANK)
    assert set().union(*imports().values()) <= set(RANK), "an import of something else"


def test_imports_go_one_way() -> None:
    found = imports()
    assert "backbone" in found["sampling"] and "module" in found["cli"], "the reader of imports works"
    upwards = {(part, used) for part, rest in found.items() for used in rest if RANK[part] < RANK[used]}
    assert upwards == set()
    same = {(part, used) for part, rest in found.items() for used in rest if RANK[part] == RANK[used]}
    assert same == SAME_RANK


def test_the_module_is_used_from_above_only() -> None:
    found = imports()
    assert {part for part, used in found.items() if "module" in used} <= USE_MODULE
    assert "callbacks" not in set().union(*(used for part, used in found.items() if part not in ("cli", "run_end")))


def test_the_command_line_starts_without_slow_packages() -> None:
    slow = "{'sentence_transformers', 'datasets', 'ray'}"
    program = f"import sys, lora_gan.cli; print(sorted({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
