"""Discarded parameters: memory falls, results stay, and whatever would use what is gone says so."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from discarding import METHODS, Block, Stack
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import effcompile as ec
from effcompile.runtime import discarded
from models import GQA, MODELS

PROMPT, STEP = torch.arange(24)[None], torch.arange(1)[None]
FEW: dict[str, Any] = {"quantize_weights": {"bits": 4, "group": 32}}

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is mapped as on Linux")


@torch.no_grad()
def outputs(model: nn.Module) -> list[Tensor]:
    return [model(ids) for ids in (PROMPT, STEP)]


def compiled(model: nn.Module, options: Any = None) -> nn.Module:
    model.eval().compile(backend="effcompile", options=FEW if options is None else options)
    return model


def stack(options: Any = None) -> nn.Module:
    """A small one, compiled and called."""
    model = compiled(Stack(64, 96, 2), options)
    outputs(model)
    return model


def raises_compiling(text: str) -> Any:
    """A :class:`~effcompile.DiscardError` of the back end, as Dynamo hands it on."""
    return pytest.raises(BackendCompilerFailed, match=r"raised:\nDiscardError: .*" + text)


class Tied(nn.Module):
    """Embedding and head are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(128, 64), Block(64, 96), nn.Linear(64, 128, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(self.embed(ids)))
        return logits


def measured(folder: Path, *arguments: str) -> dict[str, Any]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("discarding.py"))
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env=environment, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("method", "dtype", "compiler"),
    [
        *((method, "float32", "none") for method in METHODS),
        ("low_rank", "bfloat16", "none"),
        ("quantize_weights", "bfloat16", "inductor"),
    ],
)
def test_resident_memory_falls_by_what_is_dropped(tmp_path, method, dtype, compiler):
    seen = measured(tmp_path, method, dtype, compiler)
    assert seen["bytes"] == 192 << 20
    assert seen["names"] == seen["linears"]
    assert seen["kept"] == 0
    # The block of NaN is memory, and pages of the heap can be half used.
    assert seen["bytes"] - (12 << 20) < seen["fallen"] < seen["bytes"] + (12 << 20)
    assert seen["bytes"] - (24 << 20) < seen["still"]
    assert seen["same"]
    assert seen["finite"]
    assert not seen["recompiled"]
    assert "; 201 MB of parameters discarded." in seen["told"]


def checkpoint(tmp_path: Path) -> nn.Module:
    """A model that transformers has loaded, whose weights are pages of its file."""
    config = transformers.LlamaConfig(**{**GQA, "hidden_size": 256, "intermediate_size": 2048, "pad_token_id": 0})
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    model: nn.Module = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    return model.eval()


