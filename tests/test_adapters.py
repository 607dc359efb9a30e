"""LoRA beside linears: found by structure, kept as one product each, or folded into a prepared weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_low_rank import BATCHES, calibrated, codes, llama, logits, planned
from torch import Tensor, nn
from torch.nn import functional as F

import effcompile as ec


class Chain(nn.Module):
    """One layer, and something behind it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sigmoid()


class Lora(nn.Module):
    """The structure of a LoRA layer: a base linear, and for each active adapter two thin linears and a number."""

    def __init__(self, base: nn.Module, size: tuple[int, int], adapters: dict[str, tuple[int, float]], **more: Any):
        super().__init__()
        inputs, outputs = size
        self.base_layer, self.active = base, list(adapters)
        dtype, bias = more.get("dtype"), more.get("bias", False)
        made = {name: (nn.Linear(inputs, r, False), nn.Linear(r, outputs, bias)) for name, (r, _) in adapters.items()}
        self.lora_A = nn.ModuleDict({name: down.to(dtype) for name, (down, _) in made.items()})
        self.lora_B = nn.ModuleDict({name: up.to(dtype) for name, (_, up) in made.items()})
        self.scaling = {name: scale for name, (_, scale) in adapters.items()}
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        dtype = result.dtype
        for name in self.active:
            down, up = self.lora_A[name], self.lora_B[name]
            x = x.to(down.weight.dtype)
            result = result + up(down(self.dropout(x))) * self.scaling[name]
        return result.to(dtype)


def adapted(model: nn.Module, names: tuple[str, ...], adapters: dict[str, tuple[int, float]], **more: Any) -> nn.Module:
    """The model with adapters at the linears of these names."""
    found = [(path, m) for path, m in model.named_modules() if path.rpartition(".")[2] in names]
    for path, linear in found:
        parent, _, name = path.rpartition(".")
        flipped = hasattr(linear, "nf")
        outputs, inputs = reversed(linear.weight.shape) if flipped else linear.weight.shape
        setattr(model.get_submodule(parent), name, Lora(linear, (inputs, outputs), adapters, **more))
    return model.eval()


TWO = {"one": (4, 2.0), "two": (6, 0.5)}
QV = ("q_proj", "v_proj", "down_proj")


def merged(layer: Lora) -> Tensor:
    """Its weight with adapters, fp64."""
    weight = layer.base_layer.weight.double()
    for name in layer.active:
        weight = weight + layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double() * layer.scaling[name]
    return weight


def rewritten(model: nn.Module, action: str = "rewritten") -> dict[str, str]:
    report = ec.inspect(model)
    return {d.module: d.form for d in report.decisions if d.kind == "linear" and d.action == action}


def folding(model: nn.Module, **options: Any) -> nn.Module:
    told = copy.deepcopy(model)
    told.compile(backend="effcompile", options={"low_rank": {"adapters": "fold"}, **options})
    return told


@pytest.mark.parametrize("way", [pytest.param("keep", marks=pytest.mark.slow), "fold"])
def test_either_way_it_is_the_model(way: str, no_inductor: list[Any]) -> None:
    """Two active adapters on attention and feed-forward blocks; without a plan nothing else is rewritten."""
    model = adapted(llama(), QV, TWO)
    told = copy.deepcopy(model)
    told.compile(backend="effcompile", options={"low_rank": {"adapters": way}, "verify": True})
    torch.testing.assert_close(logits(told, BATCHES[0]), logits(model, BATCHES[0]), rtol=5e-5, atol=5e-5)
    done = rewritten(told)
    layers = [
        f"model.layers.{n}.{p}" for n in (0, 1) for p in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]
    found = codes(told)
    if way == "fold":
        assert done == {f"{layer}.base_layer": "low_rank dense with 2 folded" for layer in layers}
        halves = {f"{layer}.lora_{side}.{name}" for layer in layers for side in "AB" for name in TWO}
        assert {name for name, code in found.items() if code == "taken"} == halves
        # What is read is the weight alone: nothing of the adapters is left in the graph.
        graph = no_inductor[-1].graph
        count = sum("linear" in str(n.target) for n in graph.nodes if n.op == "call_function")
        assert count == 2 * 7 + 1
    else:
        ranks = {"one": 4, "two": 6}
        wanted = {f"{layer}.lora_A.{name}": f"low_rank adapter {ranks[name]}" for layer in layers for name in TWO}
        assert done == wanted
        assert found[f"{layers[0]}.base_layer"] == "no-plan"
        assert found[f"{layers[0]}.lora_B.one"] == "taken"


