"""The command line: what it prints, what it exits with, and that it describes nothing twice."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import effcompile
from effcompile import cli, doctor
from effcompile.passes import base

runner = CliRunner()


def run(*words: str) -> Any:
    # Wide, so that no word is broken over two lines of a table.
    return runner.invoke(cli.app, list(words), catch_exceptions=False, env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama as ``save_pretrained`` writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=64,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def test_import_is_light_and_names_are_lazy() -> None:
    loaded = "print('torch' in sys.modules)"
    code = f"import sys, effcompile; {loaded}; effcompile.OptionError; {loaded}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_public_names_exist_and_wrong_ones_are_told() -> None:
    for name in effcompile.__all__:
        assert getattr(effcompile, name) is getattr(effcompile, name)
    assert set(base.REGISTRY) <= set(effcompile.__all__)
    assert effcompile.__version__ == importlib.metadata.version("effcompile")
    with pytest.raises(AttributeError, match="no attribute 'compres_kv'; it offers Cache"):
        effcompile.compres_kv  # type: ignore[attr-defined]  # noqa: B018


def test_version() -> None:
    assert run("--version").stdout.strip() == effcompile.__version__


def test_methods_come_from_the_registry() -> None:
    rows = {row["name"]: row for row in json.loads(run("methods", "--json").stdout)}
    assert list(rows) == list(base.REGISTRY)
    for name, row in rows.items():
        assert {o: facts["default"] for o, facts in row["options"].items()} == {
            o: default for o, (_, default) in base.fields_of(base.get(name)).items()
        }
    table = run("methods").stdout
    assert all(name in table for name in rows)
    assert "key_bits: int | 'fp8' = 4" in table


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from effcompile import demo

    seen: dict[str, Any] = {}
    theirs = {name: p.default for name, p in inspect.signature(demo.main).parameters.items()}
    assert {name: p.default for name, p in inspect.signature(cli.demo).parameters.items()} == theirs
    monkeypatch.setattr(demo, "main", lambda **given: seen.update(given) or 2)
    assert run("demo", "--tokens", "500", "--bits", "8,4", "--skip-inductor", "--json").exit_code == 2
    assert seen == {"tokens": 500, "bits": "8,4", "skip_inductor": True, "as_json": True}


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--key-bits", "8", "--value-bits=4"], {"key_bits": 8, "value_bits": 4}),
        (["--name", "x", "--flag"], {"name": "x", "flag": True}),
        (["--window", "None", "--ratio", "-0.5"], {"window": None, "ratio": -0.5}),
        ([], {}),
    ],
)
def test_words_become_options(words: list[str], options: dict[str, Any]) -> None:
    assert cli._method_options(words) == options


@pytest.mark.slow
def test_inspect_reports_every_site(folder: str) -> None:
    done = run("inspect", folder, "--tokens", "40", "--key-bits", "8", "--verify", "--diff")
    assert done.exit_code == 0
    assert "k8v4g32r128" in done.stdout
    assert "decorator on LlamaForCausalLM" in done.stdout
    assert "+++ graph" in done.stdout
    content = json.loads(run("inspect", folder, "--tokens", "40", "--json").stdout)
    assert content["model"] == "LlamaForCausalLM"
    found = {(d["module"], d["action"]) for g in content["graphs"] if g["label"] == "decode" for d in g["decisions"]}
    assert found == {("model.layers.0.self_attn", "rewritten"), ("model.layers.1.self_attn", "rewritten")}
    assert content["kernels"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--key-bit", "8"], "unknown option of compress_kv 'key_bit'; nearest: key_bits"),
        (["--key-bits", "5"], "key_bits=5 is not offered"),
        (["--key-bits", "many"], "takes int | 'fp8' there"),
        (["--method", "compres_kv"], "unknown method 'compres_kv'; nearest: compress_kv"),
        (["stray"], "'stray' is not an option"),
    ],
)
def test_wrong_options_exit_2_before_anything_is_loaded(words: list[str], said: str) -> None:
    done = run("inspect", "/nowhere", *words)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    done = run("inspect", str(tmp_path))
    assert done.exit_code == 2
    assert "Give a folder written by save_pretrained" in " ".join(done.stderr.split())


def test_doctor_on_this_machine() -> None:
    states = {check.name: check for check in doctor.run()}
    assert {"python", "torch", "back end", "CPU", "C++ compiler", "Triton", "GPU", "cache folder"} <= set(states)
    assert states["back end"].state == "ok", states["back end"]
    assert states["C++ compiler"].state == "ok", states["C++ compiler"]
    assert all(check.todo for check in states.values() if check.state != "ok")


def test_doctor_without_a_compiler() -> None:
    env = {**os.environ, "CXX": "/nowhere/c++"}
    code = "from effcompile import doctor; c = next(doctor.compiler()); print(c.state, c.todo)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.startswith("fail install g++")


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor_exit_code(monkeypatch: pytest.MonkeyPatch, state: Any, code: int) -> None:
    def check() -> Iterator[doctor.Check]:
        yield doctor.Check("thing", state, "found [this]", "do that")

    def broken() -> Iterator[doctor.Check]:
        raise RuntimeError("odd")

    monkeypatch.setattr(doctor, "CHECKS", (check,))
    done = run("doctor")
    assert done.exit_code == code
    assert "found [this]" in done.stdout
    assert "do that" in done.stdout
    monkeypatch.setattr(doctor, "CHECKS", (broken, check))
    assert [c.found for c in doctor.run()] == ["RuntimeError: odd", "found [this]"]
