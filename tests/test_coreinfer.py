"""``ec.coreinfer`` on models: beside the same method written with hooks on the eager model; what is forgotten when."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_core_ops import brute
from torch import Tensor, nn

import effcompile as ec
from effcompile.passes import base
from effcompile.passes.options import OptionError
from models import MODELS

IDS = torch.randint(3, 128, (2, 33), generator=torch.Generator().manual_seed(3))
PADDED = torch.ones_like(IDS)
PADDED[0, :13] = 0
GREEDY: dict[str, Any] = {
    "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "output_logits": True,
    "return_dict_in_generate": True,
}  # fmt: skip
ALL = {"start": 0, "end": 1}
LAST = {"llama": "down_proj", "gpt2": "mlp.c_proj", "phi3": "down_proj", "opt": "fc2"}


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy with weights of its own: the choices of a model belong to them."""
    return copy.deepcopy(model)


def frozen(model: nn.Module, **options: Any) -> Any:
    made = ec.coreinfer(**{**ALL, **options})(shared_copy(model))
    made.compile(backend="effcompile")
    return made


class Frozen:
    """The method with hooks: what the last linear of each block reads is looked at in a prompt, and cut in a step."""

    def __init__(self, model: nn.Module, last: str, alpha: float = 0.4, beta: float = 0.4, size: bool = False) -> None:
        self.core: dict[str, Tensor] = {}
        self.counted: Tensor | None = None
        self.alpha, self.beta, self.size = alpha, beta, size
        for name, module in model.named_modules():
            if name.endswith(last):
                module.register_forward_pre_hook(self.hook(name))

    def hook(self, name: str) -> Any:
        def look(module: nn.Module, given: tuple[Tensor]) -> Any:
            middle = given[0].reshape(len(IDS), -1, given[0].shape[-1])  # OPT folds rows and tokens
            if middle.shape[1] > 1:
                votes = torch.tensor(brute(middle, self.counted, len(middle), self.alpha, self.size))
                order = votes.sort(dim=-1, descending=True, stable=True).indices
                self.core[name] = order[:, : int(self.beta * votes.shape[1])].sort(-1).values
                return None
            kept = torch.zeros_like(middle, dtype=torch.bool).scatter(-1, self.core[name][:, None], True)
            return (middle.where(kept, 0).view(given[0].shape),)

        return look


def forms(model: nn.Module) -> set[str]:
    found = [d for d in ec.inspect(model).decisions if d.kind == "ffn"]
    assert found
    return {d.form if d.reason is None else d.reason.code for d in found}


def assert_same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-5, atol=3e-5 * float(theirs.abs().max()))


GATED = ("llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "phi3", "opt")))


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize("architecture", GATED)
def test_limit_is_eager(architecture: str, no_inductor: list[Any]) -> None:
    model = MODELS[architecture]("sdpa")
    fast = frozen(model, **base.get("coreinfer").limit)
    assert_same(fast.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))
    width = 512 if architecture == "gpt2" else 96
    assert forms(fast) == {f"coreinfer, {width} neurons chosen", f"coreinfer {width} of {width} neurons"}
    assert {tuple(core.shape) for core in ec.core_neurons(fast).values()} == {(2, width)}


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("architecture", GATED)
def test_form_is_the_method(architecture: str, padded: bool, no_inductor: list[Any]) -> None:
    """Every block, in prompts and steps; padding does not vote."""
    model = MODELS[architecture]("sdpa")
    given = {"attention_mask": PADDED} if padded else {}
    fast = frozen(model)
    got = fast.generate(IDS, **given, **GREEDY)
    plain = shared_copy(model)
    watch = Frozen(plain, LAST[architecture])
    watch.counted = PADDED.bool() if padded else None
    expected = plain.generate(IDS, **given, **GREEDY)
    assert {name: c.tolist() for name, c in ec.core_neurons(fast).items()} == {
        name: c.tolist() for name, c in watch.core.items()
    }
    assert_same(got, expected)
    width, kept = (512, 204) if architecture == "gpt2" else (96, 38)
    assert forms(fast) == {f"coreinfer, {kept} neurons chosen", f"coreinfer {kept} of {width} neurons"}
    dense = model.generate(IDS, **given, **GREEDY)
    assert (dense.logits[-1] - got.logits[-1]).abs().max() > 1e-3