@torch.no_grad()
def test_folded_is_the_product(no_inductor: list[Any]) -> None:
    """Against fp64, with biases on both sides, other numbers in front and behind, and a base of inputs to a row."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.down, self.up = nn.Linear(33, 47, bias=False), nn.Linear(33, 5), nn.Linear(5, 47)

        def forward(self, x: Tensor) -> Tensor:
            return (3 * self.up(self.down(x)) / 4 + self.base(x)).sigmoid()

    model, x = Odd().eval(), torch.randn(2, 3, 33)
    told = folding(model)
    got, wide = told(x), copy.deepcopy(model).double()
    torch.testing.assert_close(got.double(), wide(x.double()), rtol=0, atol=2e-6)
    assert rewritten(told) == {"base": "low_rank dense with 1 folded"}

    class Bare(nn.Module):
        """Of parameters, with inputs to a row."""

        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(33, 47)
            self.A, self.B = nn.Parameter(torch.randn(33, 3)), nn.Parameter(torch.randn(3, 47))

        def forward(self, x: Tensor) -> Tensor:
            return (self.base(x) + (x @ self.A @ self.B) * 0.5).sigmoid()

    model = Bare().eval()
    told = ec.low_rank(adapters="fold")(copy.deepcopy(model))
    told.compile(backend="effcompile")
    got, wide = told(x), copy.deepcopy(model).double()
    torch.testing.assert_close(got.double(), wide(x.double()), rtol=0, atol=2e-6)
    assert rewritten(told) == {"base": "low_rank dense with 1 folded"}

    torch.manual_seed(1)
    from transformers.pytorch_utils import Conv1D

    layer = adapted(Chain(Conv1D(24, 16)), ("layer",), {"one": (2, 2.0), "two": (4, 0.5)}, bias=True)
    told, x = folding(layer), torch.randn(2, 5, 16)
    torch.testing.assert_close(told(x), layer(x), rtol=1e-5, atol=1e-5)
    assert rewritten(told) == {"layer.base_layer": "low_rank dense with 2 folded"}


@torch.no_grad()
def test_bf16_with_adapters_in_fp32(no_inductor: list[Any]) -> None:
    """As they are trained: the sum is in fp32, and is rounded once. Folded, the weight is."""
    base = nn.Linear(64, 48).bfloat16()
    model = adapted(Chain(base), ("layer",), TWO, dtype=torch.float32)
    x = torch.randn(7, 64).bfloat16()
    told = folding(model)
    got = told(x)
    assert got.dtype == torch.bfloat16
    assert rewritten(told) == {"layer.base_layer": "low_rank dense with 2 folded"}
    exact = F.linear(x.double(), merged(model.layer).bfloat16().double(), base.bias.double()).sigmoid()
    torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=1e-5)
    kept = copy.deepcopy(model)
    kept.compile(backend="effcompile", options={"low_rank": True})
    torch.testing.assert_close(kept(x), model(x), rtol=2**-7, atol=1e-5)
    # The chain is in fp32 from one end to the other.
    assert codes(kept)["layer.lora_A.one"] == "rewritten"
    assert codes(kept)["layer.base_layer"] == "no-plan"


@pytest.mark.slow
def test_factors_are_of_the_folded_weight(no_inductor: list[Any], tmp_path: Any) -> None:
    model = adapted(llama(), QV, TWO)
    options: dict[str, Any] = {"rank": 20, "round_to": 1, "bias": False, "adapters": "fold"}
    plan = calibrated(model, **options)
    plan.save(tmp_path)
    told = planned(model, tmp_path)
    same = copy.deepcopy(model)
    for record in plan:
        weight = record.tensors["up"] @ record.tensors["down"]
        path = record.module.removesuffix(".base_layer")
        layer = same.get_submodule(path)
        if isinstance(layer, Lora):
            layer.active = []
            layer.base_layer.weight = nn.Parameter(weight)
        else:
            layer.weight = nn.Parameter(weight)
    torch.testing.assert_close(logits(told, BATCHES[0]), logits(same, BATCHES[0]), rtol=5e-5, atol=5e-5)
    place = "model.layers.0.self_attn.q_proj"
    assert rewritten(told)[f"{place}.base_layer"] == "low_rank whitened 20 of 64 with 2 folded"
    layer: Any = model.get_submodule(place)
    found = plan.get(f"{place}.base_layer", "low_rank")
    assert found is not None
    product = (found.tensors["up"] @ found.tensors["down"]).double()
    # Of this rank nothing of the base alone is as near to what the layer multiplies with.
    assert (merged(layer) - product).norm() < (layer.base_layer.weight.double() - product).norm()


@pytest.mark.parametrize("what", ["weights", "scaling", "off"])
def test_a_plan_is_of_these_adapters(what: str, no_inductor: list[Any]) -> None:
    model, x = adapted(Chain(nn.Linear(24, 16)), ("layer",), {"one": (2, 2.0)}), torch.randn(50, 24)
    plan = calibrated(model, [x], rank=6, adapters="fold")
    layer: Any = model.layer
    with torch.no_grad():
        if what == "weights":
            layer.lora_B["one"].weight[3, 1] += 1
        elif what == "scaling":
            layer.scaling["one"] = 1.5
        else:
            layer.active = []
    with pytest.raises(Exception, match=r"layer\.base_layer: (the adapter|it was made with)"), torch.no_grad():
        planned(model, plan)(x)


def test_compiled_code_refuses_another_adapter(no_inductor: list[Any]) -> None:
    told, x = folding(adapted(Chain(nn.Linear(24, 16)), ("layer",), {"one": (2, 2.0)})), torch.randn(5, 24)
    with torch.no_grad():
        told(x)
        told.layer.lora_A["one"].weight.mul_(2)
        with pytest.raises(ec.PlanError, match=r"layer\.base_layer: its weights are not those"):
            told(x)


@pytest.mark.slow
def test_kept_beside_factors_and_outside_the_budget(no_inductor: list[Any]) -> None:
    """What is factored is the base alone. The adapters' own tensors are read: a change of them is seen."""
    model = adapted(llama(), QV, TWO)
    plan = calibrated(model, ratio=0.5, bias=False)
    bare = calibrated(llama(), ratio=0.5, bias=False)
    kept = [r for r in plan if not r.parameters]
    assert len(kept) == 2 * 3 * 2
    assert {r.numbers["adapter"] for r in kept} == {4.0, 6.0}
    spent = [sum(r.numbers["factors"] for r in some if r.parameters) for some in (plan, bare)]
    assert spent[0] == spent[1]
    told = planned(model, plan)
    same = copy.deepcopy(model)
    for record in plan:
        if "up" in record.tensors:
            same.get_submodule(record.module).weight = nn.Parameter(record.tensors["up"] @ record.tensors["down"])
    torch.testing.assert_close(logits(told, BATCHES[0]), logits(same, BATCHES[0]), rtol=5e-5, atol=5e-5)
    assert rewritten(told)["model.layers.1.mlp.down_proj.lora_A.two"] == "low_rank adapter 6"
    with torch.no_grad():
        for one in (same, told):
            one.get_submodule("model.layers.0.self_attn.q_proj").lora_B["one"].weight.mul_(-3)
    torch.testing.assert_close(logits(told, BATCHES[0]), logits(same, BATCHES[0]), rtol=5e-5, atol=5e-5)


