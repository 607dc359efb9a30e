"""Weights in few bits on whole models: what is taken and what is left, limits, other methods beside, changes later."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import mixtures
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from transformers import LlamaConfig, LlamaForCausalLM

import effcompile as ec
from effcompile.kernels import weight_ops
from effcompile.kernels.reason import Reason
from effcompile.passes.quantize_weights import QuantizeWeights
from effcompile.patterns.linear import LinearSite, find_linears
from models import GQA, MODELS, NanoGPT

IDS = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(1))
SMALL: dict[str, Any] = {"bits": 4, "group": 32}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 96, bias=False), nn.Linear(96, 128)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class Tiny(nn.Module):
    """What compiles in no time: an embedding, two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(128, 128), nn.ModuleList(Layer() for _ in range(2))
        self.lm_head = nn.Linear(128, 128, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def compiled(model: nn.Module, verify: bool = False, **options: Any) -> nn.Module:
    told = copy.deepcopy(model)
    told.compile(backend="effcompile", options={"quantize_weights": options, "verify": verify})
    return told


def rows_of(model: nn.Module, kind: str = "linear") -> list[Any]:
    return [d for d in ec.inspect(model).decisions if d.kind == kind]


def codes(model: nn.Module) -> dict[str, str]:
    """Of each module that was left, the code of the reason."""
    return {d.module: d.reason.code for d in rows_of(model) if d.reason}


def rounded(model: nn.Module, head: bool = False, bits: int = 4, group: int = 32, symmetric: bool = False) -> nn.Module:
    """The model with every linear's weight replaced by what the operator multiplies by."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in twin.named_modules():
            flipped = type(module).__name__ == "Conv1D"
            if (isinstance(module, nn.Linear) or flipped) and (head or name != "lm_head"):
                rows = module.weight.t() if flipped else module.weight
                packed = weight_ops.pack(*weight_ops.round_to_nearest(rows, bits, group, symmetric), bits)
                made = weight_ops.dequantize(packed, *rows.shape, bits).to(rows.dtype)
                module.weight = nn.Parameter(made.t() if flipped else made)
    return twin


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        out = model(ids)
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found


@pytest.mark.parametrize(
    "name", ["phi3", "gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "qwen2", "neox", "opt"))]
)
def test_every_linear_but_the_head(name: str, no_inductor: list[Any], no_fallback: None) -> None:
    """In fused projections, with biases, flipped as in GPT-2; the result is that of the rounded weights."""
    model = MODELS[name]("sdpa")
    told = compiled(model, bits=3, group=48)
    torch.testing.assert_close(logits(told), logits(rounded(model, bits=3, group=48)), rtol=1e-4, atol=1e-4)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    assert {d.module for d in rows_of(told) if d.action == "rewritten"} == set(linears) - {"lm_head"}
    assert codes(told) == {"lm_head": "head"}


def test_bf16_loses_no_more_than_dense_products_do(no_inductor: list[Any], no_fallback: None) -> None:
    model = Tiny().bfloat16()
    plain = rounded(model)
    exact = logits(copy.deepcopy(plain).float())
    error, lost = (logits(m).float() - exact for m in (compiled(model, **SMALL), plain))
    unit = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert error.abs().max() <= 2 * lost.abs().max() + unit


@pytest.mark.slow
def test_through_inductor_prompt_and_steps(no_fallback: None) -> None:
    """Beside a compressed cache; one set of packed weights serves both graphs."""
    model = MODELS["llama"]("sdpa")
    ours, plain = copy.deepcopy(model), rounded(model)
    for one in (ours, plain):
        ec.compress_kv(key_bits=8, value_bits=8, group_size=32)(one)
        one.compile(backend="effcompile")
    ec.quantize_weights(**SMALL)(ours)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = ours.generate(IDS, **greedy)
    graphs = ec.inspect(ours).graphs
    assert torch.equal(found, plain.generate(IDS, **greedy))
    assert [graph.label for graph in graphs] == ["prefill", "decode"]
    for graph in graphs:
        assert sum(d.kind == "linear" and d.action == "rewritten" for d in graph.decisions) == 14
    assert "attention" in {d.kind for d in graphs[1].decisions if d.action == "rewritten"}
    assert "quantized_linear_f32" in {kernel.name for kernel in ec.inspect(ours).kernels}


def test_sixteen_bits_leave_everything(no_inductor: list[Any]) -> None:
    model = Tiny()
    told = compiled(model, bits=16)
    assert torch.equal(logits(told), logits(model))
    assert set(codes(told).values()) == {"nothing-to-do"}


def test_the_report_has_bytes_before_and_after(no_inductor: list[Any]) -> None:
    told = compiled(Tiny(), **SMALL)
    logits(told, IDS[:1, :1])
    (row,) = [d for d in rows_of(told) if d.module.endswith("0.down")]
    assert row.form == "w4g32 rtn"
    ends = (96 + 128) * 4
    assert row.bytes_before == 128 * 96 * 4 + ends
    assert row.bytes_after == 128 * 96 // 2 + 128 * 3 * 4 + ends
    assert row.kernels == ("quantized_linear_f32",)


def test_verify_sees_what_rounding_does(no_inductor: list[Any]) -> None:
    found = {}
    for bits in (8, 3):
        told = compiled(Tiny(), verify=True, bits=bits)
        logits(told)
        found[bits] = max(d.error for d in rows_of(told) if d.action == "rewritten")
    assert 0 < found[8] < 0.02 < found[3]


@pytest.mark.parametrize("head", [False, True])
def test_a_tied_head(head: bool, no_inductor: list[Any]) -> None:
    """The embedding keeps the tensor; the head has a packed copy if that is asked for."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**GQA, tie_word_embeddings=True)).eval()
    told = compiled(model, head=head, **SMALL)
    before = model.state_dict()
    torch.testing.assert_close(logits(told), logits(rounded(model, head)), rtol=1e-4, atol=1e-4)
    assert told.lm_head.weight is told.model.embed_tokens.weight
    assert all(torch.equal(t, before[name]) for name, t in told.state_dict().items())
    assert codes(told) == ({} if head else {"lm_head": "head"})


def test_the_head_is_known_behind_a_loss_and_in_hand_written_models(no_inductor: list[Any]) -> None:
    model = MODELS["llama"]("sdpa")
    told = compiled(model, **SMALL)
    with torch.no_grad():
        loss = told(IDS, labels=IDS).loss
        torch.testing.assert_close(loss, rounded(model)(IDS, labels=IDS).loss, rtol=1e-4, atol=1e-4)
    assert codes(told) == {"lm_head": "head"}
    told = compiled(nano := NanoGPT(), **SMALL)
    logits(told)
    assert set(codes(told).values()) == {"head"}
    assert sum(d.action == "rewritten" for d in rows_of(told)) == 4
    assert not torch.equal(logits(told), logits(nano))


class Shared(nn.Module):
    """Two linears on one tensor, and widths that neither groups nor blocks divide."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(37, 37), nn.Linear(37, 37)
        self.b.weight = self.a.weight
        self.out = nn.Linear(37, 37)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(F.relu(self.a(x)))) + x


def test_one_tensor_in_two_linears_is_packed_once(no_inductor: list[Any], no_fallback: None) -> None:
    model, x = Shared(), torch.randn(3, 5, 37)
    told = compiled(model, **SMALL)
    torch.testing.assert_close(logits(told, x), logits(rounded(model), x), rtol=1e-4, atol=1e-5)
    assert len({id(p) for p in no_inductor[0].parameters()}) == 2 * 3  # codes, scales, zeros, of two weights


class Odd(nn.Module):
    """A linear whose weight ``make`` prepares at each call."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make, self.weight, self.first = make, nn.Parameter(torch.randn(32, 32)), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.first(x)), self.make(self.weight)) + x


def test_weights_that_are_computed(no_inductor: list[Any]) -> None:
    """As quantised layers of other libraries do it: from codes of their own."""
    told = compiled(Odd(lambda w: w.to(torch.int8).float() * 0.5), **SMALL)
    logits(told, torch.randn(2, 32))
    assert codes(told) == {"": "computed-weight"}


@pytest.mark.parametrize(("factor", "code"), [(1e6, "range"), (1e-6, "range"), (float("nan"), "range"), (0, None)])
def test_weights_that_fp16_scales_cannot_say(factor: float, code: str | None, no_inductor: list[Any]) -> None:
    model = Odd(lambda w: w)
    with torch.no_grad():
        model.weight.mul_(factor)
    told = compiled(model, **SMALL)
    logits(told, torch.randn(2, 32))
    assert codes(told) == ({"": code} if code else {})


def test_a_head_that_only_a_loss_reads() -> None:
    def training(x: Tensor, w: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(F.linear(x, w).relu(), v)[:, 1:].reshape(-1, 50).float(), labels)

    given = torch.randn(2, 4, 8), torch.randn(8, 8), torch.randn(50, 8), torch.zeros(6, dtype=torch.long)
    gm = make_fx(training, pre_dispatch=True, tracing_mode="fake")(*given)
    assert [site.role for site in find_linears(gm)] == ["", "head"]


class Theirs(Tensor):
    """A tensor of another class, in which nothing is known to be where it is elsewhere."""


def test_a_weight_of_another_class() -> None:
    """As torchao's are."""
    gm = make_fx(lambda x, w: F.linear(x, w), pre_dispatch=True, tracing_mode="fake")(*[torch.randn(32, 32)] * 2)
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    for weight, code in ((torch.randn(32, 32), ""), (torch.randn(32, 32).as_subclass(Theirs), "other-library")):
        node.args[1].meta["grapharg"] = SimpleNamespace(example=weight)
        node.args[1]._dynamo_source = SimpleNamespace(name="L['self']._modules['a']._parameters['weight']")
        answer = QuantizeWeights().match(LinearSite(node))
        assert (answer.code if isinstance(answer, Reason) else "") == code


def test_a_model_of_such_tensors_runs_as_before(no_inductor: list[Any]) -> None:
    model, x = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 32)), torch.randn(2, 32)
    with torch.no_grad():
        weight = model[0].weight.detach()
        model[0].weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
        expected = model(x)
        model.compile(backend="effcompile", options={"quantize_weights": SMALL})
        got = model(x)
    assert type(got) is type(expected)
    assert torch.equal(got.a, expected.a)
    assert not [d for d in rows_of(model) if d.action == "rewritten"]


