"""``ec.read_me`` on models: beside the same method written with hooks on the eager model, which reads all of a text."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from test_token_router import brute
from torch import Tensor, nn

import effcompile as ec
from effcompile.kernels.token_router import ROUTE_TOKENS
from effcompile.passes import base
from effcompile.passes.read_me import ROUTER
from effcompile.runtime.plan import Plan, Record
from models import MODELS

WINDOW = 9
SMALL: dict[str, Any] = {"dim": 24, "heads": 2, "hidden": 20, "window": WINDOW, "steps": 2, "batch": 2}
IDS = torch.randint(3, 128, (2, 33), generator=torch.Generator().manual_seed(3))
PADDED = torch.ones_like(IDS)
PADDED[0, :13] = 0
GREEDY: dict[str, Any] = {
    "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "output_logits": True,
    "return_dict_in_generate": True,
}  # fmt: skip
LAST = {"llama": "down_proj", "gpt2": "mlp.c_proj", "phi3": "down_proj", "opt": "fc2"}
GATED = ("llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "phi3", "opt")))


def domains(rows: int = 2, batches: int = 2, tokens: int = 24, first: int = 0) -> dict[str, list[Tensor]]:
    """Text of two vocabularies."""
    g = torch.Generator().manual_seed(7 + first)
    return {
        name: [torch.randint(low, low + 62, (rows, tokens), generator=g) for _ in range(batches)]
        for name, low in (("low", 3), ("high", 65))
    }


@functools.cache
def model_of(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return MODELS[architecture]("sdpa").to(dtype)


@functools.cache
def plan_of(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Plan:
    """Masks as they are calibrated, and a router with more to say than one of two steps: it changes its mind often."""
    plan = ec.calibrate(model_of(architecture, dtype), domains(), [ec.read_me(**SMALL)], progress=False)
    router = router_in(plan)
    g = torch.Generator().manual_seed(5)
    tensors = {
        name: t if name == "rows" else torch.randn(t.shape, generator=g) * (1 if t.ndim == 1 else 0.5)
        for name, t in router.tensors.items()
    }
    return with_record(plan, dataclasses.replace(router, tensors=tensors))


def router_in(plan: Plan) -> Record:
    (found,) = [record for record in plan if record.module.endswith(ROUTER)]
    return found


def with_record(plan: Plan, *records: Record, without: str = "") -> Plan:
    """The plan with these records in the place of theirs."""
    kept = {(r.module, r.method): r for r in (*plan, *records)}
    return Plan({key: r for key, r in kept.items() if not without or without not in r.module}, plan.made)


def planned(model: nn.Module, plan: Plan, **options: Any) -> Any:
    made = copy.deepcopy(model)
    made.compile(backend="effcompile", options={"plan": plan, **options})
    return made


class Masked:
    """The method: every token's neurons are cut to its expert's, which a router says that reads the whole text."""

    def __init__(self, model: nn.Module, plan: Plan, last: str, window: int = WINDOW) -> None:
        self.model, self.plan, self.window = copy.deepcopy(model), plan, window
        self.router = dict(router_in(plan).tensors)
        self.routes = torch.empty(0)
        for name, module in self.model.named_modules():
            record = plan.get(name.rpartition(".")[0], "read_me")
            if name.endswith(last) and record is not None:
                module.register_forward_pre_hook(functools.partial(self.cut, record.tensors["masks"]))

    def cut(self, masks: Tensor, module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        kept = masks[self.routes.flatten()].view(given[0].shape)
        return (given[0] * kept,)

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        said = brute(ids, None if mask is None else mask.bool(), self.router, 2, self.window)
        self.routes = said.argmax(-1)
        assert len(self.routes.unique()) == len(next(iter(self.plan)).tensors["masks"])
        given = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        logits: Tensor = self.model(ids, use_cache=False, **given).logits
        return logits


def forms(model: nn.Module) -> set[str]:
    found = [d for d in ec.inspect(model).decisions if d.kind == "ffn"]
    assert found
    return {d.form if d.reason is None else d.reason.code for d in found}


def reasons(model: nn.Module) -> set[str]:
    return {d.reason.code for d in ec.inspect(model).decisions if d.kind == "ffn" and d.reason is not None}


@torch.no_grad()
def read(model: Any, ids: Tensor, cache: Any = None, **given: Any) -> Tensor:
    given |= {"use_cache": False} if cache is None else {"past_key_values": cache}
    out: Tensor = model(ids, **given).logits
    return out


def new_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=3e-5, atol=3e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("architecture", GATED)
def test_limit_is_eager(architecture: str, no_inductor: list[Any]) -> None:
    model = model_of(architecture)
    plan = ec.calibrate(
        model, domains(), [ec.read_me(**{**SMALL, **base.get("read_me").limit})], progress=False
    )  # fmt: skip
    fast = planned(model, plan)
    close(read(fast, IDS), read(model, IDS))
    assert [graph.unmatched for graph in ec.inspect(fast).graphs] == [()]
    width = 512 if architecture == "gpt2" else 96
    assert forms(fast) == {f"read_me {width} of {width} neurons, 2 experts"}
    for record in plan:
        assert record.module.endswith(ROUTER) or record.numbers["shared"] == 1
        assert record.numbers.get("error", 0) < 1e-5


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("architecture", GATED)
def test_generating_is_the_method_on_the_whole_text(architecture: str, padded: bool, no_inductor: list[Any]) -> None:
    """A prompt, and steps with a cache. The text is longer than what the router sees."""
    model, plan = model_of(architecture), plan_of(architecture)
    given = {"attention_mask": PADDED} if padded else {}
    fast = planned(model, plan)
    got = fast.generate(IDS, **given, **GREEDY)
    mask = torch.cat([PADDED, torch.ones(2, 7, dtype=torch.int64)], 1) if padded else None
    wanted = Masked(model, plan, LAST[architecture])(got.sequences, mask)
    assert len(got.logits) == 7
    for step, ours in enumerate(got.logits):
        close(ours, wanted[:, IDS.shape[1] - 1 + step])
    width = 512 if architecture == "gpt2" else 96
    assert forms(fast) == {f"read_me {width // 2} of {width} neurons, 2 experts"}
    dense = model.generate(IDS, **given, **GREEDY)
    assert (dense.logits[0] - got.logits[0]).abs().max() > 1e-2
    (text,) = ec.routed_text(fast).values()
    assert text == (39, 2, 0)


def test_one_route_for_all_layers(no_inductor: list[Any]) -> None:
    """One call of the router, read by every block; and routing anew for each block gives the same."""
    model = model_of()
    fast = planned(model, plan_of())
    got = read(fast, IDS)
    (graph,) = no_inductor
    (route,) = graph.graph.find_nodes(op="call_function", target=ROUTE_TOKENS)
    blocks = graph.graph.find_nodes(op="call_function", target=torch.ops.effcompile.grouped_ffn.default)
    assert len(blocks) == 2
    assert {block.args[4] for block in blocks} == {route}
    anew = [0]

    def again(*args: Any) -> Any:
        copies = [t.clone().zero_() for t in args[3:7]]
        anew[0] += 1
        return ROUTE_TOKENS(*args[:3], *copies, *args[7:])

    for block in blocks:
        with graph.graph.inserting_before(block):
            block.args = (*block.args[:4], graph.graph.call_function(again, route.args), *block.args[5:])
    graph.recompile()
    assert torch.equal(read(fast, IDS), got)
    assert anew == [2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_slices_are_the_masked_block(gated: bool, dtype: torch.dtype) -> None:
    """Shared neurons and an expert's, with biases, an odd width and three domains of which two are alike."""
    from effcompile.kernels.ffn import FeedForward

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    block = FeedForward(
        some(37, 16),
        some(37, 16),
        some(37, 16) if gated else None,
        "silu",
        some(37),
        some(37) if gated else None,
        some(16),
    )
    method = ec.read_me(0.4, **SMALL).options
    order = torch.stack([torch.randperm(37)[:15]] * 2 + [torch.randperm(37)[:15]])
    masks = torch.zeros(3, 37, dtype=torch.bool).scatter(1, order, True)
    record = Record("", "read_me", {}, {}, tensors={"masks": masks})
    x = some(11, 16)
    for expert, mask in enumerate(masks):
        wide = block.middle(x).double() * mask
        wanted = wide @ block.down.double() + block.down_bias.double()  # type: ignore[union-attr]
        got = method.approximate(block, record, expert)(x).double()
        limit = 1e-12 if dtype is torch.float64 else 0.03
        assert (got - wanted).norm() < limit * wanted.norm()
    # Unlike masks give unlike results.
    assert not torch.allclose(*(method.approximate(block, record, n)(x).double() for n in (0, 2)))