def test_pages_of_a_checkpoint_are_given_back(tmp_path, no_inductor):
    model = compiled(checkpoint(tmp_path))
    parameters = dict(model.named_parameters())
    assert not parameters["model.layers.0.mlp.up_proj.weight"].untyped_storage().resizable()
    outputs(model)

    def mapped() -> int:
        found = 0
        for part in Path("/proc/self/smaps").read_text().split("\nVmFlags")[:-1]:
            if "saved/model.safetensors" in part:
                found += 1024 * int(part.split("\nRss:")[1].split()[0])
        return found

    before = mapped()
    done = ec.discard_parameters(model)
    assert done.bytes > 6 << 20
    assert before - mapped() > 0.9 * done.bytes
    # Nothing that stays was touched.
    stays = {name: t for name, t in model.named_parameters() if name not in done.names}
    again = dict(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved").named_parameters())
    assert all(torch.equal(t, again[name]) for name, t in stays.items())


@pytest.mark.parametrize("method", METHODS)
def test_results_and_graphs_stay(method, no_inductor):
    model = Stack(64, 96, 2)
    compiled(model, METHODS[method](model))
    before = outputs(model)
    facts = {name: (t.shape, t.stride(), t.dtype, t.requires_grad) for name, t in model.named_parameters()}
    done = ec.discard_parameters(model)
    assert sorted(done.names) == sorted(f"layers.{n}.{r}.weight" for n in range(2) for r in ("gate", "up", "down"))
    assert done.bytes == 6 * 64 * 96 * 4
    assert all(torch.equal(one, other) for one, other in zip(outputs(model), before, strict=True))
    assert len(no_inductor) == 2
    assert facts == {name: (t.shape, t.stride(), t.dtype, t.requires_grad) for name, t in model.named_parameters()}
    assert ec.inspect(model).summary.endswith("; 147 kB of parameters discarded.")
    assert json.loads(ec.inspect(model).to_json())["discarded_bytes"] == done.bytes
    assert ec.discard_parameters(model) == ec.Discarded((), 0, {})


@torch.no_grad()
def test_a_later_graph_finds_what_was_prepared(no_inductor):
    model, other = stack(), compiled(Stack(64, 96, 2))
    expected = other(torch.arange(9)[None])
    ec.discard_parameters(model)
    assert torch.equal(model(torch.arange(9)[None]), expected)
    torch._dynamo.reset()
    assert torch.equal(model(torch.arange(9)[None]), expected)


def test_a_later_graph_that_reads_what_is_gone_is_an_error(no_inductor):
    model = stack()
    ec.discard_parameters(model)
    text = r"a graph that is compiled now reads layers\.0\.gate\.weight.* and 3 more, which ec\.discard_parameters drop"
    with raises_compiling(text):
        model(PROMPT)  # gradients are wanted, so that linears stay
    torch._dynamo.reset()
    for options, told in [
        ({"quantize_weights": {"bits": 8}}, r"preparing weights in another way than before reads layers\.0\.gate\.we"),
        ({"quantize_weights": {"bits": 16}}, text),
        ({**FEW, "verify": True}, text),
        ({}, text),
    ]:
        compiled(model, options)
        with raises_compiling(told):
            outputs(model)


def test_uncompiled_calls_give_nan(no_inductor):
    model = stack()
    ec.discard_parameters(model)
    model._compiled_call_impl = None
    assert all(bool(t.isnan().all()) for t in outputs(model))


SAVING: dict[str, Callable[[nn.Module], Any]] = {
    "state_dict": lambda model: model.state_dict(),
    "part": lambda model: model.layers[1].up.state_dict(),
    "deepcopy": copy.deepcopy,
    "save": lambda model: torch.save(model, io.BytesIO()),
    "parameter": lambda model: copy.deepcopy(model.layers[1].up.weight),
}


@pytest.mark.parametrize("how", SAVING)
def test_saving_and_copying_is_an_error(how, no_inductor):
    model = stack()
    ec.discard_parameters(model)
    with pytest.raises(
        ec.DiscardError, match=r"weight.* dropped by ec\.discard_parameters, so .*; load the model again"
    ):
        SAVING[how](model)


def test_the_error_names_parameters(no_inductor):
    model = nn.Sequential(stack())
    ec.discard_parameters(model[0])
    text = r"^0\.layers\.0\.gate\.weight, 0\.layers\.0\.up\.weight, 0\.layers\.0\.down\.weight and 3 more: dropped"
    with pytest.raises(ec.DiscardError, match=text):
        model.state_dict()
    text = r"^ec\.calibrate reads 0\.layers\.0\.gate\.weight, .* and 3 more, which ec\.discard_parameters dropped"
    with pytest.raises(ec.DiscardError, match=text):
        ec.calibrate(model, [PROMPT], [ec.flap()], progress=False)


@pytest.mark.slow
def test_save_pretrained_writes_no_weights(tmp_path, no_inductor):
    model: Any = compiled(checkpoint(tmp_path))
    outputs(model)
    ec.discard_parameters(model)
    with pytest.raises(ec.DiscardError, match=r"model\.layers\.0\..* and 11 more: dropped"):
        model.save_pretrained(tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.safetensors"))


def test_loading_brings_parameters_back(no_inductor):
    model, other = stack(), Stack(64, 96, 2)
    before = outputs(model)
    ec.discard_parameters(model)
    with torch.no_grad():
        model.layers[0].up.weight[3] = 1  # in part: still gone, and not what code was compiled for
    with pytest.raises(ec.PlanError, match=r"layers\.0\.up: its weights are not those"):
        outputs(model)
    with pytest.raises(ec.DiscardError, match=r"^layers\.0\.gate\.weight, layers\.0\.up\.weight"):
        model.state_dict()
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(outputs(model), before, strict=True))
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())
    assert "discarded" not in ec.inspect(model).summary
    copied = copy.deepcopy(model)
    assert torch.equal(copied.layers[0].up.weight, other.layers[0].up.weight)
    torch.save(model.layers[0].up.weight, io.BytesIO())
    assert "__deepcopy__" not in vars(model.layers[0].up.weight)
    # What was prepared was of the parameters as they were before they were written to.
    assert {why.code for why in ec.discard_parameters(model).kept.values()} == {"not-supported"}
    changed = {name: t + 1 for name, t in other.state_dict().items()}
    model.load_state_dict(changed)
    with pytest.raises(ec.PlanError, match="its weights are not those"):
        outputs(model)