def test_gradients_and_autocast(no_inductor: list[Any]) -> None:
    told = compiled(Tiny(), **SMALL)
    told(IDS)
    assert set(codes(told).values()) == {"gradients", "head"}
    told = compiled(Tiny(), **SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        logits(told)
    assert "mixed-dtypes" in codes(told).values()


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_weights_that_change_later(how: str, no_inductor: list[Any]) -> None:
    told = compiled(Tiny(), **SMALL)
    expected = logits(told)
    linear = told.layers[1].down
    for factor in (1.0, 2.0):
        with torch.no_grad():
            if how == "written":
                linear.weight.mul_(factor)
            else:
                linear.weight = nn.Parameter(linear.weight * factor)
        if factor == 1:
            assert torch.equal(logits(told), expected)
            continue
        with pytest.raises(Exception, match=r"layers\.1\.down: its weights are not those that were prepared"):
            logits(told)


def test_beside_methods_for_feed_forward_blocks(no_inductor: list[Any]) -> None:
    """Their linears are gone; the others are packed."""
    model = MODELS["llama"]("sdpa")
    plan = ec.calibrate(model, [IDS], [ec.teal(0.0)], progress=False)
    told = copy.deepcopy(model)
    told.compile(backend="effcompile", options={"plan": plan, "quantize_weights": SMALL})
    logits(told)
    blocks = {name for name in codes(told) if ".mlp." in name}
    assert len(blocks) == 6
    assert {codes(told)[name] for name in blocks} == {"taken"}
    assert {d.module.rsplit(".", 1)[1] for d in rows_of(told) if d.action == "rewritten"} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }  # fmt: skip
    text = str(no_inductor[-1].graph)
    assert text.count("effcompile.quantized_linear") == 4  # of each layer q, k and v, and o
    assert text.count("effcompile.column_ffn") == 2


def test_routers_stay(no_inductor: list[Any]) -> None:
    model = mixtures.MIXTURES["qwen3-moe"].make(3)
    told = compiled(model, **SMALL)
    logits(told, mixtures.IDS)
    assert set(codes(told).values()) == {"head", "router"}


def test_rules_and_decorators_choose(no_inductor: list[Any]) -> None:
    model = ec.quantize_weights(bits=8)(Tiny())
    ec.quantize_weights(bits=3, symmetric=True)(model.layers[1])
    model.compile(backend="effcompile")
    logits(model)
    forms = {d.module: d.form for d in rows_of(model) if d.action == "rewritten"}
    assert {f for m, f in forms.items() if "layers.1" in m} == {"w3g32 symmetric rtn"}
    assert {f for m, f in forms.items() if "layers.0" in m} == {"w8g32 rtn"}


@pytest.mark.parametrize(
    ("options", "text"),
    [({"bits": 5}, "choose 8, 4, 3, 2, or 16"), ({"group": 20}, "multiple of 8"), ({"method": "gptq"}, "'rtn'")],
)
def test_options_that_are_not_offered(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ec.OptionError, match=text):
        ec.quantize_weights(**options)
