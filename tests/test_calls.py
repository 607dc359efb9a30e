"""Ways of calling a compiled model: changing shapes, graph breaks, parts compiled alone, autocast, gradients, threads.

Everywhere the limit of the method, 16 bits, is compared with the undecorated eager model.
"""

from __future__ import annotations

import copy
import itertools
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import effcompile as ec
from models import MODELS

IDS = torch.randint(1, 128, (4, 300), generator=torch.Generator().manual_seed(1))
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
CLOSE = {"rtol": 1e-4, "atol": 5e-5}

pytestmark = [
    pytest.mark.filterwarnings("ignore:compress_kv. generate"),
    pytest.mark.usefixtures("no_inductor"),
]


def llama(bits: int | None = None) -> Any:
    """The same weights each time, decorated or not."""
    model = MODELS["llama"]("sdpa")
    return model if bits is None else ec.compress_kv(key_bits=bits, value_bits=bits)(model)


def told(model: nn.Module) -> dict[str, set[str]]:
    """By phase, what became of the sites: the kind of kernel, or the code of the reason."""
    found: dict[str, set[str]] = {}
    for graph in ec.inspect(model).graphs:
        for d in graph.decisions:
            what = d.reason.code if d.reason is not None else "_".join(d.form.split("_")[:2])
            found.setdefault(graph.label, set()).add(what)
    return found


