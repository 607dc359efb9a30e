"""What a decorator can be put on: own classes, a library's, methods, functions; and what pickling keeps."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import effcompile as ec
from effcompile.passes import backend, base, targets
from effcompile.passes.compress_kv import CompressKV
from effcompile.passes.options import DecorationError
from effcompile.runtime import adapter
from models import GQA, MODELS

IDS = torch.randint(1, 128, (2, 60), generator=torch.Generator().manual_seed(1))
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

pytestmark = pytest.mark.filterwarnings("ignore:compress_kv. generate")


class Base(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@ec.compress_kv(key_bits=8)
class Own(Base):
    """A class of the user's own."""

    def __init__(self, width: int = 8) -> None:
        super(Own, self).__init__(width)  # noqa: UP008  (the old way finds the class by its name)
        self.done = True


@ec.compress_kv(key_bits=2)
class Plain(Base):
    """Without an ``__init__``."""


@ec.compress_kv(key_bits=8, value_bits=8)
class OwnLlama(transformers.LlamaForCausalLM):
    """A user's variant of a library's model."""


def config() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**GQA, pad_token_id=0)


def bits(module: nn.Module) -> tuple[int, int]:
    chosen = ec.options_of(module)["compress_kv"]
    assert isinstance(chosen, CompressKV)
    assert adapter.form_of(module) == chosen.form
    return chosen.key_bits, chosen.value_bits


def test_every_instance_of_a_users_class_is_decorated_and_its_bases_are_not() -> None:
    assert bits(Own()) == (8, 4)
    assert Own().done
    assert Own(5).linear.in_features == 5
    assert bits(Plain(3)) == (2, 4)
    assert Plain(3).linear.in_features == 3
    assert ec.options_of(Base()) == {}
    assert "forward" not in vars(Base())
    assert "__init__" in vars(Plain)
    assert nn.Linear(2, 2).__dict__.get("_effcompile") is None

    class Below(Own):
        def __init__(self) -> None:
            super().__init__(6)
            self.more = nn.Linear(2, 2)

    assert bits(Below()) == (8, 4)
    assert isinstance(Below(), Own)
    assert ec.options_of(ec.remove(Own())) == {}
    ec.compress_kv(key_bits=16)(made := Own())
    assert bits(made) == (16, 4)


def test_two_decorators_on_one_class_and_on_a_class_below() -> None:
    @ec.compress_kv(key_bits=3)
    @ec.compress_kv(key_bits=2)
    class Twice(Base):
        pass

    @ec.compress_kv(key_bits=16)
    class Below(Twice):
        pass

    assert (bits(Twice())[0], bits(Below())[0]) == (3, 16)


def test_a_librarys_class_is_not_changed(tmp_path: Path) -> None:
    """And the subclass does all that the class does: from_pretrained, save_pretrained, isinstance, generate, pickle."""
    before = dict(vars(transformers.LlamaForCausalLM))
    decorator = ec.compress_kv(key_bits=16, value_bits=16)
    Ours: Any = decorator(transformers.LlamaForCausalLM)
    assert Ours is not transformers.LlamaForCausalLM
    assert dict(vars(transformers.LlamaForCausalLM)) == before
    assert ec.options_of(transformers.LlamaForCausalLM(config())) == {}
    assert ec.compress_kv(16, 16)(transformers.LlamaForCausalLM) is Ours
    assert Ours.can_generate()

    plain = MODELS["llama"]("sdpa")
    plain.save_pretrained(tmp_path / "a")
    model = Ours.from_pretrained(tmp_path / "a").eval()
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert isinstance(model, Ours)
    assert bits(model) == (16, 16)
    out = model.generate(IDS, **GREEDY, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, ec.Cache)
    assert torch.equal(out.sequences, plain.generate(IDS, **GREEDY))
    model.save_pretrained(tmp_path / "b")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "b" / name).read_text() == (tmp_path / "a" / name).read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert type(again) is transformers.LlamaForCausalLM

    for changed in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(changed) is Ours
        assert bits(changed) == (16, 16)
        assert changed.forward.__self__ is changed
        assert torch.equal(changed.generate(IDS, **GREEDY), out.sequences)
    bare = pickle.loads(pickle.dumps(ec.remove(model)))
    assert type(bare) is Ours
    assert ec.options_of(bare) == {}

    other: Any = ec.compress_kv(key_bits=8)(Ours)
    assert other.__mro__[1] is transformers.LlamaForCausalLM
    assert bits(other(config())) == (8, 4)
    assert bits(Ours(config())) == (16, 16)


def test_a_users_variant_of_a_librarys_model(tmp_path: Path) -> None:
    before = dict(vars(transformers.LlamaForCausalLM))
    MODELS["llama"]("sdpa").save_pretrained(tmp_path)
    model = OwnLlama.from_pretrained(tmp_path).eval()
    assert bits(model) == (8, 8)
    out = model.generate(IDS, **GREEDY, return_dict_in_generate=True)
    assert out.past_key_values.compressed[0].form.key_bits == 8
    assert dict(vars(transformers.LlamaForCausalLM)) == before
    assert bits(pickle.loads(pickle.dumps(model))) == (8, 8)


