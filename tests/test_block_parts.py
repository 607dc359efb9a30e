"""Score parts in attention over lists: soft cap, bias and sinks, and the models that have them."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from cpp_calls import assert_within_budget
from test_block_lists import ATTEND, FEW, Call
from test_score_parts import BROADCAST
from torch import Tensor, nn

import effcompile as ec
from effcompile import lowering
from effcompile.kernels import block_ops, blocks, columns, observe, ops
from effcompile.kernels.blocks import BlockError
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program, ScoreParts
from effcompile.lowering import cpp

DENSE, PACKED = KVForm(16, 16), KVForm(4, 4)
INF = float("inf")

PARTS = {
    "cap": ("softcap",),
    "bias": ("bias",),
    "sink": ("sinks",),
    "all": ("softcap", "bias", "sinks"),
}


def values(call: Call, names: tuple[str, ...], lead: tuple[int, int, int], extra: int = 7) -> dict[str, Any]:
    """A cap that bends the scores, a bias that is broadcast where ``lead`` is 0, and sinks."""
    batch, heads, queries, _ = call.query.shape
    shape = [n if on else 1 for n, on in zip((batch, heads, queries), lead)]
    given: dict[str, Any] = {
        "softcap": 1.5,
        "bias": torch.randn(*shape, call.keys + extra) * 2,
        "sinks": torch.linspace(-2, 4, heads).to(call.query.dtype),
    }
    return {name: given[name] for name in names}


def exact(call: Call, seen: Tensor, parts: dict[str, Any], slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """In fp64, spelled as the models do: the sink is a column of its own. ``seen`` is ``[B or 1, H or 1, T, S]``."""
    with ops.reference_only():
        sides = torch.ops.effcompile.kv_load.default(*call.state, torch.tensor(call.keys), call.rest[0])
    (batch, heads, queries, _), ratio = call.query.shape, call.query.shape[1] // sides[0].shape[1]
    key, value = (x[:, :, : call.keys].double().repeat_interleave(ratio, 1) for x in sides)
    scores = call.query.double() @ key.mT * call.rest[1]
    if "softcap" in parts:
        scores = parts["softcap"] * (scores / parts["softcap"]).tanh()
    if "bias" in parts:
        bias = parts["bias"].double()[..., : call.keys].expand(batch, heads, queries, -1)
        if slots is not None:
            at = slots.expand(batch, sides[0].shape[1], -1).repeat_interleave(ratio, 1)[:, :, None]
            bias = bias.gather(3, at.expand(-1, -1, queries, -1))
        scores = scores + bias
    scores = scores.masked_fill(~seen, -INF)
    if "sinks" in parts:
        sink = parts["sinks"].double()[None, :, None, None].expand(batch, heads, queries, 1)
        scores = torch.cat([scores, sink], 3)
    weights = scores.softmax(-1).nan_to_num(0)[..., : call.keys]
    return weights @ value, scores.logsumexp(-1)


def check(call: Call, args: tuple[Any, ...], more: dict[str, Any], truth: tuple[Tensor, Tensor], what: str) -> None:
    head = (call.query, *call.state, torch.tensor(call.keys), call.mask)
    out, lse = ATTEND(*head, *args, *call.rest, **more)
    with ops.reference_only():
        reference, reference_lse = ATTEND(*head, *args, *call.rest, **more)
    assert_within_budget(out, reference, truth[0], what)
    assert_within_budget(lse, reference_lse, truth[1], f"lse, {what}", roundings=2)


def causal(call: Call) -> Tensor:
    seen = torch.arange(call.keys) <= torch.arange(call.keys - call.queries, call.keys)[:, None]
    return seen if call.mask is None else seen & call.mask[:, None, None, : call.keys]


FAST = {("gqa, cut blocks", "all"), ("bf16, small blocks", "all")}


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize(
    ("name", "parts"),
    [pytest.param(n, p, marks=[pytest.mark.slow] * ((n, p) not in FAST)) for n in FEW for p in PARTS],
)
def test_kernel_and_reference_and_fp64(name: str, parts: str) -> None:
    call = Call(**{"block": 128, **FEW[name]})
    lead = BROADCAST[(list(FEW).index(name) + list(PARTS).index(parts)) % len(BROADCAST)]
    more = values(call, PARTS[parts], lead)
    seen = blocks.tokens(call.lists.keep(), call.queries, call.keys, call.block) & causal(call)
    check(call, block_ops.of(call.lists), more, exact(call, seen, more), name)


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("lead", [(1, 1, 1), (0, 1, 0)])
def test_single_keys_and_keys_in_another_order(lead: tuple[int, int, int]) -> None:
    """A bias has a number for each token: it is looked up where a column is, or by what a slot holds."""
    call = Call(6, 2, 300, 300, (64, 64), DENSE, 64)
    more = values(call, PARTS["all"], lead, extra=0)
    keep = call.lists.keep() & blocks.own(300, 300, 64)
    taken = blocks.tokens(keep, 300, 300, 64)
    chosen = torch.rand(2, 6, 5, 300) < 0.3
    chosen &= ~torch.stack([taken[:, :, i * 64 : (i + 1) * 64].any(2) for i in range(5)], 2)
    made, counts = columns.gathered(torch.arange(300), chosen)
    listed = block_ops.of(blocks.lists(keep, None, 64))
    single = chosen.repeat_interleave(64, 2)[:, :, :300]
    seen = (taken | single) & causal(call)
    check(call, listed, {**more, "columns": made, "column_counts": counts}, exact(call, seen, more), "columns")
    slots = torch.rand(2, 2, 300).argsort(-1)
    every = block_ops.of(blocks.lists(torch.ones(1, 1, 5, 5, dtype=torch.bool), None, 64))
    at = slots.repeat_interleave(3, 1)[:, :, None].expand(2, 6, 300, 300)
    seen = causal(call).expand(2, 6, 300, 300).gather(3, at)
    check(call, every, {**more, "key_positions": slots}, exact(call, seen, more, slots), "positions")


@pytest.mark.usefixtures("no_fallback")
def test_a_key_bias_with_a_scale_for_each_head() -> None:
    """One number a key and one a head: PASTA (Zhang et al., ICLR 2024, section 3.2) steers some heads so."""
    call = Call(6, 2, 300, 300, (64, 64), DENSE, 64)
    key_bias, head_scale = torch.randn(2, 1, 1, 300), torch.tensor([0.0, 1, 2, -1, 0, 3]).reshape(1, 6, 1, 1)
    more = {"bias": key_bias * head_scale}
    seen = blocks.tokens(call.lists.keep(), 300, 300, 64) & causal(call)
    check(call, block_ops.of(call.lists), more, exact(call, seen, more), "key bias")
    head = (call.query, *call.state, torch.tensor(300), None, *block_ops.of(call.lists), *call.rest)
    plain, steered = ATTEND(*head)[0], ATTEND(*head, **more)[0]
    assert torch.allclose(plain[:, [0, 4]], steered[:, [0, 4]], atol=2e-6)  # heads that nobody steers
    assert (plain[:, [1, 2, 3, 5]] - steered[:, [1, 2, 3, 5]]).abs().amax((0, 2, 3)).min() > 0.01


def test_a_sink_counts_once_in_two_calls() -> None:
    call = Call(6, 2, 300, 300, (64, 64), DENSE, 64)
    keep, sinks = call.lists.keep(), torch.linspace(-2, 4, 6)
    first = keep & (torch.rand(keep.shape) < 0.5)
    head = (call.query, *call.state, torch.tensor(300), None)

    def attend(some: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        return ATTEND(*head, *block_ops.of(blocks.lists(some, None, 64)), *call.rest, **more)  # type: ignore[no-any-return]

    wanted = attend(keep, sinks=sinks)
    for one, two in (({"sinks": sinks}, {}), ({}, {"sinks": sinks})):
        out, lse = attend(first, **one)  # type: ignore[arg-type]
        found = attend(keep & ~first, before_out=out, before_lse=lse, **two)
        torch.testing.assert_close(found, wanted, rtol=0, atol=4e-6)


def test_what_is_counted_does_not_depend_on_parts() -> None:
    """Density is pairs, whatever they weigh; kept mass is of the softmax, in which a sink keeps its own."""
    call = Call(6, 2, 300, 300, (64, 64), DENSE, 64)
    more = values(call, PARTS["all"], (1, 1, 1))
    args = (call.query, *call.state, torch.tensor(300), None, *block_ops.of(call.lists), *call.rest)
    density, kept = observe.observe(ATTEND, args, more, ATTEND(*args, **more)[1])
    seen = blocks.tokens(call.lists.keep(), 300, 300, 64) & causal(call)
    assert abs(float(density) - float(seen.sum() / causal(call).expand(2, 6, 300, 300).sum())) < 1e-6
    sparse, dense = (exact(call, x, more)[1] for x in (seen, causal(call)))
    assert abs(float(kept) - float((sparse - dense).exp().mean())) < 1e-6


def test_programs() -> None:
    plain = Program("prefill", DENSE, Predicate(), torch.float32, 2, 64, 64, blocks=True)
    scored = Program("prefill", DENSE, Predicate(), torch.float32, 2, 64, 64, ScoreParts(True, True, True), blocks=True)
    assert scored.name == f"{plain.name}_cap_bias_sink"
    assert "struct score" not in cpp.source(plain)
    assert lowering.refusal(scored, "cpu") is None
    assert lowering.refusal(scored, "cuda") is None


def test_operators_keep_torchs_contract() -> None:
    call = Call(6, 2, 150, 150, (64, 64), DENSE, 64)
    args = (call.query, *call.state, torch.tensor(150), None, *block_ops.of(call.lists), *call.rest)
    torch.library.opcheck(ATTEND, args, values(call, PARTS["all"], (1, 1, 1)))


def test_a_bias_is_looked_up_by_token() -> None:
    call = Call(6, 2, 150, 150, (64, 64), DENSE, 64)
    args = (call.query, *call.state, torch.tensor(150), None, *block_ops.of(call.lists), *call.rest)
    far = {"key_positions": torch.arange(150)[None, None] + 1, "query_positions": torch.arange(150)[None, None]}
    more = values(call, PARTS["all"], (0, 0, 0))
    for context in (contextlib.nullcontext(), ops.reference_only()):
        with context:
            ATTEND(*args, **far, **more | {"bias": None})
            with pytest.raises(BlockError, match="there are 150 tokens"):
                ATTEND(*args, **far, **more)


# Models.

METHODS: dict[str, dict[str, Any]] = {
    "xattention": {"threshold": 1.0},
    "vertical_slash": {"slash": 1 << 30, "vertical": 0},
    "pbs_attn": {"threshold": 1.0, "segment": 64},
}
SITES = {"gemma2": "cap", "gpt-oss": "sink", "bloom": "bias"}
CASES = [("gemma2", "xattention"), ("bloom", "pbs_attn")]  # gpt-oss below
SLOW = [(model, method) for model in SITES for method in METHODS if (model, method) not in CASES]


def logits(model: nn.Module, mask: Tensor | None = None) -> Tensor:
    ids = torch.randint(3, 96, (2, 300), generator=torch.Generator().manual_seed(4))
    given = {} if mask is None else {"attention_mask": mask.long()}
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **given).logits  # type: ignore[no-any-return]


def rewritten(model: nn.Module) -> list[str]:
    return [str(d.form) for d in ec.inspect(model).decisions if d.action == "rewritten"]


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize(("name", "method"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_the_limit_is_the_eager_model(name: str, method: str) -> None:
    """Layers with a window stay as they are; those of full attention are served with all their parts."""
    model = ARCHITECTURES[name].make()
    fast = copy.deepcopy(model)
    ec.sparse_attention(method, block_size=32, min_length=64, **METHODS[method])(fast)
    fast.compile(backend="effcompile")
    expected, found = logits(model), logits(fast)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    forms = rewritten(fast)
    assert forms
    assert all(form.startswith(method) and form.endswith(f"_{SITES[name]}") for form in forms)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_inductor")
def test_a_finite_mask_with_padding_stays() -> None:
    """Falcon makes its ALiBi from the padding mask; a row that sees no key is a mean of all values there."""
    model = ARCHITECTURES["falcon-alibi"].make()
    mask = torch.ones(2, 300, dtype=torch.bool)
    expected = logits(model, mask)
    ec.xattention(block_size=32, min_length=64, threshold=1.0)(model).compile(backend="effcompile")
    torch.testing.assert_close(logits(model, mask), expected)
    assert {d.reason.code for d in ec.inspect(model).decisions if d.reason} == {"mask-not-honoured"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("no_inductor")
def test_a_padded_batch_and_a_sparse_choice() -> None:
    """Left padding on a model with sinks: rows are as they are alone; and fewer blocks are another result."""
    model = ARCHITECTURES["gpt-oss"].make()
    mask = torch.arange(300)[None] >= torch.tensor([0, 96])[:, None]
    fast = copy.deepcopy(model)
    ec.xattention(block_size=32, min_length=64, threshold=1.0)(fast)
    fast.compile(backend="effcompile")
    expected, found = logits(model, mask), logits(fast, mask)
    assert float((found - expected)[mask].abs().max() / expected[mask].abs().max()) < 1e-5
    assert rewritten(fast)
    few = copy.deepcopy(model)
    ec.xattention(block_size=32, min_length=64, threshold=0.0)(few)
    few.compile(backend="effcompile")
    assert float((logits(few, mask) - expected)[mask].abs().max()) > 1e-3


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_verify_sees_the_parts() -> None:
    """Compiled for real: what was there and what is there now agree, by the report's own measure."""
    model = ARCHITECTURES["gemma2"].make()
    ec.xattention(block_size=32, min_length=64, threshold=1.0)(model)
    model.compile(backend="effcompile", options={"verify": True})
    logits(model)
    found = [d for d in ec.inspect(model).decisions if d.action == "rewritten"]
    assert found
    assert all(d.error is not None and d.error < 1e-5 for d in found)
    assert all((d.density, d.kept) == pytest.approx((1, 1), abs=1e-5) for d in found)
