"""Headers that are prepared once: read by every later build, and of no consequence where they cannot be used."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from effcompile.lowering import toolchain

SOURCE = '#include "vec.h"\nextern "C" float twice(float x) { return ec::VL > 0 ? 2 * x : 0; }\n'


def twice(name: str, x: float) -> Any:
    call = toolchain.load(toolchain.build(name, SOURCE)).twice
    call.argtypes, call.restype = [ctypes.c_float], ctypes.c_float
    return call(x)


@pytest.mark.exhaustive
def test_prepared_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "builds"))
    header = tmp_path / "headers" / "parts.h"
    monkeypatch.setattr(toolchain, "_header", lambda: header)
    found = toolchain.precompile()
    assert found.name == f"{header.name}{found.suffix}"
    with monkeypatch.context() as patch:

        def refuse(*_: Any, **__: Any) -> str:
            raise AssertionError("prepared twice")

        patch.setattr(toolchain, "_compile", refuse)
        assert toolchain.precompile() == found
    runs, run = [], toolchain._run

    def counted(*given: Any, **more: Any) -> str:
        runs.append(given[2:])
        return run(*given, **more)

    monkeypatch.setattr(toolchain, "_run", counted)
    header.write_text("#error the header was read again\n")
    assert twice("one", 1.5) == 3.0
    assert runs == [(f"-include {header}",)]
    # What it cannot use, and a header that is an error to it, as both are to clang.
    found.write_bytes(b"of another compiler")
    assert twice("two", 2.5) == 5.0
    assert runs[1:] == [(f"-include {header}",), ()]
