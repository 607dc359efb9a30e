"""C++ kernels read and write nothing behind their buffers: each buffer ends where an unmapped page begins.

A read too far would go unnoticed in ordinary memory, whatever the values; here it ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import sys

import pytest
import torch
import torch.nn.functional as F

import effcompile.lowering  # noqa: F401  (registers the kernels)
from effcompile.kernels import ops
from effcompile.kernels.form import KVForm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")
OPS = torch.ops.effcompile


class Fence:
    """Copies of tensors, each of which ends at a page that must not be touched."""

    def __init__(self) -> None:
        self.maps: list[mmap.mmap] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        count, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
        size = -(-count // page) * page
        memory = mmap.mmap(-1, size + page)
        self.maps.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), page, 0) == 0
        copy = torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=size - count)
        return copy.view(tensor.dtype).view(tensor.shape).copy_(tensor)


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 80])
def test_fresh_keys_of_any_length(size, dtype):
    """The first call: a dense store that is exactly as long as its tokens, with padding, against SDPA in fp64."""
    draw = random.Random(size)
    torch.manual_seed(size)
    for tokens in (1, 2, 15, 17, 31, 64, 127, 129, 200, 300):
        fence, batch, groups = Fence(), draw.choice([1, 2]), draw.choice([1, 3])
        query = fence(torch.randn(batch, groups * 3, tokens, size, dtype=dtype))
        key, value = (fence(torch.randn(batch, groups, tokens, size, dtype=dtype)) for _ in range(2))
        keep = torch.ones(batch, tokens, dtype=torch.bool)
        keep[0, : draw.randint(0, tokens)] = False
        out, _ = OPS.attend(
            query, key, None, None, value, None, None, torch.tensor(tokens), fence(keep), KVForm(16, 16).name,
            size**-0.5, True, -1,
        )  # fmt: skip
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() & keep[:, None, None]
        wide = [x.double().repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (query, key, value)]
        expected = torch.where(mask.any(-1, keepdim=True), F.scaled_dot_product_attention(*wide, mask), 0)
        tolerance = 2e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize(
    "bits",
    [(16, 16), (8, 4), (4, 8), (3, 2), (2, 3), (4, "fp8", "token", "channel"), ("fp8", 3, "channel", "channel")],
    ids=str,
)
def test_a_full_store(bits):
    """Appending up to the last slot and attending to it, in decode and in prefill, equals the reference body."""
    form, fence, capacity = KVForm(*bits[:2], 32, 32, *bits[2:]), Fence(), 160
    torch.manual_seed(0)
    state = []
    for kind in ("key", "value"):
        made = [fence(torch.zeros(s, dtype=d)) for s, d in form.buffers(kind, 2, 3, capacity, 64, torch.float32)]
        state += made + [None] * (3 - len(made))
    key, value = (fence(torch.randn(2, 3, capacity, 64)) for _ in range(2))
    for start, stop in ((0, 97), (97, 98), (98, 160)):
        new = (fence(x[:, :, start:stop].contiguous()) for x in (key, value))
        OPS.kv_store(*state, torch.tensor(start), *new, form.name)
    for queries in (1, 62):
        query = fence(torch.randn(2, 9, queries, 64))
        call = (query, *state, torch.tensor(capacity), None, form.name, 0.125, True, -1)
        out, lse = OPS.attend(*call)
        with ops.reference_only():
            expected, expected_lse = OPS.attend(*call)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-5)
    dense = OPS.kv_load(*state, torch.tensor(capacity), form.name)
    with ops.reference_only():
        for got, expected in zip(dense, OPS.kv_load(*state, torch.tensor(capacity), form.name)):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
