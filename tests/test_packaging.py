"""What an installed effcompile brings: entry points, package data, and a wheel that holds all of it."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_back_end_is_known_without_an_import() -> None:
    code = (
        "import sys, torch\n"
        "assert 'effcompile' in torch._dynamo.list_backends(exclude_tags=())\n"
        "assert 'effcompile' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_entry_points_lead_to_something_callable() -> None:
    points = importlib.metadata.distribution("effcompile").entry_points
    names = {(point.group, point.name) for point in points}
    assert names == {("torch_dynamo_backends", "effcompile"), ("console_scripts", "effcompile")}
    assert all(callable(point.load()) for point in points)


def test_the_command_runs() -> None:
    command = Path(sys.executable).parent / "effcompile"
    shown = subprocess.run([command, "--help"], check=True, capture_output=True, text=True, cwd="/").stdout
    assert all(word in shown for word in ("demo", "inspect", "methods", "doctor"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from a copy of the sources."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("effcompile", "passes", "lowering", "kernels", "patterns", "runtime"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(copy),
    ]
    subprocess.run(command, check=True)
    (built,) = out.glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_the_wheel_holds_every_source_file(wheel: set[str]) -> None:
    expected = {f"effcompile/{path.name}" for path in (ROOT / "effcompile").glob("*.py")}
    for part in ("passes", "lowering", "kernels", "patterns", "runtime"):
        files = [*(ROOT / part).rglob("*.py"), *(ROOT / part).rglob("*.h")]
        expected |= {f"effcompile/{path.relative_to(ROOT)}" for path in files}
    assert expected <= wheel, sorted(expected - wheel)


def test_the_wheel_says_that_it_is_typed_and_licensed(wheel: set[str]) -> None:
    assert "effcompile/py.typed" in wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    assert not [name for name in wheel if name.startswith(("tests/", "benchmarks/", "kernels/", "passes/"))]


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {"".join(c if c.isalnum() or c in "-_" else " " for c in text).split()[0].lower() for text in wanted}
    assert names - {"effcompile"} <= pinned