def test_loading_other_objects_brings_parameters_back(no_inductor):
    model, other = stack(), Stack(64, 96, 2)
    before = outputs(model)
    ec.discard_parameters(model)
    model.load_state_dict(other.state_dict(), assign=True)
    assert all(torch.equal(one, other) for one, other in zip(outputs(model), before, strict=True))
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())


@torch.no_grad()
def test_a_cast_of_what_is_gone_is_an_error(no_inductor):
    model = stack()
    ec.discard_parameters(model)
    model.to(torch.bfloat16)
    with pytest.raises(ec.DiscardError, match="dropped by"):
        model.state_dict()
    text = r"layers\.0\.gate\.weight, which ec\.discard_parameters dropped as torch\.float32 and which was cast"
    with raises_compiling(text):
        model(PROMPT)


@torch.no_grad()
def test_another_object_with_nan_is_not_saved(no_inductor):
    model = stack()
    ec.discard_parameters(model)
    up: Any = model.layers[0].up
    up.weight = nn.Parameter(up.weight.clone())
    with pytest.raises(ec.DiscardError, match=r"^weight: dropped"):
        up.state_dict()


def test_a_tied_weight_stays(no_inductor):
    model = Tied()
    compiled(model, {"quantize_weights": {"bits": 4, "group": 32, "head": True}})
    before = outputs(model)
    done = ec.discard_parameters(model)
    assert sorted(done.names) == ["block.down.weight", "block.gate.weight", "block.up.weight"]
    assert done.kept["embed.weight"].code == "read"
    assert "reads it as it is" in str(done.kept["embed.weight"])
    assert all(torch.equal(one, other) for one, other in zip(outputs(model), before, strict=True))


def test_what_another_graph_reads_stays(no_inductor):
    model = Stack(64, 96, 2)
    other = nn.Sequential(model.embed, model.layers[1])
    compiled(model)
    outputs(model)
    compiled(other, {})
    outputs(other)
    done = ec.discard_parameters(model)
    assert sorted(done.names) == [f"layers.0.{role}.weight" for role in ("down", "gate", "up")]
    assert {name: why.code for name, why in done.kept.items()} == {
        f"layers.1.{role}.weight": "read" for role in ("down", "gate", "up")
    }
    # The other way round: a third model is told, unless it runs the code of the second.
    third = compiled(nn.Sequential(model.embed, model.layers[0]), {})
    assert all(bool(t.isnan().all()) for t in outputs(third))
    torch._dynamo.reset()
    third = compiled(nn.Sequential(model.embed, model.layers[0]), {})
    with raises_compiling(r"reads layers\.0\.gate\.weight.* which ec\.discard_parameters dropped"):
        outputs(third)
    with pytest.raises(ec.DiscardError, match=r"1\.gate\.weight"):
        third.state_dict()


def test_a_graph_under_verification_reads_what_it_replaces(no_inductor):
    model = compiled(Stack(64, 96, 2), {**FEW, "verify": True})
    with torch.no_grad():
        model(PROMPT)
    from effcompile.passes import report

    (graph,) = report.graphs_of(model)
    assert graph.use is not None
    graph.use._checked = True  # as it is between compiling and the first call
    assert not ec.discard_parameters(model).names
    graph.use.done()
    assert len(ec.discard_parameters(model).names) == 6


