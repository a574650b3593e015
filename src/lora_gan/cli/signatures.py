"""Signatures: what a class or function accepts, read from its source, so that help needs none of the slow imports."""

from __future__ import annotations

import ast
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docstring_parser import parse


@dataclass(frozen=True)
class Definition:
    """A class, a function or a type alias, where it is defined."""

    module: str
    name: str
    node: ast.stmt

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Setting:
    """An argument of a class or function."""

    name: str
    type: ast.expr | None  # as written in ``module``
    default: ast.expr | None  # None: it must be given
    text: str  # its docstring
    module: str


@cache
def find(path: str) -> Definition | None:
    """What an import path names, followed through the imports of packages; None where there is no source of it."""
    module, _, name = path.rpartition(".")
    for node in _statements(module):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return Definition(module, name, node)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return Definition(module, name, node)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                origin = f"{_absolute(node, module)}.{alias.name}"
                if (alias.asname or alias.name) == name and origin != path:  # a package may import its own module
                    return find(origin)
    return None


def settings_of(path: str) -> dict[str, Setting]:
    """The arguments of a class, with those of its bases that it passes on; of a dataclass its fields."""
    found = find(path)
    if found is None or not isinstance(found.node, ast.ClassDef):
        return _arguments(found, found.node) if found and isinstance(found.node, ast.FunctionDef) else {}
    texts = _texts(found.node)
    if _is_dataclass(found.node):
        own = {
            field.target.id: Setting(
                field.target.id, field.annotation, field.value, texts.get(field.target.id, ""), found.module
            )
            for field in found.node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        }
        return {**_of_bases(found), **own}
    constructor = _constructor(found.node)
    if constructor is None:
        return _of_bases(found)
    own = _arguments(found, constructor, texts)
    return {**own, **_passed_on(found, constructor)}


def is_group(path: str) -> bool:
    """Whether an import path names a dataclass: a group of settings."""
    found = find(path)
    return found is not None and isinstance(found.node, ast.ClassDef) and _is_dataclass(found.node)


def accepts_anything(path: str) -> bool:
    """Whether the class cannot be read here, or takes arguments that its signature does not name."""
    found = find(path)
    if found is None or not isinstance(found.node, ast.ClassDef):
        return True
    constructor = _constructor(found.node)
    if _is_dataclass(found.node) or (constructor and not constructor.args.kwarg):
        return False
    if constructor and not _passes_on(constructor):
        return True
    bases = list(_bases(found))
    return len(bases) != len(found.node.bases) or any(map(accepts_anything, bases))


def summary(path: str) -> str:
    """The docstring's text without its sections."""
    found = find(path)
    text = ast.get_docstring(found.node) if found and isinstance(found.node, ast.ClassDef | ast.FunctionDef) else None
    parsed = parse(text or "")
    return "\n\n".join(part for part in (parsed.short_description, parsed.long_description) if part)


def is_a(path: str, base: str) -> bool:
    """Whether a class is the other one or one of its subclasses, as far as the sources tell."""
    found, wanted = find(path), find(base)
    if found is None or wanted is None:
        return False
    return found.path == wanted.path or any(is_a(each, base) for each in _bases(found))