@pytest.mark.exhaustive
def test_chunks_turns_and_rows(no_inductor: list[Any]) -> None:
    """A prompt in chunks is the whole; a second turn goes on; each row of a batch is what it is alone."""
    model, plan = model_of(), plan_of()
    fast = planned(model, plan)
    wanted = Masked(model, plan, "down_proj")(IDS)
    for sizes in ((33,), (9, 24), (21, 2, 10), (20, 1, 1, 1, 10)):
        cache, place = new_cache(), 0
        for part in IDS.split(sizes, 1):
            close(read(fast, part, cache), wanted[:, place : place + part.shape[1]])
            place += part.shape[1]
    for row in range(2):
        close(read(fast, IDS[row : row + 1], new_cache()), wanted[row : row + 1])
    assert ec.routed_text(fast) == {"model.embed_tokens": (33, 1, 0)}


@pytest.mark.slow
def test_another_text(no_inductor: list[Any]) -> None:
    """A step that does not go on with the text is routed by itself, and told; a new text begins anew."""
    model, plan = model_of(), plan_of()
    fast, oracle = planned(model, plan), Masked(model, plan, "down_proj")
    wanted = oracle(IDS)
    read(fast, IDS[:, :20], cache := new_cache())
    # The cache of a text that was read elsewhere, longer than ours: its step sees no token of ours.
    read(model, IDS[:, :25], other := new_cache())
    got = read(fast, IDS[:, 25:26], other)
    alone = brute(IDS[:, 25:26], None, oracle.router, 2, WINDOW, 25).argmax(-1)
    oracle.routes = alone
    read(model, IDS[:, :25], plain := new_cache())
    close(got, read(oracle.model, IDS[:, 25:26], plain))
    assert ec.routed_text(fast) == {"model.embed_tokens": (26, 2, 1)}
    # And ours goes on without what it had read.
    read(fast, IDS[:, 20:21], cache)
    assert ec.routed_text(fast) == {"model.embed_tokens": (21, 2, 2)}
    close(read(fast, IDS, new_cache()), wanted)
    assert ec.routed_text(fast) == {"model.embed_tokens": (33, 2, 2)}
    ec.forget_routed_text(fast)
    assert ec.routed_text(fast) == {"model.embed_tokens": (0, 0, 0)}