@pytest.mark.slow
def test_options(no_inductor: list[Any]) -> None:
    """Other shares, and activations by their size."""
    model = MODELS["llama"]("sdpa")
    fast, plain = frozen(model, alpha=0.9, beta=0.25, score="magnitude"), shared_copy(model)
    watch = Frozen(plain, "down_proj", 0.9, 0.25, True)
    assert_same(fast.generate(IDS, **GREEDY), plain.generate(IDS, **GREEDY))
    assert {name: c.tolist() for name, c in ec.core_neurons(fast).items()} == {
        name: c.tolist() for name, c in watch.core.items()
    }
    for wrong in ({"beta": 0.0}, {"alpha": 1.5}, {"start": 0.9}, {"start": 0.5, "end": 0.5}, {"max_batch_size": 0}):
        with pytest.raises(OptionError, match="expected"):
            ec.coreinfer(**wrong)


@pytest.mark.slow
def test_our_own_cache(no_inductor: list[Any]) -> None:
    model = MODELS["llama"]("sdpa")
    for beta, same in ((1.0, True), (0.4, False)):
        fast = frozen(model, beta=beta)
        cache = ec.Cache(fast, 256, key_bits=16, value_bits=16)
        got = fast.generate(IDS, attention_mask=PADDED, past_key_values=cache, **GREEDY)
        assert forms(fast) == {
            f"coreinfer, {int(beta * 96)} neurons chosen",
            f"coreinfer {int(beta * 96)} of 96 neurons",
        }
        assert {tuple(core.shape) for core in ec.core_neurons(fast).values()} == {(2, int(beta * 96))}
        expected = model.generate(IDS, attention_mask=PADDED, **GREEDY)
        assert same == torch.allclose(got.logits[-1], expected.logits[-1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def read(model: Any, ids: Tensor, cache: Any, **given: Any) -> Tensor:
    out: Tensor = model(ids, past_key_values=cache, **given).logits
    return out


def new_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def neurons(model: nn.Module) -> list[list[list[int]]]:
    return [core.tolist() for core in ec.core_neurons(model).values()]


@pytest.mark.slow
def test_a_cache_of_fixed_size(no_inductor: list[Any]) -> None:
    """Where a call begins is a tensor there, which the call counts up. A prompt with padding, in chunks; then steps."""
    from transformers import StaticCache

    model = MODELS["llama"]("sdpa")
    fast, plain = frozen(model), shared_copy(model)
    Frozen(plain, "down_proj").counted = PADDED.bool()
    cache, theirs = StaticCache(model.config, max_cache_len=64), new_cache()
    for begin, end in ((0, 20), (20, 33)):
        got = read(fast, IDS[:, begin:end], cache, attention_mask=PADDED[:, :end])
    expected = read(plain, IDS, theirs, attention_mask=PADDED)
    torch.testing.assert_close(got[:, -1], expected[:, -1], rtol=1e-5, atol=1e-4)
    for more in range(1, 4):
        mask = torch.cat([PADDED, torch.ones(2, more, dtype=torch.int64)], 1)
        got, expected = (
            read(m, IDS[:, more : more + 1], c, attention_mask=mask) for m, c in ((fast, cache), (plain, theirs))
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    assert forms(fast) == {"coreinfer, 38 neurons chosen", "coreinfer 38 of 96 neurons"}


@pytest.mark.slow
def test_verify_looks_at_both_phases_and_changes_no_choice(no_inductor: list[Any]) -> None:
    fast = ec.coreinfer(**ALL)(shared_copy(MODELS["llama"]("sdpa")))
    fast.compile(backend="effcompile", options={"verify": True})
    cache = new_cache()
    read(fast, IDS, cache)
    before = neurons(fast)
    read(fast, IDS[:, :1], cache)
    assert neurons(fast) == before
    errors = [d.error for d in ec.inspect(fast).decisions if d.kind == "ffn"]
    assert errors[:2] == [0, 0]
    assert all(error is not None and 1e-3 < error < 1 for error in errors[2:])


@pytest.mark.slow
def test_chunks_are_the_whole_and_a_batch_is_its_rows(no_inductor: list[Any]) -> None:
    """Votes of chunks add up; and steps count the text on, so that a second turn goes on with it."""
    fast = frozen(MODELS["llama"]("sdpa"))
    token = IDS[:, :1]
    cache = new_cache()
    read(fast, IDS, cache)
    whole, step = neurons(fast), read(fast, token, cache)
    for sizes in ((9, 24), (21, 2, 10)):
        cache = new_cache()
        for part in IDS.split(sizes, 1):
            read(fast, part, cache)
        assert neurons(fast) == whole
        torch.testing.assert_close(read(fast, token, cache), step, rtol=1e-5, atol=1e-4)
    for row in range(2):
        alone = new_cache()
        read(fast, IDS[row : row + 1], alone)
        assert [block[0] for block in neurons(fast)] == [block[row] for block in whole]
        torch.testing.assert_close(read(fast, token[row : row + 1], alone)[0], step[row], rtol=1e-5, atol=1e-4)
    first = neurons(fast)
    read(fast, IDS[1:, :20], alone)
    assert [len(block[0]) for block in neurons(fast)] == [38, 38]
    assert neurons(fast) != first


@pytest.mark.exhaustive
def test_what_is_forgotten_when(no_inductor: list[Any]) -> None:
    """Without a choice for this text a step is that of the dense model."""
    model = MODELS["llama"]("sdpa")
    fast, token = frozen(model), IDS[:, :1]

    def dense(cache: Any, ids: Tensor = token) -> bool:
        plain = copy.deepcopy(cache)
        got, expected = read(fast, ids, cache), read(model, ids, plain)
        same = torch.allclose(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        assert same == (sum(core.numel() for core in ec.core_neurons(fast).values()) == 0) or ids.shape[1] > 1
        return same

    assert ec.core_neurons(fast) == {}
    eager = new_cache()
    read(model, IDS, eager)
    assert dense(eager), "before any prompt"
    assert dense(eager), "and after that"
    one = new_cache()
    assert dense(one), "a prompt of one token"
    assert dense(one)
    cache = new_cache()
    assert dense(cache, IDS), "prompts are dense"
    assert not dense(cache), "a step is not"
    other = new_cache()
    read(model, IDS[:, :20], other)
    assert dense(other), "a text that was read elsewhere"
    assert dense(cache), "after which the one before is forgotten"
    cache = new_cache()
    read(fast, IDS[:, :20], cache)
    first = neurons(fast)
    assert not dense(cache)
    cache = new_cache()
    read(fast, IDS[:, 10:], cache)
    assert neurons(fast) != first, "a new prompt chooses anew"
    assert not dense(cache)
    ec.forget_core_neurons(fast)
    assert neurons(fast) == [[], []]
    assert dense(cache), "forgotten by the user"
    cache = new_cache()
    read(fast, IDS, cache)
    read(fast, IDS[:1, :9], new_cache())
    assert dense(cache), "another batch was read since"


@pytest.mark.slow
def test_nothing_else_changes(no_inductor: list[Any]) -> None:
    """Looking changes no choice; copies choose for themselves; no tensor is added to a model."""
    model = MODELS["llama"]("sdpa")
    fast = frozen(model)
    cache = new_cache()
    read(fast, IDS, cache)
    before, step = neurons(fast), read(fast, IDS[:, :1], copy.deepcopy(cache))
    ec.forget_core_neurons(fast)
    read(fast, IDS, new_cache())
    ec.inspect(fast, IDS[:, :5].flip(0))
    ec.inspect(fast, IDS[:1, :1])
    other = copy.deepcopy(fast)
    other.compile(backend="effcompile")
    assert ec.core_neurons(other) == {}
    read(other, IDS.flip(1), new_cache())
    assert neurons(other) != before
    assert neurons(fast) == before
    assert torch.equal(read(fast, IDS[:, :1], cache), step)
    assert list(fast.state_dict()) == list(model.state_dict())


@pytest.mark.slow
def test_graphs_of_any_size(no_inductor: list[Any]) -> None:
    """Lengths and batches that are symbols are graphs that serve all; a larger batch is another one, and dense."""
    fast = frozen(MODELS["llama"]("sdpa"), max_batch_size=3)
    alone = []
    for row in range(2):
        read(fast, IDS[row : row + 1], new_cache())
        alone.append([block[0] for block in neurons(fast)])
    torch._dynamo.reset()
    no_inductor.clear()
    for rows in (2, 3):
        ids = IDS[[0, 1, 0][:rows]].clone()
        torch._dynamo.mark_dynamic(ids, 0)
        torch._dynamo.mark_dynamic(ids, 1)
        cache = new_cache()
        read(fast, ids, cache)
        assert [[block[row] for block in neurons(fast)] for row in range(2)] == alone
        assert all(block[2:] == block[: rows - 2] for block in neurons(fast))
    assert len(no_inductor) == 1
    before = neurons(fast)
    read(fast, IDS[[0, 1, 0, 1]], new_cache())
    assert "batch-too-large" in forms(fast)
    assert neurons(fast) == before


def reasons(model: nn.Module) -> set[str]:
    return {d.reason.code for d in ec.inspect(model).decisions if d.kind == "ffn" and d.reason is not None}


class Packed(nn.Module):
    """A layer over several texts in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor, segment: Tensor) -> Tensor:
        heads = self.mix(x).unflatten(-1, (2, 16)).transpose(1, 2)
        place = torch.arange(x.shape[1])
        mask = (place[:, None] >= place) & (segment[:, None, :, None] == segment[:, None, None, :])
        y = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
        x = x + y.transpose(1, 2).flatten(2)
        out: Tensor = x + self.down(nn.functional.relu(self.up(x)))
        return out


def test_reasons(no_inductor: list[Any]) -> None:
    from transformers import BertConfig, BertLMHeadModel

    model = MODELS["llama"]("sdpa")
    half = ec.coreinfer()(shared_copy(model))  # the first of two blocks is before the first share of the depth
    half.compile(backend="effcompile")
    read(half, IDS, new_cache())
    assert reasons(half) == {"outer-layer"}
    assert list(ec.core_neurons(half)) == ["model.layers.1.mlp.down_proj"]
    trained = frozen(model)
    trained(IDS, use_cache=False)
    assert reasons(trained) == {"gradients"}
    block = ec.coreinfer(**ALL)(shared_copy(model)).model.layers[0].mlp
    ec.coreinfer(**ALL)(block)
    block.compile(backend="effcompile")
    with torch.no_grad():
        block(torch.randn(2, 5, 128))
    assert reasons(block) == {"no-text"}
    encoder = BertLMHeadModel(
        BertConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=128)
    )
    seen = frozen(encoder.eval())
    with torch.no_grad():
        seen(IDS)
    assert reasons(seen) == {"text-not-causal"}
    packed = frozen(Packed())
    with torch.no_grad():
        packed(torch.randn(2, 9, 32), torch.tensor([0] * 4 + [1] * 5).expand(2, -1))
    assert reasons(packed) == {"text-packed"}


@pytest.mark.slow
def test_layers_with_one_weight(no_inductor: list[Any]) -> None:
    model = MODELS["llama"]("sdpa")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    fast = frozen(model)
    torch.testing.assert_close(read(fast, IDS, new_cache()), read(model, IDS, new_cache()))
    assert reasons(fast) == {"shared-weight"}


@pytest.mark.slow
def test_weights_that_change_are_refused(no_inductor: list[Any]) -> None:
    fast = frozen(MODELS["llama"]("sdpa"))
    cache = new_cache()
    read(fast, IDS, cache)
    for _ in range(2):  # a cache that grows has another graph for its second step
        read(fast, IDS[:, :1], cache)
    with torch.no_grad():
        fast.model.layers[0].mlp.down_proj.weight[3, 5] += 1
    with pytest.raises(Exception, match="its weights are not those"):
        read(fast, IDS[:, :1], cache)


@pytest.mark.exhaustive
def test_through_inductor() -> None:
    """Generated code keeps the state, in prompts of two lengths and in steps."""
    model = MODELS["llama"]("sdpa")
    fast, plain = frozen(model), shared_copy(model)
    watch = Frozen(plain, "down_proj")
    for length in (33, 20):
        got, expected = (m.generate(IDS[:, :length], **GREEDY) for m in (fast, plain))
        assert_same(got, expected)
        assert neurons(fast) == [core.tolist() for core in watch.core.values()]
    assert forms(fast) == {"coreinfer, 38 neurons chosen", "coreinfer 38 of 96 neurons"}


@pytest.mark.exhaustive
def test_chosen_neurons_matter_for_what_follows(smollm2: tuple[Any, Any], no_inductor: list[Any]) -> None:
    """Those of the prompt lose less on its continuation than as many drawn by chance, and more prompt agrees more."""
    from effcompile import smollm2 as home

    model, tokenizer = smollm2
    text = home.topics(tokenizer)[:, 20_000:20_320]
    fast = ec.coreinfer()(copy.deepcopy(model))
    fast.compile(backend="effcompile")
    middles: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("down_proj"):
            module.register_forward_pre_hook(lambda m, given, name=name: middles.update({name: given[0]}))
    sets = {}
    for length in (64, 128, 256):
        read(fast, text[:, :length], new_cache())
        sets[length] = ec.core_neurons(fast)
    with torch.no_grad():
        model(text, use_cache=False)
    assert len(sets[256]) == 20
    agree = {64: 0.0, 128: 0.0}
    for name, core in sets[256].items():
        after, weight = middles[name][0, 256:], model.get_submodule(name).weight.detach()
        drawn = torch.randperm(1536, generator=torch.Generator().manual_seed(0))[: core.shape[1]]

        def lost(kept: Tensor, after: Tensor = after, weight: Tensor = weight) -> float:
            left = after.clone()
            left[:, kept.long()] = 0
            return float((left @ weight.t()).norm() / (after @ weight.t()).norm())

        assert lost(core[0]) < lost(drawn), name
        for length in agree:
            mine = set(sets[length][name][0].tolist())
            agree[length] += len(mine & set(core[0].tolist())) / len(mine) / 20
    assert agree[64] < agree[128] < 1
