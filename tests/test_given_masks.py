"""``blockrank`` and ``graph_kv`` compiled: the same as eager under the same 4-D mask, and what they decline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effcompile as ec
from models import MODELS

pytestmark = pytest.mark.usefixtures("no_inductor", "no_fallback")

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def ids(count: int, seed: int) -> list[int]:
    found: list[int] = torch.randint(1, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


def layouts(more: int = 0) -> dict[str, ec.Layout]:
    """Two prompts of different lengths each, chunks of odd ones."""
    a, b, c = (ids(n + more, n) for n in (61, 130, 47))
    rank = [ec.blockrank_layout(ids(75, 4), given, ids(19, 5), offset=400) for given in ([a, b, c], [c, a])]
    graph = [
        ec.graph_kv_layout([a, b, c], [(0, 1), (2, 1), (1, 1), (0, 2)], ids(19, 5), prefix=ids(33, 6)),
        ec.graph_kv_layout([b, a], [], ids(23, 7)),
    ]
    return {"blockrank": ec.Layout.batch(rank), "graph_kv": ec.Layout.batch(graph)}


def llama(dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> nn.Module:
    return MODELS["llama"](attention).to(dtype)


def told(model: nn.Module) -> list[str]:
    """Of each decision in order: the pass that stands there (or the kernel, without one), or the code of its reason."""
    found = ec.inspect(model).decisions
    return [d.form.partition("_attend")[0][:13] if d.reason is None else d.reason.code for d in found]


def test_both_are_methods_by_name() -> None:
    assert "blockrank(block_size=32)" in repr(ec.sparse_attention("blockrank", block_size=32))
    assert "graph_kv(block_size=64)" in repr(ec.sparse_attention("graph_kv"))
    with pytest.raises(ec.OptionError, match="multiple of 16"):
        ec.graph_kv(block_size=100)


@pytest.mark.parametrize(("name", "dtype"), [("blockrank", torch.bfloat16), ("graph_kv", torch.float32)])
def test_compiled_is_eager_under_the_same_mask(name: str, dtype: torch.dtype, no_inductor: list[Any]) -> None:
    """A padded batch of odd chunks, grouped heads, two lengths in one graph; the lists are made once for all layers."""
    model = ec.sparse_attention(name)(llama(dtype))
    fast = torch.compile(model, backend="effcompile", dynamic=True)
    for more in (0, 7):
        layout = layouts(more)[name]
        with torch.no_grad():
            ours = fast(**layout.inputs, use_cache=False).logits
            theirs = llama(dtype)(**layout.inputs, use_cache=False).logits
            exact = llama(dtype).double()(**layout.inputs, use_cache=False).logits
        lost = (theirs.double() - exact).abs().max()
        budget = 2 * lost + torch.finfo(dtype).eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= budget
    assert told(model) == [name, name]
    assert len(no_inductor) == 1
    calls = [str(node.target) for node in no_inductor[0].graph.nodes]
    assert sum("mask_blocks" in call for call in calls) == 1
    assert sum("attend_blocks" in call for call in calls) == 2


@pytest.mark.parametrize("name", [pytest.param("blockrank", marks=pytest.mark.slow), "graph_kv"])
def test_generate_goes_on_where_the_layout_ends(name: str) -> None:
    """The prompt through the pass, tokens through a compressed cache: as without any cache, under one large mask."""
    layout, eager = layouts()[name], llama()
    model = ec.compress_kv(key_bits=16, value_bits=16)(ec.sparse_attention(name)(llama()))
    model.compile(backend="effcompile")
    with torch.no_grad():
        out = model(**layout.inputs)
        text = out.logits[:, -1:].argmax(-1)
        found = model.generate(**layout.grown(text), past_key_values=out.past_key_values, **GREEDY)
        for _ in range(GREEDY["max_new_tokens"]):
            given = layout.grown(text)
            scores = eager(**given | {"attention_mask": whole(layout, given["attention_mask"])}, use_cache=False).logits
            text = torch.cat([text, scores[:, -1:].argmax(-1)], 1)
    assert torch.equal(found[:, layout.input_ids.shape[1] :], text)
    assert told(model) == [name, "taken"] * 2 + ["no-given-mask", "attend_decode"] * 2


def whole(layout: ec.Layout, seen: Tensor) -> Tensor:
    """The 4-D mask of a prompt and the text behind it, which sees all but padding, and itself causally."""
    batch, total = seen.shape
    first = layout.input_ids.shape[1]
    mask = seen[:, None, None].bool() & torch.ones(total, total, dtype=torch.bool).tril()
    mask[:, :, :first] = False
    mask[:, :, :first, :first] = layout.attention_mask
    return mask.expand(batch, 1, -1, -1)


class Plain(nn.Module):
    """Attention alone, under any mask."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout, self.weight = dropout, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = x * self.weight
        return nn.functional.scaled_dot_product_attention(y, y, y, mask, dropout_p=self.dropout)


