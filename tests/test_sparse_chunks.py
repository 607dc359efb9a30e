"""A long prompt in chunks: later chunks choose among the blocks of a store, in any of its forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import effcompile as ec
from effcompile.kernels import block_ops, blocks
from effcompile.kernels.form import KVForm
from effcompile.passes.xattention import XAttention

pytestmark = pytest.mark.usefixtures("no_fallback")

OPS = torch.ops.effcompile
FORMS = [KVForm(16, 16), KVForm(4, 4), KVForm(8, 8, 32, 0), KVForm(3, 2, 64, 64, "token", "channel")]
IDS = torch.randint(0, 60, (2, 400), generator=torch.Generator().manual_seed(1))
CHUNKS = (150, 128, 122)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("padded", [False, True])
def test_choosing_from_a_store_is_choosing_from_its_keys(form: KVForm, padded: bool) -> None:
    """Of what the store gives back, not of what was put in; the lists have room for a full store."""
    torch.manual_seed(0)
    keys, queries, capacity = 333, 150, 512
    state: list[Tensor | None] = []
    for kind in ("key", "value"):
        made = form.buffers(kind, 2, 2, capacity, 64, torch.float32)  # type: ignore[arg-type]
        state += [torch.zeros(shape, dtype=dtype) for shape, dtype in made] + [None] * (3 - len(made))
    key, value, query = torch.randn(2, 2, keys, 64), torch.randn(2, 2, keys, 64), torch.randn(2, 6, queries, 64)
    OPS.kv_store(*state, torch.tensor(0), key, value, form.name)
    mask = None
    if padded:
        mask = torch.ones(2, capacity, dtype=torch.bool)
        mask[0, :100] = False
    method = block_ops.method_text("xattention", {"block_size": 64, "min_length": 0, "stride": 16, "threshold": 0.6})
    chosen = OPS.select_stored_blocks(query, *state, torch.tensor(keys), mask, form.name, method, 0.125)
    stored = OPS.kv_load(*state, torch.tensor(keys), form.name)[0][:, :, :keys]
    wanted = OPS.select_blocks(query, stored.float(), mask, method, 0.125)
    assert chosen[1].shape == chosen[3].shape == (2, 6, 3, 8)
    ours, theirs = (blocks.BlockLists(*lists, 64).keep() for lists in (chosen, wanted))
    assert torch.equal(ours[..., :6], theirs)
    assert not ours[..., 6:].any()
    assert 0.2 < theirs.float().mean() < 0.9
    args = (query, *state, torch.tensor(keys), mask, form.name, method, 0.125)
    torch.library.opcheck(OPS.select_stored_blocks.default, args)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=64, vocab_size=60, max_position_embeddings=1024)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def in_chunks(model: Any, mask: Tensor | None = None, ids: Tensor = IDS, sizes: Any = CHUNKS, **form: Any) -> Tensor:
    """Logits of all tokens, given to one cache in pieces."""
    cache, at, out = ec.Cache(model, 512, **form), 0, []
    with torch.no_grad():
        for size in sizes:
            more = {} if mask is None else {"attention_mask": mask[:, : at + size]}
            out.append(model(ids[:, at : at + size], past_key_values=cache, **more).logits)
            at += size
    return torch.cat(out, 1)


def forms_of(model: Any) -> list[str]:
    return [d.form for d in ec.inspect(model).decisions if d.action == "rewritten"]


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bits", [16, 4])
def test_at_the_limit_chunks_are_the_model(
    bits: int, padded: bool, llama: LlamaForCausalLM, no_inductor: list[Any]
) -> None:
    """Every chunk goes through the method, and gives what dense attention over the same cache gives."""
    mask = None
    if padded:
        mask = torch.ones_like(IDS)
        mask[0, :77] = 0
    form: dict[str, Any] = {"key_bits": bits, "value_bits": bits}
    expected = in_chunks(llama, mask, **form)
    ec.sparse_attention("xattention", min_length=64, block_size=64, threshold=1.0)(llama)
    llama.compile(backend="effcompile")
    ours = in_chunks(llama, mask, **form)
    if mask is not None:
        expected, ours = (x[mask.bool()] for x in (expected, ours))
    torch.testing.assert_close(ours, expected, rtol=0, atol=3e-5)
    forms = forms_of(llama)
    assert forms
    assert all(name.startswith("xattention_") for name in forms)
    assert any(KVForm(bits, bits).name in name for name in forms)


def test_chunks_of_whole_blocks_choose_as_the_whole_prompt(llama: LlamaForCausalLM, no_inductor: list[Any]) -> None:
    """A block of queries looks at itself and the keys before it, so a chunk's rows of lists are the prompt's."""
    ec.sparse_attention("xattention", min_length=0, block_size=64, threshold=0.3)(llama)
    llama.compile(backend="effcompile")
    form: dict[str, Any] = {"key_bits": 16, "value_bits": 16}
    whole = in_chunks(llama, sizes=(400,), **form)
    pieces = in_chunks(llama, sizes=(128, 128, 144), **form)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=3e-5)
    ec.remove(llama)
    llama._compiled_call_impl = None
    assert (in_chunks(llama, **form) - whole).abs().max() > 1e-3  # it is sparse


@pytest.mark.parametrize(
    ("options", "form", "size", "code", "text"),
    [
        ({}, {}, 32, "short-prompt", "chunk of 32 tokens"),
        ({"block_size": 48}, {"key_bits": 4, "value_bits": 4}, 128, "not-supported", "whole groups of 32"),
        ({}, {"key_bits": 4, "value_bits": 4, "rope": "pre"}, 128, "not-supported", "before RoPE"),
        ({"min_length": 600}, {}, 128, "short-prompt", "512 tokens"),
    ],
)
def test_chunks_that_stay_dense(
    options: dict[str, Any], form: dict[str, Any], size: int, code: str, text: str,
    llama: LlamaForCausalLM, no_inductor: list[Any],
) -> None:  # fmt: skip
    form = {"key_bits": 16, "value_bits": 16} | form
    sizes = (150, size)
    expected = in_chunks(llama, sizes=sizes, **form)
    ec.sparse_attention("xattention", **{"block_size": 64, "min_length": 0, "threshold": 1.0} | options)(llama)
    llama.compile(backend="effcompile", dynamic=False)
    torch.testing.assert_close(in_chunks(llama, sizes=sizes, **form), expected, rtol=0, atol=3e-5)
    later = ec.inspect(llama).decisions
    assert text in {d.reason.code: d.reason.text for d in later if d.reason is not None}[code]


def test_few_keys_are_all_visited() -> None:
    """min_length counts keys: a short chunk behind a long prompt is sparse, and a prompt's first chunk is not."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 128, 32), torch.randn(1, 1, 512, 32)
    method = XAttention(block_size=64, min_length=512, threshold=0.1)
    sparse = method.visited(query, key, 0.2, None)
    assert sparse.float().mean() < 0.5
    dense = method.visited(query, key[:, :, :511], 0.2, None)
    assert torch.equal(dense, blocks.possible(128, 511, 64))
    assert torch.equal(method.visited(query[:, :, :63], key, 0.2, None), blocks.possible(63, 512, 64))