@pytest.mark.exhaustive
def test_caches_of_fixed_size(no_inductor: list[Any]) -> None:
    """Where a call begins is a tensor there. A prompt with padding, in chunks; then steps. And our own cache."""
    from transformers import StaticCache

    model, plan = model_of(), plan_of()
    mask = torch.cat([PADDED, torch.ones(2, 3, dtype=torch.int64)], 1)
    ids = torch.cat([IDS, IDS[:, 4:7]], 1)
    wanted = Masked(model, plan, "down_proj")(ids, mask)
    for own in (False, True):
        fast = planned(model, plan)
        fixed = ec.Cache(fast, 256, key_bits=16, value_bits=16) if own else StaticCache(fast.config, max_cache_len=64)
        cache: Any = fixed
        for begin, end in ((0, 20), (20, 33), (33, 34), (34, 35), (35, 36)):
            position = (mask[:, :end].cumsum(1) - 1).clamp(min=0)[:, begin:]
            got = read(fast, ids[:, begin:end], cache, attention_mask=mask[:, :end], position_ids=position)
            close(got[:, -1], wanted[:, end - 1])
        assert forms(fast) == {"read_me 48 of 96 neurons, 2 experts"}
        assert ec.routed_text(fast) == {"model.embed_tokens": (36, 2, 0)}


@pytest.mark.slow
def test_graphs_of_any_size(no_inductor: list[Any]) -> None:
    model, plan = model_of(), plan_of()
    fast, oracle = planned(model, plan), Masked(model, plan, "down_proj")
    for rows, tokens in ((2, 33), (5, 12)):
        ids = IDS.repeat(3, 1)[:rows, :tokens].clone()
        torch._dynamo.mark_dynamic(ids, 0)
        torch._dynamo.mark_dynamic(ids, 1)
        close(read(fast, ids, new_cache()), oracle(ids))
    assert len(no_inductor) == 1
    assert forms(fast) == {"read_me 48 of 96 neurons, 2 experts"}
    read(fast, IDS[:1].expand(9, -1), new_cache())
    assert "batch-too-large" in forms(fast)


@pytest.mark.slow
def test_nothing_else_changes(no_inductor: list[Any], tmp_path: Path) -> None:
    """Looking reads no text; copies read their own; no tensor is added to a model; a plan is what its files are."""
    model, plan = model_of(), plan_of()
    plan.save(tmp_path)
    assert ec.Plan.load(tmp_path).text == plan.text
    fast = planned(model, tmp_path)  # type: ignore[arg-type]
    read(fast, IDS[:, :20], cache := new_cache())
    ec.inspect(fast, IDS[:, :5].flip(0))
    other = planned(fast, plan)
    assert ec.routed_text(other) == {}
    read(other, IDS.flip(1), new_cache())
    close(read(fast, IDS[:, 20:], cache), Masked(model, plan, "down_proj")(IDS)[:, 20:])
    assert list(fast.state_dict()) == list(model.state_dict())


@pytest.mark.exhaustive
def test_through_inductor() -> None:
    """Generated code keeps the router's state, in prompts of two lengths and in steps."""
    model, plan = model_of("llama"), plan_of("llama")
    fast, oracle = planned(model, plan), Masked(model, plan, "down_proj")
    for length in (33, 20):
        got = fast.generate(IDS[:, :length], **GREEDY)
        wanted = oracle(got.sequences)
        for step, ours in enumerate(got.logits):
            close(ours, wanted[:, length - 1 + step])
        assert ec.routed_text(fast) == {"model.embed_tokens": (length + 6, 2, 0)}
    assert forms(fast) == {"read_me 48 of 96 neurons, 2 experts"}
