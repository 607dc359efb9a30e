"""Decisions, how a model finds its graphs, what a report prints, and that it keeps nothing alive."""

from __future__ import annotations

import copy
import gc
import io
import json
import logging
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx

import effcompile.kernels.ops  # noqa: F401  (defines the operators)
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program, StoreProgram
from effcompile.kernels.reason import Reason
from effcompile.passes import report, table
from effcompile.passes.backend_options import BackendOptions, parse
from effcompile.passes.decision import Seen
from effcompile.passes.options import decorate, remove
from effcompile.passes.report import Decision, GraphReport, InspectError, Report, Snapshot, inspect


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu() + self.shift


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Backend:
    """As the driver does it: snapshot, record, compile, attach. Rewrites relu to gelu."""

    def __init__(self, given: BackendOptions | None = None) -> None:
        self.given = given or BackendOptions()
        self.graphs = 0

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        before = Snapshot(gm)
        for node in gm.graph.nodes:
            if node.target == "relu":
                node.target = "sigmoid"
        gm.recompile()
        decisions = [Decision(i, "attention", f"layers.{i}", "global option", "rewritten", "sigmoid") for i in range(2)]
        graph = GraphReport(gm, before, decisions, self.given, {"match": 0.5}, after=Snapshot(gm))
        report.record(graph)
        return report.attach(graph, compile_fx(gm, inputs))


def compiled(model: nn.Module, backend: Backend | None = None) -> Any:
    model.compile(backend=backend or Backend())
    with torch.no_grad():
        model(torch.randn(2, 4))
    return model


def test_nothing_compiled() -> None:
    found = inspect(Model())
    assert found.sites == found.decisions == found.kernels == ()
    assert 'model.compile(backend="effcompile")' in str(found)
    with pytest.raises(InspectError, match="object of type int"):
        inspect(3)  # type: ignore[arg-type]


def test_a_model_finds_its_own_graphs() -> None:
    one, other = compiled(Model()), compiled(nn.Sequential(Layer()))
    assert len(inspect(one).graphs) == 1
    assert len(inspect(one).sites) == 2
    assert all(site.rewritten for site in inspect(one).sites)
    assert "linear" in inspect(one).graph("before")
    assert len(inspect(other).graphs) == 1
    assert inspect(one).graphs != inspect(other).graphs


def test_a_sub_module_finds_the_graph_it_is_in() -> None:
    model = compiled(Model())
    assert inspect(model.layers[1]).graphs == inspect(model).graphs


def test_a_compiled_wrapper_is_looked_through() -> None:
    model = Model()
    fast: Any = torch.compile(model, backend=Backend())
    fast(torch.randn(2, 4))
    assert inspect(fast).graphs == inspect(model).graphs
    assert len(inspect(fast).graphs) == 1


def test_models_of_one_structure_share_code_and_report() -> None:
    backend = Backend()
    one = compiled(Model(), backend)
    twin = compiled(copy.deepcopy(one), backend)
    assert backend.graphs == 1
    assert inspect(twin).graphs == inspect(one).graphs != ()
    assert inspect(Model()).graphs == ()


def test_a_second_graph_is_merged() -> None:
    model = compiled(Model())
    torch._dynamo.config.automatic_dynamic_shapes, before = False, torch._dynamo.config.automatic_dynamic_shapes
    try:
        with torch.no_grad():
            model(torch.randn(3, 4))
    finally:
        torch._dynamo.config.automatic_dynamic_shapes = before
    found = inspect(model)
    assert len(found.graphs) == 2
    assert [(d.graph, d.site) for d in found.decisions] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert "4 of 4 sites rewritten in 2 graphs" in str(found)


def test_graphs_of_other_decorations_are_not_shown() -> None:
    from toy_pass import Toy, registered

    with registered():
        model = compiled(Model())
        decorate(model, Toy(8))
        assert inspect(model).graphs == ()
        with torch.no_grad():
            model(torch.randn(2, 4))
        (decorated,) = inspect(model).graphs
        remove(model)
        (plain,) = inspect(model).graphs
        assert plain is not decorated


def test_a_report_lives_as_long_as_the_compiled_code() -> None:
    model = compiled(Model())
    (graph,) = inspect(model).graphs
    seen, weight = weakref.ref(graph), weakref.ref(model.layers[0].linear.weight)
    del graph
    gc.collect()
    assert seen() is not None
    torch._dynamo.reset()
    gc.collect()
    assert seen() is None
    del model
    gc.collect()
    assert weight() is None


