"""Linears in few bits that read one tensor are one call: which are, what they give, and where their weights lie."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_flap_heads import keeping
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import effcompile as ec
from effcompile.kernels import weight_ops
from effcompile.kernels.weight_ops import QUANTIZED_LINEAR
from effcompile.passes import backend
from effcompile.passes.join import NEAR, join_linears
from effcompile.passes.weights import constant, made_of
from models import MODELS

IDS = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(1))
FOUR: dict[str, Any] = {"bits": 4, "group": 32}


def calls(gm: fx.GraphModule) -> list[int]:
    """The outputs of each call in a graph."""
    return [node.args[5] for node in gm.graph.find_nodes(op="call_function", target=QUANTIZED_LINEAR)]


def both(
    model: nn.Module, inputs: list[Any], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[list[Any], list[Any]]:
    """What a model gives with linears joined, and apart."""
    found: list[list[Any]] = []
    for join in (join_linears, lambda _: 0):
        torch._dynamo.reset()
        monkeypatch.setattr(backend, "join_linears", join)
        told = copy.deepcopy(model)
        told.compile(backend="effcompile", options=options or {"quantize_weights": FOUR})
        with torch.no_grad():
            out = [told(x) for x in inputs]
        found.append([getattr(one, "logits", one) for one in out])
    return found[0], found[1]


STEP, FEW, MANY = IDS[:1, :1], IDS[:, :8], IDS


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("qwen2", [STEP]),  # with biases
        *(pytest.param(name, [STEP, FEW, MANY], marks=pytest.mark.slow) for name in ("qwen2", "phi3")),
        pytest.param("llama", [STEP, FEW, MANY], marks=pytest.mark.exhaustive),
    ],
)
def test_models(
    name: str, inputs: list[Tensor], no_inductor: list[Any], no_fallback: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and values are one call, and gate and up; up to 16 rows every number is the same."""
    model = MODELS[name]("sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases, which are zeros in a new model, and norms
                parameter.normal_(1)
    joined, apart = both(model, inputs, monkeypatch)
    assert calls(no_inductor[0]) == [256, 128, 192, 128] * 2
    # In the one, both groups are a linear each as it is.
    assert len(calls(no_inductor[-1])) == (8 if name == "phi3" else 14)
    for one, other in zip(joined[:2], apart, strict=False):
        assert torch.equal(one, other)
    # With more rows the library multiplies, which may add up in another order.
    torch.testing.assert_close(joined[-1], apart[-1], rtol=1e-5, atol=1e-5)


class Fan(nn.Module):
    """Linears on one tensor, and what becomes of their results."""

    def __init__(self, *widths: int, bias: str = "", body: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleList(
            nn.Linear(37, w, bias=bias == "all" or n == bias) for n, w in zip("abcd", widths, strict=False)
        )
        self.body = body

    def forward(self, x: Tensor) -> Any:
        x = x * 2
        if self.body is not None:
            return self.body(x, *self.linears)
        # Averaged, for what leaves a graph is taken for a head.
        return torch.cat([linear(x).tanh() for linear in self.linears], -1).sort(-1).values


X = torch.randn(3, 5, 37, generator=torch.Generator().manual_seed(1))


def flattened(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return a(x).view(3, -1).tanh()[:, :80] * b(x).view(-1).tanh()[:80]


def written(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    first = a(x).relu_()
    second = b(x)
    second += 1
    return torch.cat([first, second], -1).sin()


def written_between(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    first = a(x)
    x.view(-1).add_(1)  # by another name, so that the node stays the same
    return torch.cat([first, b(x)], -1).sin()


def by_strides(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return torch.as_strided(a(x), (15, 16), (16, 1)).sin() + torch.as_strided(b(x), (15, 16), (16, 1), 3).sin()


def read_later(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
    return torch.cat([a(x), b(c(x).sin()[..., :1] + x)], -1).sin()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        # Whole blocks of 16 outputs.
        (Fan(21, 5, 48), [32 + 16 + 48]),
        (Fan(21, 5, 48, bias="all"), [32 + 16 + 48]),
        (Fan(21, 5, 48, bias="b"), [32 + 48, 5]),
        (Fan(16, 16, body=flattened), [32]),
        (Fan(21, 16, body=written), [48]),
        (Fan(21, 16, body=written_between), [21, 16]),
        (Fan(16, 20, body=by_strides), [48]),
        (Fan(21, 16, 7, bias="all", body=read_later), [32 + 16, 16]),
    ],
    ids=lambda it: None if isinstance(it, list) else getattr(it.body, "__name__", "widths"),
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_graphs(
    model: Fan,
    expected: list[int],
    symmetric: bool,
    no_inductor: list[Any],
    no_fallback: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = FOUR | {"symmetric": symmetric}
    joined, apart = both(
        model, [X[:, :5], X.repeat(1, 4, 1)[:, :17]][: 1 + (model.body is None)], monkeypatch, quantize_weights=few
    )
    assert sorted(calls(no_inductor[0])) == sorted(expected)
    assert torch.equal(joined[0], apart[0])
    assert joined[0].stride() == apart[0].stride()
    for one, other in zip(joined, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", [{"bits": 8}, {"group": 8}, {"symmetric": True}, False])
def test_only_equal_ones(other: Any, no_inductor: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three is kept in another way, or not at all; the others are one call around it."""
    rules = {"linears.1": {"quantize_weights": other if other is False else FOUR | other}}
    joined, apart = both(Fan(16, 32, 48), [X], monkeypatch, quantize_weights=FOUR, rules=rules)
    assert sorted(calls(no_inductor[0])) == ([64] if other is False else [32, 64])
    assert torch.equal(joined[0], apart[0])


class Made:
    """A graph by hand: calls on ``x`` and ``y``, in the order of a text."""

    def __init__(self, order: str, read: str | None = None) -> None:
        mode, self.gm = FakeTensorMode(), fx.GraphModule({}, fx.Graph())
        graph = self.gm.graph
        self.inputs = {name: graph.placeholder(name) for name in "xy"}
        for node in self.inputs.values():
            node.meta["val"] = mode.from_tensor(torch.empty(2, 32))
        nodes = []
        for name in order:
            packed = weight_ops.pack(*weight_ops.round_to_nearest(torch.randn(16, 32), 4, 32, False), 4)
            sides = []
            for t in packed:
                sides.append(constant(graph, nn.Parameter(t, requires_grad=False), self.inputs["x"]))
            nodes.append(graph.call_function(QUANTIZED_LINEAR, (self.inputs[name], *sides, None, 16, 4, 32)))
            nodes[-1].meta["val"] = mode.from_tensor(torch.empty(2, 16))
        live = [node for n, node in enumerate(nodes) if read is None or read[n] == "1"]
        graph.output(tuple(live))
        self.gm.recompile()


def test_what_nobody_reads_stays_out() -> None:
    """As the projection to keys where a cache stands for them: Inductor drops it, and its weight is not read."""
    made = Made("xxx", read="101")
    x, y = torch.randn(2, 32), torch.randn(2, 32)
    before = made.gm(x, y)
    assert join_linears(made.gm) == 2
    assert sorted(calls(made.gm)) == [16, 32]
    (common,) = [n for n in made.gm.graph.find_nodes(op="call_function", target=QUANTIZED_LINEAR) if n.args[5] == 32]
    assert len(common.users) == 2
    assert all(torch.equal(one, other) for one, other in zip(made.gm(x, y), before, strict=True))


def test_only_neighbours() -> None:
    """Those that read one tensor in each layer, as an encoder's output, do not wait for each other."""
    for others, expected in ((NEAR - 1, 2), (NEAR, 0)):
        made = Made("x" + "y" * others + "x")
        for n, node in enumerate(made.gm.graph.find_nodes(op="call_function", target=QUANTIZED_LINEAR)[1:-1]):
            # Each on a tensor of its own.
            with made.gm.graph.inserting_before(node):
                own = made.gm.graph.call_function(torch.ops.aten.add.Tensor, (made.inputs["y"], n))
            own.meta.update(made.inputs["y"].meta)
            node.update_arg(0, own)
        made.gm.recompile()
        x, y = torch.randn(2, 32), torch.randn(2, 32)
        before = made.gm(x, y)
        assert join_linears(made.gm) == expected
        assert all(torch.equal(one, other) for one, other in zip(made.gm(x, y), before, strict=True))


def storages(tensors: Any) -> dict[int, int]:
    """Bytes by the memory that tensors lie in."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def packed_bytes(model: nn.Module) -> int:
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)]
    return sum(-(-n // 16) * 16 * -(-k // 32) * (16 + 4) for n, k in shapes)


def test_weights_lie_in_one_memory(no_inductor: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all graphs, joined or not, and of what is kept for graphs to come."""
    model = Fan(21, 5, 48)
    for join in (lambda _: 0, join_linears, join_linears):
        monkeypatch.setattr(backend, "join_linears", join)
        torch._dynamo.reset()
        model.compile(backend="effcompile", options={"quantize_weights": FOUR})
        with torch.no_grad():
            model(X)
    held = [list(gm.parameters()) for gm in no_inductor]
    assert [len(own) for own in held] == [9, 3, 3]
    assert all(one is other for one, other in zip(held[1], held[2], strict=True))
    parts = [t for linear in model.linears for t in made_of(linear.weight)]
    assert len(parts) == 9
    every = storages([*(t for own in held for t in own), *parts])
    assert len(every) == 3
    assert sum(every.values()) == packed_bytes(model)
    # The first graph reads its weights where they are now.
    with torch.no_grad():
        for own, other in zip(held[0][::3], (21, 5, 48), strict=True):
            assert len(own) == -(-other // 16)
    del parts, held
    no_inductor[:2] = []
    assert sum(len(made_of(linear.weight)) for linear in model.linears) == 9


def one_or_both(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return torch.cat([a(x), b(x)], -1).sin() if len(x) > 1 else a(x).sin()


def test_what_compiled_code_reads_stays_where_it_is(no_inductor: list[Any]) -> None:
    """A thread may be running it while another graph is made."""
    model = Fan(21, 5, body=one_or_both)
    model.compile(backend="effcompile", options={"quantize_weights": FOUR}, dynamic=False)
    with torch.no_grad():
        first = model(X[:1])
        where = [p.data_ptr() for p in no_inductor[0].parameters()]
        model(X)
        assert [calls(gm) for gm in no_inductor] == [[21], [21, 5]]
        assert [p.data_ptr() for p in no_inductor[0].parameters()] == where
        assert torch.equal(model(X[:1]), first)


class Own(nn.Module):
    """Two calls of the operator that are the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(37, 64)
        for name in "ab":
            packed = weight_ops.pack(*weight_ops.round_to_nearest(torch.randn(16, 64), 4, 32, False), 4)
            for part, t in packed._asdict().items():
                self.register_buffer(f"{name}_{part}", t)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).tanh()
        sides = [[getattr(self, f"{name}_{part}") for part in weight_ops.Packed._fields] for name in "ab"]
        return torch.cat([QUANTIZED_LINEAR(x, *own, None, 16, 4, 32) for own in sides], -1).sin()


def test_a_models_own_calls_are_left_alone(no_inductor: list[Any]) -> None:
    model = Own()
    own = {name: t.data_ptr() for name, t in model.named_buffers()}
    expected = model(X).detach()
    model.compile(backend="effcompile", options={"quantize_weights": {"bits": 8, "group": 32}})
    with torch.no_grad():
        got = model(X)
    assert calls(no_inductor[0]) == [64, 16, 16]
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)  # of 8 bits
    assert {name: t.data_ptr() for name, t in model.named_buffers()} == own


def test_biases_that_another_method_has_made(no_inductor: list[Any]) -> None:
    """They stand in the graph right before the linear that they are for."""
    model = MODELS["qwen2"]("sdpa")
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.normal_(1)
    plan = keeping(ec.calibrate(model, [IDS], [ec.flap(0.45, heads=True)], progress=False), [0, 1], [2, 3])
    with torch.no_grad():
        told = copy.deepcopy(model)
        told.compile(backend="effcompile", options={"plan": plan})
        expected = told(IDS, use_cache=False).logits
        model.compile(backend="effcompile", options={"plan": plan, "quantize_weights": {"bits": 8, "group": 8}})
        got = model(IDS, use_cache=False).logits
    assert len(calls(no_inductor[1])) < 14
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_graphs_of_prompt_and_step_share(no_inductor: list[Any]) -> None:
    model = MODELS["llama"]("sdpa")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.compile(backend="effcompile", options={"quantize_weights": FOUR | {"head": True}}, dynamic=False)
    with torch.no_grad():
        model(IDS)
        model(IDS[:, :1])
    prompt, step = ([p for p in gm.parameters() if p.dtype in (torch.uint8, torch.float16)] for gm in no_inductor)
    assert len(prompt) == 3 * 9
    assert all(one is other for one, other in zip(prompt, step, strict=True))
    assert sum(storages(prompt).values()) == packed_bytes(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    rows = [d for d in ec.inspect(model).decisions if d.kind == "linear" and d.graph == 1]
    assert len(rows) == 15
    assert {(d.action, d.form) for d in rows} == {("rewritten", "w4g32 rtn")}
    (keys,) = [d for d in rows if d.module == "model.layers.0.self_attn.k_proj"]
    assert keys.bytes_after == 64 * 4 * (16 + 4) + (128 + 64) * 2 * 4


@pytest.mark.parametrize("place", [0, 1])
def test_each_original_is_watched(place: int, no_inductor: list[Any]) -> None:
    model = Fan(21, 5)
    model.compile(backend="effcompile", options={"quantize_weights": FOUR})
    with torch.no_grad():
        model(X)
        assert calls(no_inductor[0]) == [48]
        model.linears[place].weight.mul_(2)
        with pytest.raises(Exception, match=rf"linears\.{place}: its weights are not those that were prepared"):
            model(X)


def two_inputs(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
    y = x.sin()
    return torch.cat([a(x), b(x), a(y), c(y), a(x)], -1).sin()


def test_a_weight_of_two_groups(no_inductor: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies beside those of the first, once; with the others it stays a call of its own."""
    joined, apart = both(Fan(16, 32, 48, body=two_inputs), [X], monkeypatch)
    assert calls(no_inductor[0]) == [48, 16, 48, 16]
    assert torch.equal(joined[0], apart[0])
    assert len(storages(no_inductor[0].parameters())) == 6


def test_inference_mode(no_inductor: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Fan(21, 5)
    model.compile(backend="effcompile", options={"quantize_weights": FOUR}, dynamic=False)
    found = []
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            found += [model(X).clone(), model(X[:1]).clone()]
            torch._dynamo.reset()
    assert {tuple(calls(gm)) for gm in no_inductor} == {(48,)}
    assert len(no_inductor) == 6
    assert all(torch.equal(one, other) for one, other in zip(found, found[2:], strict=False))
    assert len(storages(t for gm in no_inductor for t in gm.parameters())) == 3


def test_learned_codes_are_the_plans_own_memory(
    tmp_path: Any, no_inductor: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which moves with them: what is in the plan, and what it is saved as, stays the same."""
    model = MODELS["llama"]("sdpa")
    plan = ec.calibrate(model, [IDS], [ec.quantize_weights(method="cbq", iterations=1, **FOUR)], progress=False)
    text = plan.text
    joined, apart = both(model, [IDS[:1, :1]], monkeypatch, plan=plan)
    assert calls(no_inductor[0]) == [256, 128, 192, 128] * 2
    assert torch.equal(joined[0], apart[0])
    own = [t for record in plan for t in record.tensors.values() if t.ndim > 2]
    held = [t for t in no_inductor[0].parameters() if t.dtype in (torch.uint8, torch.float16)]
    assert len(storages(held)) == 3 * 8
    assert storages(own) == storages(held)
    plan.save(tmp_path)
    assert plan.text == text == ec.Plan.load(tmp_path).text


def test_discarded_parameters(no_inductor: list[Any]) -> None:
    """Their packed weights are all there is of them, and later graphs find them together."""
    model = Fan(64, 48, body=lambda x, a, b: torch.cat([a(x), b(x)], -1).sin())
    model.compile(backend="effcompile", options={"quantize_weights": FOUR}, dynamic=False)
    with torch.no_grad():
        before = model(X)
        assert len(ec.discard_parameters(model).names) == 2
        torch._dynamo.reset()
        no_inductor.clear()
        assert torch.equal(model(X), before)
        model(X[:1])
    assert [calls(gm) for gm in no_inductor] == [[112], [112]]
    assert len(storages(t for gm in no_inductor for t in gm.parameters())) == 3


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=pytest.mark.exhaustive),
        pytest.param(torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_through_inductor(dtype: torch.dtype, no_fallback: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt and steps of a compressed cache: the same tokens, whichever way linears are called."""
    found, joined = [], []
    for join in (join_linears, lambda _: 0):
        torch._dynamo.reset()
        monkeypatch.setattr(backend, "join_linears", lambda gm, join=join: joined.append(join(gm)))
        model = MODELS["llama"]("sdpa").to(dtype)
        ec.compress_kv(key_bits=8, value_bits=8, group_size=32)(model)
        ec.quantize_weights(**FOUR)(model)
        model.compile(backend="effcompile", options={"inductor": {"comment_origin": join is join_linears}})
        out = model.generate(
            IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )
        found.append((out.sequences, torch.stack(out.logits)))
    assert joined == [10, 10, 0, 0]
    assert torch.equal(found[0][0], found[1][0])
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(
        found[0][1], found[1][1], rtol=16 * unit, atol=16 * unit * float(found[1][1].abs().max())
    )