DONE = {"prefill": {"attend_prefill"}, "decode": {"attend_decode"}}


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_dynamic_shapes_from_the_first_call(no_inductor: list[Any]) -> None:
    """dynamic=True: one graph for prompts of any length, one for decoding, and one more each for other batches."""
    model, fast = llama(), llama(16)
    fast.compile(backend="effcompile", dynamic=True)
    for rows, count in ((2, 100), (3, 77), (4, 201)):
        ids = IDS[:rows, :count].contiguous()
        assert torch.equal(fast.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    assert told(fast) == DONE
    # Twice, since the buffers fix the first batch; from the second on it is a symbol.
    assert len(no_inductor) == 4


def test_a_length_marked_dynamic(no_inductor: list[Any]) -> None:
    """mark_dynamic fails where a graph would fix the dimension."""
    model, fast = llama(), llama(16)
    fast.compile(backend="effcompile")
    with torch.no_grad():
        for count in (100, 77):
            ids = IDS[:2, :count].contiguous()
            torch._dynamo.mark_dynamic(ids, 1)
            torch.testing.assert_close(fast(ids).logits, model(ids).logits, **CLOSE)
    assert told(fast) == {"prefill": {"attend_prefill"}}
    assert len(no_inductor) == 1


@pytest.mark.slow
def test_a_batch_marked_dynamic(no_inductor: list[Any]) -> None:
    """A cache has buffers of one batch, so torch refuses the demand; the wish, maybe_mark_dynamic, is taken."""
    model, fast = llama(), llama(16)
    fast.compile(backend="effcompile")
    with torch.no_grad():
        for rows in (2, 3, 4):
            ids = IDS[:rows, :100].contiguous()
            torch._dynamo.maybe_mark_dynamic(ids, 0)
            torch.testing.assert_close(fast(ids).logits, model(ids).logits, **CLOSE)
        assert len(no_inductor) == 2
        torch._dynamo.reset()
        torch._dynamo.mark_dynamic(ids, 0)
        with pytest.raises(Exception, match=r"marked .* as dynamic but your code specialized it"):
            fast(ids)


# --- breaks -----------------------------------------------------------------------------------------------------------


def _break(module: nn.Module, args: Any, kwargs: Any) -> None:
    torch._dynamo.graph_break()


def _print(module: nn.Module, args: Any, kwargs: Any) -> None:
    print("layer")


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hook", [_break, pytest.param(_print, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["model.layers.1", "model.layers.1.self_attn", "model.layers.0.mlp", "lm_head"])
def test_a_graph_break_in_the_middle(where: str, hook: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    model, fast = llama(), llama(16)
    fast.get_submodule(where).register_forward_pre_hook(hook, with_kwargs=True)
    expected = model.generate(IDS[:, :90], **GREEDY)
    fast.compile(backend="effcompile")
    assert torch.equal(fast.generate(IDS[:, :90], **GREEDY), expected)
    # In a graph of a layer alone the mask is an input, about which nothing can be proved.
    assert told(fast) == DONE | ({} if where == "lm_head" else {"decode": {"mask-unknown"}})
    found = ec.inspect(fast).decisions
    assert {d.module for d in found} == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert {d.rule for d in found} == {"decorator on LlamaForCausalLM"}
    assert hook is _break or capsys.readouterr().out == "layer\n" * 8


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("part", ["layer", "self_attn"])
@pytest.mark.parametrize("padded", [False, True])
def test_each_layer_or_its_attention_compiled_alone(part: str, padded: bool) -> None:
    model, fast = llama(), llama(16)
    mask = torch.ones_like(IDS[:, :90])
    mask[0, : 17 if padded else 0] = 0
    expected = model.generate(IDS[:, :90], attention_mask=mask, **GREEDY)
    for layer in fast.model.layers:
        (layer if part == "layer" else layer.self_attn).compile(backend="effcompile")
    assert torch.equal(fast.generate(IDS[:, :90], attention_mask=mask, **GREEDY), expected)
    # A layer gets its mask ready-made, and about an input nothing can be proved.
    assert told(fast) == {"prefill": {"mask-unknown" if padded else "attend_prefill"}, "decode": {"mask-unknown"}}
    assert {d.rule for d in ec.inspect(fast).decisions} == {"decorator on LlamaForCausalLM"}


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize("bits", [16, 4])
def test_one_cache_in_inference_mode_and_under_no_grad(bits: int) -> None:
    model, fast = llama(bits), llama(bits)
    fast.compile(backend="effcompile")
    modes = [torch.inference_mode, torch.no_grad]
    for first, second in (modes, modes[::-1]):
        caches: list[Any] = [None, None]
        for step, mode in enumerate([first, second, second, first]):
            ids = IDS[:, :100] if step == 0 else IDS[:, 99 + step : 100 + step]
            with mode():
                out = [m(ids, past_key_values=cache) for m, cache in zip((model, fast), caches)]
            caches = [o.past_key_values for o in out]
            torch.testing.assert_close(out[1].logits.clone(), out[0].logits.clone(), **CLOSE)
    assert told(fast) == DONE


def test_autocast_on_one_cache() -> None:
    model, fast = llama(), llama(16)
    fast.compile(backend="effcompile")
    plain = compressed = None
    with torch.no_grad():
        for step, ids in enumerate((IDS[:, :100], IDS[:, 100:101], IDS[:, 101:102], IDS[:, 102:103])):
            with torch.autocast("cpu", torch.bfloat16, enabled=step < 3):
                expected = model(ids, past_key_values=plain)
                got = fast(ids, past_key_values=compressed)
            plain, compressed = expected.past_key_values, got.past_key_values
            assert got.logits.dtype == expected.logits.dtype
            torch.testing.assert_close(got.logits, expected.logits, rtol=2e-2, atol=2e-2)
    # Without autocast, the same cache is read by the kernel again.
    assert told(fast) == {"prefill": {"mixed-dtypes"}, "decode": {"mixed-dtypes", "attend_decode"}}
    for d in ec.inspect(fast).decisions:
        if d.reason is not None:
            assert "autocast" in d.reason.text
            assert {"torch.float32", "torch.bfloat16"} <= set(re.findall(r"torch\.\w+", d.reason.text))


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_a_decorated_model(compiled: bool, checkpointing: bool) -> None:
    model, fast = llama(), llama(4)
    ids = IDS[:, :50]
    for one in (model, fast):
        one.train()
        if checkpointing:
            one.gradient_checkpointing_enable()
    if compiled:
        fast.compile(backend="effcompile")
    losses = [one(ids, labels=ids).loss for one in (model, fast)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for (name, a), (_, b) in zip(model.named_parameters(), fast.named_parameters()):
        assert a.grad is not None
        assert a.grad.abs().max() > 0
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=name)
    fast.eval()
    # And afterwards it generates on the compressed cache.
    with torch.no_grad():
        assert isinstance(fast(ids).past_key_values, ec.Cache)


# --- several ----------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_two_models_at_once() -> None:
    """Another architecture, and the same class with other forms: calls in turn, each equal to itself alone."""
    models = [
        llama(16),
        ec.compress_kv(key_bits=8, value_bits=8)(MODELS["qwen2"]("sdpa")),
        llama(4),
        llama(8),
    ]
    eager = copy.deepcopy(models)
    for model in models:
        model.compile(backend="effcompile")
    prompts = [IDS[:2, :80], IDS[:2, :90], IDS[:2, :200], IDS[:2, :150]]
    caches: list[list[Any]] = [[None] * 4, [None] * 4]
    with torch.no_grad():
        for step, (n, prompt) in itertools.product(range(4), enumerate(prompts)):
            ids = prompt if step == 0 else IDS[:2, 200 + step : 201 + step]
            out = [side[n](ids, past_key_values=cache[n]) for side, cache in zip((models, eager), caches)]
            for cache, one in zip(caches, out):
                cache[n] = one.past_key_values
            torch.testing.assert_close(out[0].logits, out[1].logits, **CLOSE)
    for model, bits in zip(models, (16, 8, 4, 8)):
        found = ec.inspect(model)
        assert told(model) == DONE
        forms = {d.form.split("_")[2] for g in found.graphs if g.label == "decode" for d in g.decisions}
        assert len(forms) == 1
        assert forms.pop().startswith(f"k{bits}v{bits}")


def _in_threads(*work: Callable[[], Any]) -> list[Any]:
    """What each returns, all started together; raises what one of them raised."""
    start, results = threading.Barrier(len(work)), [None] * len(work)

    def run(index: int) -> None:
        try:
            start.wait(60)
            results[index] = work[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize("warm", [True, False])
def test_threads_on_two_models(warm: bool) -> None:
    models = [llama(16), ec.compress_kv(key_bits=8, value_bits=8)(MODELS["qwen2"]("sdpa"))]
    prompts = [IDS[:2, :80], IDS[:2, :90]]
    expected = [copy.deepcopy(m).generate(p, **GREEDY) for m, p in zip(models, prompts)]
    for model, prompt in zip(models, prompts):
        model.compile(backend="effcompile")
        if warm:
            model.generate(prompt, **GREEDY)
    for _ in range(3):
        got = _in_threads(*(lambda m=m, p=p: m.generate(p, **GREEDY) for m, p in zip(models, prompts)))
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize("bits", [16, 4])
def test_threads_on_one_model_with_two_caches(bits: int) -> None:
    model = llama(bits)
    prompts = [IDS[:2, :80], IDS[2:, :80], IDS[:2, :200]]
    expected = [copy.deepcopy(model).generate(p, **GREEDY) for p in prompts]
    model.compile(backend="effcompile")
    model.generate(prompts[0], **GREEDY)
    for _ in range(3):
        got = _in_threads(
            *(
                lambda p=p: model.generate(
                    p, past_key_values=ec.Cache(model, 512, key_bits=bits, value_bits=bits), **GREEDY
                )
                for p in prompts
            )
        )
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


# --- what is written --------------------------------------------------------------------------------------------------


def test_nothing_of_us_in_what_is_saved(tmp_path: Path) -> None:
    model, fast = llama(), llama(4)
    fast.compile(backend="effcompile")
    fast.generate(IDS[:, :50], **GREEDY)
    assert list(fast.state_dict()) == list(model.state_dict())
    model.load_state_dict(fast.state_dict())
    assert fast.config.to_dict() == model.config.to_dict()
    assert fast.generation_config.to_dict() == model.generation_config.to_dict()
    for name, one in (("plain", model), ("fast", fast)):
        one.save_pretrained(tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "fast").iterdir())
    assert any(name.endswith(".safetensors") for name in files)
    for name in files:
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    again = type(model).from_pretrained(tmp_path / "fast").eval()
    assert ec.options_of(again) == {}
    assert torch.equal(again.generate(IDS[:, :50], **GREEDY), model.generate(IDS[:, :50], **GREEDY))