def test_a_report_that_was_never_attached_goes_with_its_model() -> None:
    class Forgetful(Backend):
        def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
            report.record(GraphReport(gm, None, [], BackendOptions()))
            return gm

    model = compiled(Model(), Forgetful())
    (graph,) = inspect(model).graphs
    seen = weakref.ref(graph)
    del graph, model
    torch._dynamo.reset()
    gc.collect()
    compiled(Model())
    assert seen() is None


def test_a_snapshot_holds_no_parameter_and_sees_no_later_change() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    weight = weakref.ref(gm.get_submodule("0").weight)
    snapshot = Snapshot(gm)
    gm.graph.output_node().args = (gm.graph.find_nodes(op="placeholder")[0],)
    gm.recompile()
    assert [n.op for n in snapshot.module.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    del gm
    gc.collect()
    assert weight() is None


def test_graph_and_diff() -> None:
    found = inspect(compiled(Model()))
    assert "linear.relu()" in found.graph("before")
    assert "linear.relu()" not in found.graph("after")
    assert 'relu: "f32[2, 4]" = linear.sigmoid()' in found.graph("after")
    diff = found.diff()
    assert [line[0] for line in diff.splitlines() if ".relu()" in line and line[0] in "+-"] == ["-", "-"]
    assert diff.startswith("--- graph 0 (graph), before")
    assert found.diff(0) == diff
    with pytest.raises(ValueError, match="choose 'before' or 'after'"):
        found.graph("middle")  # type: ignore[arg-type]


def test_inspect_with_inputs_runs_once_and_leaves_state_alone() -> None:
    class Store:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def get_seq_length(self) -> int:
            return len(self.seen)

    class Stateful(Model):
        def forward(self, x: Tensor, cache: Any = None) -> Tensor:
            if cache is not None:
                cache.seen.append(1)
            assert not torch.is_grad_enabled()
            return super().forward(x)

    model, store = Stateful(), Store()
    model.compile(backend=Backend())
    x, before = torch.randn(2, 4), torch.random.get_rng_state()
    found = inspect(model, x, cache=store)
    assert store.seen == []
    assert len(found.graphs) == 1
    torch.testing.assert_close(torch.random.get_rng_state(), before)


def site(load: KVForm | None, mask: int = 0, rows: int = 1, causal: bool = False, batch: int = 1) -> Any:
    """What :func:`effcompile.passes.decision.left` reads of a site: 9 query heads on 3, 64 channels, 1,024 keys."""

    def node(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
        return SimpleNamespace(meta={"val": torch.empty(*shape, dtype=dtype, device="meta")})

    return SimpleNamespace(
        kind="attention",
        module="L['self'].model.layers.3.forward.__self__.self_attn",
        source="/home/u/model.py:12: attn = sdpa(q, k, v)",
        query=node(batch, 9, rows, 64),
        key=node(batch, 3, 1024, 64),
        value=node(batch, 3, 1024, 64),
        ratio=3,
        is_causal=causal,
        mask_terms=(node(1, 1, rows, 1024, dtype=torch.bool),) * mask,
        load=None if load is None else SimpleNamespace(args=(None,) * 7 + (load.name,), kwargs={}),
    )


def test_the_numbers_of_a_rewritten_site() -> None:
    form = KVForm()
    program = Program("decode", form, Predicate(), torch.float32, 3, 64, 64)
    store = StoreProgram(form, torch.float32, 64, 64)
    d = report.rewritten(
        3, site(form, mask=1), "global option", SimpleNamespace(form="name", programs=(program, store), tokens=None)
    )
    assert d.module == "model.layers.3.self_attn"
    assert d.kernels == (program.name, store.name)
    assert d.cache == (form.nbytes(1, 3, 1024, 64, 64, torch.float32), 2 * 3 * 1024 * 64 * 4)
    ends, dense = 9 * 128 * 4, 3 * 1024 * 128 * 4
    tail, packed = 3 * 128 * 128 * 4, 3 * 896 * (64 + 16)
    assert d.bytes_after == ends + 9 * 4 + tail + packed
    assert d.bytes_before == ends + tail + packed + 2 * dense + 1024
    assert d.flops_after == 9 * 1024 * 256 + 2 * 3 * 896 * 128
    assert "floor" in d.formula("after", "bytes")
    assert "S" in d.formula("after", "flops")
    assert json.loads(json.dumps(d.to_dict()))["bytes_after"] == d.bytes_after


def test_the_numbers_of_a_site_that_is_left() -> None:
    d = report.left(0, site(None, rows=1024, causal=True), "", Reason("fresh-keys", "why", "model.py:12"))
    assert d.before == d.after
    assert d.bytes_before == 9 * 1024 * 128 * 4 + 3 * 1024 * 128 * 4
    assert d.flops_before == 9 * (1024 * 1025 // 2) * 256
    assert d.formula("before", "bytes") == str(d.bytes_before)
    seen = SimpleNamespace(kind="attention", module="layers.1.attn", source="model.py:12", queries=1)
    unknown = report.left(1, seen, "", Reason("attention-shape", "why", "model.py:12"))
    assert (unknown.bytes_before, unknown.source, unknown.module) == (None, "model.py:12", "layers.1.attn")
    assert graph_report([unknown]).label == "decode"


def graph_report(decisions: list[Decision], **more: Any) -> GraphReport:
    gm = fx.symbolic_trace(nn.ReLU())
    return GraphReport(gm, None, decisions, BackendOptions(), **more)


def test_table_puts_equal_layers_in_one_line() -> None:
    form = KVForm()
    program = Program("decode", form, Predicate(), torch.float32, 3, 64, 64)
    rewrite = SimpleNamespace(form="attend_decode", programs=(program,), tokens=None)
    decisions = []
    for i in range(30):
        one = site(form, mask=1)
        one.module = f"model.layers.{i}.self_attn"
        why = Reason("mask-unknown", "the mask depends on input 'bias'", one.source)
        new = report.left(i, one, "rule '**'", why) if i == 7 else report.rewritten(i, one, "rule '**'", rewrite)
        decisions.append(new)
    graph = graph_report(decisions)
    graph.set_seen([Seen(1e-3 * i) for i in range(29)])
    text = str(Report([graph], "Llama"))
    assert "0-6,8-29" in text
    assert "mask-unknown" in text
    assert "model.py:12" in text
    assert "2.8e-02" in text
    assert "29 of 30 sites rewritten in 1 graph; cache" in text
    assert "instead of 45.6 MB." in text
    assert max(map(len, text.splitlines())) <= 120
    assert len(text.splitlines()) < 30
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(Report([graph], "Llama"))
    assert "attend_decode" in console.export_text()


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        (["a.0.b", "a.1.b", "a.2.b", "a.9.b"], "a.{0-2,9}.b"),
        (["a.0.b"], "a.0.b"),
        (["x", "x"], "x"),
        (["a.0.b1", "a.1.b1"], "a.{0-1}.b1"),
    ],
)
def test_spans(modules: list[str], text: str) -> None:
    assert table.spanned(modules) == text


def test_json_is_whole_and_plain() -> None:
    decision = report.left(0, site(KVForm()), "ec.Cache", Reason("dropout", "why", "m.py:1"))
    content = json.loads(Report([graph_report([decision], note=None)], "Llama").to_json())
    (graph,) = content["graphs"]
    assert graph["decisions"][0]["reason"] == {"code": "dropout", "text": "why", "source": "m.py:1"}
    assert graph["options"]["verify"] is False
    assert graph["label"] == "decode"
    noted = Report([graph_report([], note=Reason("not-normalised", "re-tracing failed"))], "Llama")
    assert "not-normalised: re-tracing failed" in str(noted)


def test_rules_that_name_nothing_are_in_the_report(caplog: pytest.LogCaptureFixture) -> None:
    from toy_pass import registered

    with registered(), caplog.at_level(logging.DEBUG, "effcompile"):
        given = parse({"rules": {"layer.*": {"toy": {}}}})
        found = inspect(compiled(Model(), Backend(given)))
    sentence = "rule 'layer.*' names no module of this graph; nearest: layers.1, layers.0"
    assert sentence in str(found)
    assert sentence in caplog.text
    assert "2 of 2 sites rewritten" in caplog.text
    assert "site 1 layers.1: rewritten sigmoid [global option]" in caplog.text


@pytest.mark.parametrize(
    ("setting", "info", "debug"), [("effcompile", True, False), ("+effcompile", True, True), (None, False, False)]
)
def test_torch_logs_switches_the_channel_on(setting: str | None, info: bool, debug: bool) -> None:
    code = (
        "import logging, effcompile, torch; log = logging.getLogger('effcompile.passes.report');"
        "log.info('an info line'); log.debug('a debug line')"
    )
    env = {name: value for name, value in os.environ.items() if name != "TORCH_LOGS"}
    if setting is not None:
        env["TORCH_LOGS"] = setting
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert ("an info line" in run.stderr, "a debug line" in run.stderr) == (info, debug)


class Bare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


class Other(Bare):
    pass


def test_a_model_without_parameters_is_found_by_its_class() -> None:
    x = torch.randn(1, 2, 40, 16)
    compiled = [torch.compile(model(), backend="effcompile") for model in (Bare, Bare)]
    other = torch.compile(Other(), backend="effcompile")
    for model in compiled:
        model(x)
        assert [d.kind for d in inspect(model).decisions] == ["attention"]
    assert not inspect(other).graphs
    assert not inspect(Bare()).graphs