@torch.no_grad()
def test_caches_that_look_at_weights(no_inductor):
    model: Any = compiled(MODELS["llama"]("sdpa"))
    ids = torch.arange(1, 9)[None]

    def run() -> Tensor:
        cache = ec.Cache(model, 512, key_bits=16, value_bits=16, latent=32)
        return torch.cat([model(chunk, past_key_values=cache).logits for chunk in (ids, ids[:, :1])], 1)

    before = run()
    assert "model.layers.0.self_attn.k_proj.weight" in ec.discard_parameters(model).names
    assert torch.equal(run(), before)
    with pytest.raises(ec.DiscardError, match=r"latent=16 reads q_proj\.weight|latent=16 reads .*k_proj\.weight"):
        ec.Cache(model, 512, latent=16)
    text = r"tries the model, which reads model\.layers\.0\.self_attn\.q_proj\.weight"
    from effcompile.runtime import rope

    rope._learned.clear()
    with pytest.raises(ec.DiscardError, match=text):
        ec.Cache(model, 512, rope="pre")


def test_what_would_free_nothing_stays(no_inductor):
    model = Stack(64, 96, 2)
    with torch.no_grad():
        both = torch.randn(2, 96, 64)
        model.layers[0].up.weight.data = both[0]
        model.layers[0].gate.weight.data = both[1]
        model.register_buffer("view", both)
    compiled(model)
    outputs(model)
    done = ec.discard_parameters(model)
    assert {name: why.code for name, why in done.kept.items()} == dict.fromkeys(
        ["layers.0.up.weight", "layers.0.gate.weight"], "shared-memory"
    )
    assert "view lies in the same storage" in str(done.kept["layers.0.up.weight"])
    assert model.view.isfinite().all()


def test_prepared_weights_that_are_the_users_own_memory_stay(no_inductor):
    model = Stack(64, 96, 2)
    plan = ec.calibrate(model.eval(), [torch.randint(1, 128, (4, 40))], [ec.teal(sparsity=0.25)], progress=False)
    compiled(model, {"plan": plan})
    before = outputs(model)
    done = ec.discard_parameters(model)
    for name in done.kept:
        assert done.kept[name].code in ("shared-memory", "read")
    assert all(torch.equal(one, other) for one, other in zip(outputs(model), before, strict=True))


def test_small_parameters_stay(no_inductor):
    model = compiled(Stack(16, 32, 1))
    outputs(model)
    assert {why.code for why in ec.discard_parameters(model).kept.values()} == {"small"}


def test_nothing_to_discard_is_an_error(no_inductor, monkeypatch):
    model = Stack(64, 96, 2)
    with pytest.raises(ec.DiscardError, match=r"nothing is compiled yet; write model\.compile"):
        ec.discard_parameters(model)
    compiled(model, {})
    outputs(model)
    with pytest.raises(ec.DiscardError, match="no graph of this Stack has prepared weights"):
        ec.discard_parameters(model)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, not an object of type int"):
        ec.discard_parameters(3)  # type: ignore[arg-type]
    model = stack()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ec.DiscardError, match="needs Linux's way of mapping memory; this is darwin"):
        ec.discard_parameters(model)


@pytest.mark.parametrize("dtype", discarded.FLOATS)
@pytest.mark.parametrize("shape", [(3, 5), (1500, 1500), (4096, 1025)])
def test_memory_of_nan(shape, dtype):
    like = torch.empty(shape, dtype=dtype).t()
    made = discarded.nan_like(like)
    assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), dtype)
    assert made.isnan().all()
    made[1] = 2
    assert (made[1] == 2).all()
    assert made[0].isnan().all()
    assert discarded.nan_like(like).isnan().all()


def test_mappings_end_with_their_tensors():
    def count() -> int:
        return Path("/proc/self/maps").read_text().count("effcompile_nan")

    before = count()
    made = discarded.nan_like(torch.empty(3 << 20))
    view = made[5:]
    assert count() == before + 3
    del made
    assert count() == before + 3
    del view
    assert count() == before
