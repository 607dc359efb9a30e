"""What tests share: no network, the same random numbers each time, and fixtures that more than one file asks for."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Tests run beside each other: a pool of threads for each process would only wait for the others'.
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``one_in(n, rest)``: of a test's cases, as ordered, all but one in n are of the set that ``rest`` names.

    With n prime to the numbers of values of several parameters, each value is in some case; of a single one some are
    left out. Cases marked slow are counted by themselves.
    """
    cases: dict[tuple[str, bool], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("one_in") and not item.get_closest_marker("exhaustive"):
            key = item.nodeid.partition("[")[0], item.get_closest_marker("slow") is not None
            cases.setdefault(key, []).append(item)
    for found in cases.values():
        mark = found[0].get_closest_marker("one_in")
        assert mark is not None
        (n,), rest = mark.args, mark.kwargs.get("rest", "slow")
        for index, item in enumerate(found):
            if index % n:
                item.own_markers[:] = [m for m in item.own_markers if m.name != "slow"]
                item.add_marker(rest)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """The same seed before each test; no compiled code, no plan of a call and no report left over from the one before.

    A graph that an earlier test has left alive would count as one of an equal model of this test.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    if report := sys.modules.get("effcompile.passes.report"):
        report._graphs.clear()
    if replay := sys.modules.get("effcompile.lowering.cpp_replay"):
        replay.forget()


@pytest.fixture(scope="session", autouse=True)
def _many_builds() -> None:
    """Where tests run beside each other there are many of them, and C++ to build in hundreds."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        from effcompile.lowering import toolchain

        # Without a compiler it is for the tests that need one to say so.
        with contextlib.suppress(toolchain.BuildError):
            toolchain.precompile()


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; decorate a ``copy.deepcopy`` of the model, never this one."""
    from effcompile import smollm2 as home

    return home.load()


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs compiled so far, each of which runs operator by operator: what is tested is not Inductor."""
    from effcompile.passes import backend

    graphs: list[Any] = []

    def run(gm: Any, inputs: Any, config_patches: Any = None) -> Any:
        graphs.append(gm)
        return gm.forward

    monkeypatch.setattr(backend, "compile_fx", run)
    return graphs


@pytest.fixture
def no_fallback() -> Iterator[None]:
    """A kernel that is missing where one is expected fails the test instead of being replaced by the reference."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs its PyTorch reference body")
        yield


@pytest.fixture(scope="module")
def build_ahead(request: pytest.FixtureRequest) -> None:
    """The C++ programs of a file's selected tests build in the background while the first of them run."""
    from cpp_calls import store_of

    from effcompile.kernels.program import Program
    from effcompile.lowering import cpp

    mine = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    params = [value for item in mine if hasattr(item, "callspec") for value in item.callspec.params.values()]
    cpp.prebuild(p for program in params if isinstance(program, Program) for p in (program, store_of(program)))


@pytest.fixture
def forgetful() -> Iterator[None]:
    """No kernel in memory, neither before the test nor after it."""
    from effcompile.lowering import cpp

    cpp.clear()
    yield
    cpp.clear()


@pytest.fixture
def bare(forgetful: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """An empty cache folder, no kernel in memory, and nothing warned about yet."""
    from effcompile.kernels import ops

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ops, "_warned", set())
