"""The shape of the house: which way imports point, how long files get, and that examples in docstrings run."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("effcompile", "passes", "patterns", "lowering", "runtime", "kernels")

MAY_IMPORT = {
    "effcompile": {"effcompile", "passes", "patterns", "lowering", "runtime", "kernels"},
    "passes": {"passes", "patterns", "lowering", "runtime", "kernels"},
    "patterns": {"patterns", "kernels"},
    "lowering": {"lowering", "kernels"},
    "runtime": {"runtime", "kernels"},
    "kernels": {"kernels"},
}
"""Arrows point down only: effcompile -> passes -> (patterns, lowering, runtime) -> kernels."""

MAX_LINES = 500
LONGER: dict[str, str] = {}
"""Files that may be longer than ``MAX_LINES``, with the reason."""


def python_files() -> list[Path]:
    return sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "effcompile":
        parts.insert(0, "effcompile")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The part of the house that ``effcompile.<...>`` belongs to."""
    names = module.split(".")
    return names[1] if len(names) > 1 and names[1] in PARTS else "effcompile"


def imports(source: str, module: str, package: bool) -> list[tuple[int, str]]:
    """Line and name of everything of ours that a module imports, also inside functions and under TYPE_CHECKING."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")
                keep = len(above) - node.level + package
                base = ".".join(above[:keep] + ([node.module] if node.module else []))
            # ``from effcompile import passes`` imports a part, ``from effcompile.passes import base`` stays within one.
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name == "effcompile" or name.startswith("effcompile.")]


def wrong_imports(source: str, module: str, package: bool = False) -> list[str]:
    """One line for each import that points up, or to a part beside."""
    part = part_of(module)
    return [
        f"{module}:{line}: {part} may not import {part_of(name)} ({name})"
        for line, name in imports(source, module, package)
        if part_of(name) not in MAY_IMPORT[part]
    ]


def test_imports_point_down() -> None:
    wrong = [
        text
        for path in python_files()
        for text in wrong_imports(path.read_text(), module_name(path), path.name == "__init__.py")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from effcompile.passes import base", "effcompile.kernels.form"),
        ("import effcompile", "effcompile.runtime.cache"),
        ("def f():\n    from effcompile import lowering", "effcompile.patterns.walk"),
        ("from ..runtime import cache", "effcompile.lowering.build"),
        ("from effcompile import cli", "effcompile.passes.report"),
    ],
)
def test_an_import_that_points_up_is_found(source: str, module: str) -> None:
    assert len(wrong_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from effcompile.kernels.form import KVForm", "effcompile.patterns.attention"),
        ("from . import form", "effcompile.kernels.ops"),
        ("import torch\nfrom transformers import cache_utils", "effcompile.runtime.cache"),
        ("from effcompile import patterns, runtime", "effcompile.passes.backend"),
    ],
)
def test_an_import_that_points_down_is_right(source: str, module: str) -> None:
    assert wrong_imports(source, module) == []


def test_files_can_be_read_in_one_sitting() -> None:
    others = [path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    headers = (ROOT / "kernels" / "cpp").glob("*.h")
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in (*python_files(), *others, *headers)
    }
    assert lengths
    too_long = {name: length for name, length in lengths.items() if length > MAX_LINES and name not in LONGER}
    assert not too_long
    assert not [name for name in LONGER if lengths.get(name, 0) <= MAX_LINES], "listed as long, but it is not"


def test_public_functions_and_classes_say_what_they_do() -> None:
    silent = []
    for path in python_files():
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            silent.append(f"{path.relative_to(ROOT)}: the module")
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if not public:
                continue
            inner = node.body if isinstance(node, ast.ClassDef) else []
            methods = [m for m in inner if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
            for what in (node, *methods):
                if not ast.get_docstring(what):
                    silent.append(f"{path.relative_to(ROOT)}:{what.lineno}: {what.name}")
    assert not silent, "\n".join(silent)


@pytest.mark.parametrize("name", [module_name(path) for path in python_files()])
def test_examples_in_docstrings(name: str) -> None:
    # Through the import system: collecting the bare folders would import modules twice, and register operators twice.
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