def exported(module: str) -> list[str]:
    """Import paths of the classes that a package offers, or that a module defines."""
    names = [node.name for node in _statements(module) if isinstance(node, ast.ClassDef)]
    for node in _statements(module) if _is_package(module) else []:
        names += [alias.asname or alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
    paths = [f"{module}.{name}" for name in names]
    return [path for path in paths if (found := find(path)) and isinstance(found.node, ast.ClassDef)]


def stub(path: str) -> Callable[..., dict[str, Any]]:
    """A function of the same signature and docstring that returns its arguments."""
    found = find(path)
    assert found is not None and isinstance(found.node, ast.FunctionDef), path
    future, returning = ast.parse("from __future__ import annotations\ndef f():\n return locals()").body
    assert isinstance(returning, ast.FunctionDef)
    documentation = found.node.body[:1] if ast.get_docstring(found.node) else []
    function = ast.FunctionDef(**{**vars(found.node), "body": documentation + returning.body, "decorator_list": []})
    code = compile(ast.Module([future, function], []), path, "exec")
    namespace: dict[str, Any] = {**vars(typing), "Path": Path}
    exec(code, namespace)
    result: Callable[..., dict[str, Any]] = namespace[found.name]
    return result


@cache
def _statements(module: str) -> list[ast.stmt]:
    """The statements of a module, also those for type checkers only; empty where its source cannot be found."""
    for place in _places(module):
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                return list(_flat(ast.parse(file.read_text(encoding="utf-8")).body))
    return []


def _flat(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in statements:
        if isinstance(node, ast.If | ast.Try):
            yield from _flat(node.body)
        yield node


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    place = module.split(".")
    is_package = _is_package(module)
    parents = place[: len(place) - node.level + is_package]
    return ".".join([*parents, *([node.module] if node.module else [])])


def _is_package(module: str) -> bool:
    return any((place / "__init__.py").is_file() for place in _places(module))


def _places(module: str) -> list[Path]:
    """Where the folder of a package or, with the ending .py, the file of a module may be; nothing is imported."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return []
    if spec is not None and spec.submodule_search_locations is not None:
        return [Path(folder, *rest) for folder in spec.submodule_search_locations]
    return [Path(spec.origin).with_suffix("")] if spec is not None and spec.origin and not rest else []


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _bases(found: Definition) -> Iterator[str]:
    """Import paths of the bases whose source is known."""
    for base in found.node.bases if isinstance(found.node, ast.ClassDef) else []:
        name = base.value if isinstance(base, ast.Subscript) else base
        if (path := resolve(name, found.module)) is not None:
            yield path


def resolve(name: ast.expr, module: str) -> str | None:
    """Import path of a name or of module.name, as written in a module."""
    if isinstance(name, ast.Name):
        found = find(f"{module}.{name.id}")
        return found.path if found else None
    if isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name):
        for node in _statements(module):
            for alias in node.names if isinstance(node, ast.Import) else []:
                if (alias.asname or alias.name) == name.value.id:
                    found = find(f"{alias.name}.{name.attr}")
                    return found.path if found else None
    return None


def _of_bases(found: Definition) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for base in _bases(found):
        settings = {**settings_of(base), **settings}
    return settings


def _constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)


def _passes_on(constructor: ast.FunctionDef) -> bool:
    """Whether ``**kwargs`` go to the constructor of the bases."""
    return "super().__init__(" in (text := ast.unparse(constructor)) and f"**{_name_of_kwargs(constructor)})" in text


def _name_of_kwargs(constructor: ast.FunctionDef) -> str:
    return constructor.args.kwarg.arg if constructor.args.kwarg else ""


def _passed_on(found: Definition, constructor: ast.FunctionDef) -> dict[str, Setting]:
    """What ``**kwargs`` stands for: the arguments of the bases."""
    if not constructor.args.kwarg or not _passes_on(constructor):
        return {}
    own = {argument.arg for argument in constructor.args.args}
    return {name: setting for name, setting in _of_bases(found).items() if name not in own}


def _arguments(found: Definition, node: ast.FunctionDef, texts: dict[str, str] | None = None) -> dict[str, Setting]:
    texts = {**(texts or {}), **_texts(node)}
    given, keywords = node.args.posonlyargs + node.args.args, node.args.kwonlyargs
    missing: list[ast.expr | None] = [None] * (len(given) - len(node.args.defaults))
    defaults = dict(
        zip([a.arg for a in given + keywords], [*missing, *node.args.defaults, *node.args.kw_defaults], strict=True)
    )
    return {
        a.arg: Setting(a.arg, a.annotation, defaults[a.arg], texts.get(a.arg, ""), found.module)
        for a in given + keywords
        if a.arg != "self"
    }


def _texts(node: ast.ClassDef | ast.FunctionDef) -> dict[str, str]:
    """What the docstring says of each argument."""
    parsed = parse(f"Text.\n\n{ast.get_docstring(node) or ''}")  # a docstring that begins with "Args:" is read, too
    return {each.arg_name: " ".join((each.description or "").split()) for each in parsed.params}
