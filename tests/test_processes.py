"""Across processes: the same options find Inductor's caches, other options never get the first one's code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, warnings
import torch
from torch._dynamo.utils import counters
import effcompile as ec
from models import MODELS

warnings.simplefilter("ignore")
key_bits, rules = int(sys.argv[1]), json.loads(sys.argv[2])
ids = torch.randint(1, 128, (1, 200), generator=torch.Generator().manual_seed(1))
greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
greedy |= {"output_logits": True, "return_dict_in_generate": True}
eager = ec.compress_kv(key_bits=key_bits, value_bits=8)(MODELS["llama"]("sdpa"))
expected = eager.generate(ids, **greedy)
fast = ec.compress_kv(key_bits=key_bits, value_bits=8)(MODELS["llama"]("sdpa"))
fast.compile(backend="effcompile", options={"rules": rules})
got = fast.generate(ids, **greedy)
error = max(float((a - b).abs().max()) for a, b in zip(got.logits, expected.logits))
rewritten = sum(d.action == "rewritten" for d in ec.inspect(fast).decisions)
found = counters["inductor"]
print(json.dumps({"error": error, "hits": found["fxgraph_cache_hit"], "misses": found["fxgraph_cache_miss"],
                  "rewritten": rewritten, "tokens": got.sequences[0, 200:].tolist()}))
"""


def run(folder: Path, key_bits: int, rules: dict[str, object]) -> dict[str, float]:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(key_bits), json.dumps(rules)],
        capture_output=True, text=True, env=environment, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.exhaustive
def test_caches_across_processes(tmp_path):
    first = run(tmp_path, 4, {})
    assert first["hits"] == 0
    assert first["misses"] == 2
    assert first["rewritten"] == 4
    same = run(tmp_path, 4, {})
    assert same["hits"] == 2
    assert same["misses"] == 0
    other_bits = run(tmp_path, 8, {})
    assert other_bits["hits"] == 0, "another form got the first one's code"
    other_rules = run(tmp_path, 4, {"model.layers.0": {"compress_kv": True}})
    assert other_rules["misses"] == 2, "other options got the first one's code"
    for result in (first, same, other_bits, other_rules):
        assert result["error"] < 1e-3
    assert first["tokens"] == same["tokens"] == other_rules["tokens"]