def test_a_mask_for_each_head_with_a_row_that_sees_nothing() -> None:
    x, mask = torch.randn(2, 3, 100, 64), torch.rand(2, 3, 100, 100) < 0.3
    mask[:, :, 5] = False
    model = ec.graph_kv()(Plain())
    model.compile(backend="effcompile")
    with torch.no_grad():
        ours = model(x, mask)
    seen = torch.where(mask.any(-1, keepdim=True), mask, True)
    wanted = nn.functional.scaled_dot_product_attention(x, x, x, seen) * mask.any(-1, keepdim=True)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-6)
    assert told(model) == ["graph_kv"]


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("no mask", "no-given-mask"), ("float", "mask-not-honoured"), ("one row", "mask-shape"), ("flat", "mask-shape"),
        ("dropout", "dropout"), ("head size", "not-supported"), ("gradients", "gradients"),
    ],
)  # fmt: skip
def test_reasons(case: str, code: str) -> None:
    x = torch.randn(2, 3, 100, 20 if case == "head size" else 64)
    mask = torch.rand(2, 1, 100, 100) < 0.5
    mask |= torch.eye(100, dtype=torch.bool)
    given = {"no mask": None, "float": mask.float().log(), "one row": mask[:, :, :1], "flat": mask[0, 0]}
    model = ec.blockrank()(Plain(0.5 if case == "dropout" else 0.0))
    model.compile(backend="effcompile")
    with torch.set_grad_enabled(case == "gradients"):
        out = model(x, given.get(case, mask))
    assert told(model) == [code]
    if case != "dropout":
        torch.testing.assert_close(out, Plain()(x, given.get(case, mask)))


def test_a_mask_that_is_written_to_is_left() -> None:
    class Written(Plain):
        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            assert mask is not None
            mask = mask.clone()
            first = super().forward(x, mask)
            mask.logical_not_()
            return first + super().forward(x, mask)

    x, mask = torch.randn(1, 2, 64, 64), torch.rand(1, 1, 64, 64) < 0.5
    model = ec.graph_kv()(Written())
    model.compile(backend="effcompile")
    with torch.no_grad():
        torch.testing.assert_close(model(x, mask), Written()(x, mask))
    assert told(model) == ["mask-mutated", "graph_kv"]


def test_arithmetic_is_left() -> None:
    """Eager attention of transformers adds its mask, and with a boolean one means something else."""
    layout, model = layouts()["blockrank"], ec.blockrank()(llama(attention="eager"))
    lowest = torch.finfo(torch.float32).min
    given = layout.inputs | {"attention_mask": torch.where(layout.attention_mask, 0.0, lowest)}
    model.compile(backend="effcompile")
    with torch.no_grad():
        ours = model(**given, use_cache=False).logits
        theirs = llama()(**layout.inputs, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)
    assert told(model) == ["not-supported"] * 2