@pytest.mark.filterwarnings("ignore")
def test_a_decorated_class_compiles_as_a_decorated_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "compile_fx", lambda gm, inputs, config_patches=None: gm.forward)
    plain = MODELS["llama"]("sdpa")
    Ours: Any = ec.compress_kv(key_bits=16, value_bits=16)(transformers.LlamaForCausalLM)
    model = Ours(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    expected = plain.generate(IDS, **GREEDY)
    model.compile(backend="effcompile")
    assert torch.equal(model.generate(IDS, **GREEDY), expected)
    assert {(d.action, d.rule) for d in ec.inspect(model).decisions} == {("rewritten", "decorator on LlamaForCausalLM")}
    assert "modeling_llama.py" in ec.inspect(model).decisions[0].source


def test_pickle_and_torch_save_keep_the_decorations() -> None:
    """generate() and forward() of what is loaded both make the compressed cache, with the forms of each layer."""
    model = ec.compress_kv(key_bits=4, value_bits=4)(MODELS["llama"]("sdpa"))
    ec.compress_kv(key_bits=8, value_bits=8)(model.model.layers[1])
    model.compile(backend="effcompile")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    expected = copy.deepcopy(model).generate(IDS, **GREEDY, return_dict_in_generate=True)
    for twin in (loaded, pickle.loads(pickle.dumps(loaded)), pickle.loads(pickle.dumps(model, protocol=5))):
        assert twin._compiled_call_impl is None
        assert bits(twin) == (4, 4)
        assert bits(twin.model.layers[1]) == (8, 8)
        assert vars(twin)["create_masks_for_generate"].args == (twin,)
        assert twin.forward.__self__ is twin
        got = twin.generate(IDS, **GREEDY, return_dict_in_generate=True)
        assert [layer.form for layer in got.past_key_values.compressed] == [
            layer.form for layer in expected.past_key_values.compressed
        ]
        assert torch.equal(got.sequences, expected.sequences)
        with torch.no_grad():
            assert isinstance(twin(IDS).past_key_values, ec.Cache)
        ec.remove(twin)
        assert not any("effcompile" in name for m in twin.modules() for name in vars(m))
    assert bits(model) == (4, 4)


def test_pickle_keeps_a_forward_that_was_there_before() -> None:
    model = Base()
    model.forward = functools.partial(_twice, model)
    x = torch.randn(2, 4)
    expected = model(x)
    ec.compress_kv(key_bits=8)(model)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert bits(twin) == (8, 4)
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin.linear.weight.zero_()
            twin.linear.bias.zero_()
        assert not twin(x).any()
        assert isinstance(ec.remove(twin).forward, functools.partial)
    assert torch.equal(model(x), expected)


def _twice(self: Base, x: Tensor) -> Tensor:
    return Base.forward(self, x) * 2


class Sequence:
    """No module."""

    def forward(self) -> None:
        """A method of it."""


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (Sequence, "the class Sequence, which is no torch.nn.Module; decorate the model that it makes"),
        (transformers.AutoModelForCausalLM, "the class AutoModelForCausalLM, which is no torch.nn.Module"),
        (nn.ModuleList, "the class ModuleList, which has no forward of its own; decorate the modules in it"),
        (Base.forward, r"the function Base.forward. A model has one cache.*put it above the class"),
        (Base().forward, r"the function Base.forward. A model has one cache.*ec.Cache\(model\)"),
        (math.sqrt, r"the function sqrt. A cache belongs to a model: put it on the one that the function calls"),
        (lambda model: model(IDS), "A cache belongs to a model"),
        (IDS, "an object of type Tensor"),
        (None, "an object of type NoneType"),
    ],
)
def test_where_a_decorator_cannot_stand(thing: Any, said: str) -> None:
    with pytest.raises(DecorationError, match=said):
        ec.compress_kv()(thing)


def test_on_a_method_the_class_is_not_made() -> None:
    with pytest.raises(DecorationError, match=r"the function .*Model\.forward\. A model has one cache"):

        class Model(nn.Module):
            @ec.compress_kv()
            def forward(self, x: Tensor) -> Tensor:
                return x


def test_the_table_in_the_docs_is_the_one_in_the_code() -> None:
    docs = Path(__file__).parents[1] / "docs"
    names = ("compress_kv.md", "sparse_attention.md", "feed_forward.md", "low_rank.md")
    text = "\n".join((docs / name).read_text() for name in names)
    head = re.search(r"^\| pass \|(.*)\|$", text, re.M)
    assert head is not None
    kinds = [word.strip() for word in head[1].split("|")]
    found = re.finditer(r"^\| `(\w+)` on \|(.*)\|$", text, re.M)
    rows = {row[1]: [c.strip() for c in row[2].split("|")] for row in found}
    shown = {name: dict(zip(kinds, cells, strict=True)) for name, cells in rows.items()}
    code = {name: {kind: "no" if why else "yes" for kind, why in row.items()} for name, row in targets.table().items()}
    assert shown == code
    assert all(base.get(name).elsewhere.keys() <= {"method", "function"} for name in code)


def test_pickle_of_a_model_that_a_cache_was_made_for() -> None:
    model = MODELS["llama"]("sdpa")
    expected = model.generate(IDS, past_key_values=ec.Cache(model, key_bits=8), **GREEDY)
    twin = pickle.loads(pickle.dumps(model))
    assert vars(twin)["create_masks_for_generate"].args == (twin,)
    assert torch.equal(twin.generate(IDS, past_key_values=ec.Cache(twin, key_bits=8), **GREEDY), expected)
    assert not any("effcompile" in name for m in ec.remove(twin).modules() for name in vars(m))
