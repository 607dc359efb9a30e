"""A later chunk of a prompt on a GPU, as far as can be seen without one: as in ``test_block_devices.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_block_devices import waits
from test_list_devices import meta
from transformers import LlamaConfig, LlamaForCausalLM

import effcompile as ec
from effcompile import lowering
from effcompile.kernels.form import KVForm
from effcompile.lowering import triton_blocks
from effcompile.lowering.triton_build import Built

REFUSAL = lowering.refusal


@pytest.mark.parametrize("bits", [16, 4])
def test_a_later_chunk_is_taken(bits: int, no_inductor: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which has the GPU's kernels here."""
    monkeypatch.setattr(lowering, "refusal", lambda program, _: REFUSAL(program, "cuda"))
    config = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=64, vocab_size=60, head_dim=64)  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval().to(torch.bfloat16)
        ids = torch.zeros(2, 300, dtype=torch.int64)
    cache = ec.Cache(model, 512, key_bits=bits, value_bits=bits)
    ec.xattention(min_length=0, block_size=64)(model).compile(backend="effcompile")
    with torch.no_grad():
        model(ids[:, :150], past_key_values=cache)
        model(ids[:, 150:], past_key_values=cache)
    name = KVForm(bits, bits).name
    decided = ec.inspect(model).decisions
    assert {d.reason.code for d in decided if d.reason} <= {"taken"}  # what compress_kv would have done
    found = [d.form for d in decided if d.action == "rewritten"]
    assert len(found) == 2
    assert all(form.startswith("xattention_") for form in found)
    assert name in found[1]


@pytest.mark.parametrize("form", [KVForm(16, 16), KVForm(4, 4)], ids=lambda form: form.name)
def test_launching_does_not_wait(form: KVForm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a launcher does beside the launch, with what a call may bring besides lists."""
    launched: list[str] = []
    monkeypatch.setattr(Built, "launch", lambda self, kernel, grid, *args, **options: launched.append(self.name))
    state: list[torch.Tensor | None] = []
    for kind in ("key", "value"):
        made = form.buffers(kind, 2, 2, 320, 64, torch.bfloat16)  # type: ignore[arg-type]
        state += [meta(*shape, dtype=dtype) for shape, dtype in made] + [None] * (3 - len(made))
    query, length, int32 = meta(2, 8, 300, 64), meta(dtype=torch.int64), torch.int32
    counts, indices = meta(2, 8, 5, dtype=int32), meta(2, 8, 5, 5, dtype=int32)
    lists = (counts, indices, counts, indices, 64, form.name, 0.125, True, -1)
    bias, lse = meta(1, 8, 1, 320, dtype=torch.float32), meta(2, 8, 300, dtype=torch.float32)
    for more in (
        {"softcap": 30.0, "bias": bias, "sinks": meta(8)},
        {"query_positions": meta(1, 8, 300, dtype=torch.int64)},
        {"ranges": meta(2, 1, 300, 3, 2, dtype=int32)},
        {"before_out": meta(2, 8, 300, 64), "before_lse": lse},
    ):
        assert waits(lambda m=more: triton_blocks.attend_blocks(query, *state, length, None, *lists, **m)) == []
    assert [name.replace(form.name, "")[:21] for name in launched] == [
        "attend_blocks__d64_h4", "attend_blocks_moved__", "attend_blocks_ranges_", "attend_blocks_before_",
    ]  # fmt: skip


def test_a_recorded_graph_leaves_it_out() -> None:
    ours = torch.ops.effcompile
    assert torch.Tag.cudagraph_unsafe in ours.select_stored_blocks.default.tags
    for operator in (ours.select_blocks, ours.attend_blocks):
        assert torch.Tag.cudagraph_unsafe not in operator.default.tags