@pytest.mark.slow
def test_sensitivity_is_that_of_the_folded(no_inductor: list[Any]) -> None:
    """The divergence is measured with what is folded in the place of the sum, and not of the base beneath adapters."""
    model = adapted(llama(), ("q_proj",), {"one": (12, 6.0)})
    plan = calibrated(model, ratio=0.6, planner="sensitivity", adapters="fold")
    folded = llama()
    with torch.no_grad():
        for path, layer in model.named_modules():
            if isinstance(layer, Lora):
                folded.get_submodule(path).weight.copy_(merged(layer))
    other = calibrated(folded, ratio=0.6, planner="sensitivity")
    for one, two in zip(plan, other, strict=True):
        assert one.numbers.keys() == two.numbers.keys()
        assert one.numbers.get("kl", 0.0) == pytest.approx(two.numbers.get("kl", 0.0), rel=1e-2)


class Near(nn.Module):
    """What looks like an adapter, and is none."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.base, self.down, self.up = nn.Linear(32, 32), nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        how, y, more = self.how, self.base(x), self.up(self.down(x))
        if how == "activation":
            return (y + self.up(self.down(x).relu())).tanh()
        if how == "another input":
            return (y + self.up(self.down(x.relu()))).tanh()
        if how == "a vector":
            return (y + more * self.scale).tanh()
        if how == "broadcast":
            return (y + more[:1].expand(1, -1)).tanh()
        if how == "read twice":
            return y.tanh() + (y + more)
        if how == "training":
            return (y + self.up(self.down(F.dropout(x, 0.5, True)))).tanh()
        raise AssertionError(how)


@pytest.mark.parametrize("how", ["activation", "another input", "a vector", "broadcast", "read twice", "training"])
def test_what_is_no_adapter(how: str, no_inductor: list[Any]) -> None:
    model = Near(how)
    told = folding(model)
    x = torch.randn(6, 32)
    with torch.no_grad():
        torch.manual_seed(5)
        wanted = model(x)
        torch.manual_seed(5)
        torch.testing.assert_close(told(x), wanted)
    assert not rewritten(told)


@pytest.mark.parametrize("way", ["keep", "fold"])
@torch.no_grad()
def test_a_factor_that_is_a_symbol_is_not_folded(way: str, no_inductor: list[Any]) -> None:
    """A scaling that is changed after compiling: kept chains do not read it, and folding says why it does not."""
    model, x = adapted(Chain(nn.Linear(24, 16)), ("layer",), {"one": (2, 2.0)}), torch.randn(5, 24)
    told = copy.deepcopy(model)
    told.compile(backend="effcompile", options={"low_rank": {"adapters": way}})
    told(x)
    assert len(rewritten(told)) == 1
    for one in (told, model):
        one.layer.scaling["one"] = 3.0
    torch.testing.assert_close(told(x), model(x), rtol=1e-5, atol=1e-5)
    first, last = (
        d for d in ec.inspect(told).decisions if d.module == f"layer.{'lora_A.one' if way == 'keep' else 'base_layer'}"
    )
    assert first.action == "rewritten"
    if way == "keep":
        assert last.action == "rewritten"
    else:
        assert last.reason.code == "computed-weight"
        assert "is a symbol" in last.reason.text


def test_adapters_that_are_trained_stay(no_inductor: list[Any]) -> None:
    """Also where only what comes before them is trained."""
    model = adapted(Chain(nn.Linear(24, 16)), ("layer",), {"one": (2, 2.0)})
    for way in ("keep", "fold"):
        for trained in (True, False):
            torch._dynamo.reset()
            told = copy.deepcopy(model).requires_grad_(trained)
            told.compile(backend="effcompile", options={"low_rank": {"adapters": way}})
            x = torch.randn(5, 24, requires_grad=True)
            told(x).sum().backward()
            assert x.grad is not None
            assert codes(told)["layer." + ("lora_A.one" if way == "keep" else "base_layer")] == "gradients"


@pytest.mark.slow
def test_a_head_with_adapters_is_a_head(no_inductor: list[Any]) -> None:
    model = adapted(llama(), ("lm_head",), {"one": (4, 2.0)})
    told = folding(model)
    logits(told, BATCHES[0])
    assert codes(told)["lm_head.base_layer"] == "head"


@pytest.mark.exhaustive
def test_steps_with_adapters() -> None:
    """Compiled by Inductor, prompt and steps, with adapters kept beside their linears: the same tokens."""
    model, ids = adapted(llama(), QV, TWO), BATCHES[0][:, :9]
    told = copy.deepcopy(model)
    told.compile(backend="effcompile", options={"low_rank": {"adapters": "keep"}})
    with torch.no_grad():
        wanted = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(told.generate(ids, max_new_tokens=4, do_sample=False), wanted)
    assert len(rewritten(told)) == 12


@pytest.mark.slow
@pytest.mark.parametrize("way", ["keep", "fold"])
def test_peft(way: str, no_inductor: list[Any]) -> None:
    """The library's own layers, two adapters of which one or both are active."""
    peft = pytest.importorskip("peft")
    config = {"target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, lora_alpha=8, **config), adapter_name="one").eval()
    model.add_adapter("two", peft.LoraConfig(r=6, lora_alpha=3, **config))
    for active in (["one"], ["two"], ["one", "two"]):
        model.base_model.set_adapter(active)
        model.eval()
        torch._dynamo.reset()
        told = copy.deepcopy(model)
        told.compile(backend="effcompile", options={"low_rank": {"adapters": way}})
        torch.testing.assert_close(logits(told, BATCHES[0]), logits(model, BATCHES[0]), rtol=5e-5, atol=5e-5)
        assert len(rewritten(told)) == 6 * (len(active) if way == "keep" else 1)
