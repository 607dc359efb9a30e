"""The examples that do more than a few lines, or need something beside this package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_finds_the_pass_keys(capsys: pytest.CaptureFixture[str]) -> None:
    """Through HFLM, dense and with a 4-bit cache that decode reads."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: its HFLM was NOT tried")
    load("lm_eval_local").main(500)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["dense", "1.0"] in lines
    assert ["4-bit", "cache", "1.0"] in lines
    assert any(line[:6] == ["60", "of", "60", "sites", "rewritten", "in"] for line in lines)


@pytest.mark.exhaustive
def test_a_long_prompt_beside_dense(capsys: pytest.CaptureFixture[str]) -> None:
    load("long_prompt").main(1000)
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    (_, dense), (_, sparse) = ((r[1].strip(), [cell.strip() for cell in r[2:-1]]) for r in rows[:2])
    assert dense[1:3] == ["1", "1"]
    assert 0.2 < float(sparse[1]) < 0.95
    assert 0.8 < float(sparse[2]) < 1
    assert dense[3].startswith("71432")
    assert sparse[3].startswith("71432")
    # At this length the choice costs next to nothing, and may gain.
    assert 0.95 < float(sparse[4]) / float(dense[4]) < 1.1
