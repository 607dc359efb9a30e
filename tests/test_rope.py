"""Keys before RoPE: rotating back and forth, and what a model's rotation is."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import effcompile as ec
from effcompile.kernels import ops, quantize, rope
from effcompile.kernels.form import FormError, KVForm
from effcompile.runtime import rope as learning
from effcompile.runtime.cache import CacheError
from effcompile.runtime.rope import Learned, learn
from models import GQA, MODELS, _hf

IDS = torch.randint(1, 128, (2, 300), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
PRE = {"key_bits": 2, "value_bits": 2, "residual": 32, "rope": "pre"}
FOUR = {**GQA, "num_hidden_layers": 4}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
MORE = {
    "cohere": _hf("Cohere", **GQA),
    "glm": _hf("Glm", **GQA, head_dim=32, pad_token_id=0),
    "gpt_oss": _hf("GptOss", **GQA, head_dim=32, num_local_experts=2, num_experts_per_tok=1, sliding_window=16),
    "smollm3": _hf("SmolLM3", **FOUR, pad_token_id=0),
    "yarn": _hf("Llama", **GQA, rope_parameters=YARN),
    "gptj": _hf("GPTJ", n_embd=128, n_layer=2, n_head=4, n_positions=2048, vocab_size=128, rotary_dim=16),
    "bloom": _hf("Bloom", hidden_size=128, n_layer=2, n_head=4, vocab_size=128),
}


pytestmark = pytest.mark.filterwarnings("ignore:compress_kv. generate")


def model_of(name):
    return (MODELS | MORE)[name]("sdpa" if name not in ("gpt_oss", "bloom", "gptj") else "eager")


# --- reference bodies -------------------------------------------------------------------------------------------------


def random_angles(batch, tokens, half, seed, scale=1.0):
    angle = 40 * torch.rand(batch, tokens, half, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * angle.cos(), scale * angle.sin()


def filled(form, rotary, tokens, scale, batch=2, capacity=512, seed=0):
    """A table with random angles in its first rows and NaN behind, and the angles as the table rounds them."""
    cos, sin = (x.float() for x in random_angles(batch, tokens, rotary // 2, seed, scale))
    table = torch.full(rope.table_shape(batch, capacity, rotary), float("nan"), dtype=torch.float16)
    torch.ops.effcompile.rope_store(table, torch.tensor(0), cos, sin)
    return table, cos.half(), sin.half()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 16), st.integers(0, 7), st.sampled_from(["pre", "pre_adjacent"]), st.floats(0.25, 4.0),
    st.integers(0, 2**31),
)  # fmt: skip
def test_rotating_back_is_the_inverse(half, rest, kind, scale, seed):
    """In fp64, for angles of any length that is not 0, and for channels that are not rotated."""
    cos, sin = random_angles(2, 9, half, seed, scale)
    cos, sin = cos[:, None].half().double(), sin[:, None].half().double()
    x = torch.randn(2, 3, 9, 2 * half + rest, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    there = rope.rotate(x, cos, sin, kind)
    torch.testing.assert_close(rope.unrotate(there, cos, sin, kind), x, rtol=0, atol=1e-12)
    assert torch.equal(there[..., 2 * half :], x[..., 2 * half :])
    # Two products, a sum and a division, each rounded, in fp32.
    single = rope.unrotate(there.float(), cos.float(), sin.float(), kind).double()
    bound = 8 * torch.finfo(torch.float32).eps * float(there.abs().max()) / float((cos**2 + sin**2).min().sqrt())
    assert float((single - x).abs().max()) <= bound


@pytest.mark.parametrize(("kind", "how"), [("pre", "llama"), ("pre_adjacent", "cohere")])
def test_rotation_is_that_of_transformers(kind, how):
    module = getattr(transformers.models, how)
    turn = getattr(module, f"modeling_{how}").apply_rotary_pos_emb
    cos, sin = random_angles(2, 9, 16, 0)
    wide = [torch.cat([x, x], -1) if kind == "pre" else x.repeat_interleave(2, -1) for x in (cos, sin)]
    x = torch.randn(2, 3, 9, 32, dtype=torch.float64)
    _, expected = turn(x, x, *wide)
    torch.testing.assert_close(rope.rotate(x, cos[:, None], sin[:, None], kind), expected.double(), rtol=0, atol=1e-6)


FORMS = [
    (KVForm(2, 2, 32, 32, rope="pre"), 64),
    (KVForm(3, 4, 16, 0, rope="pre"), 20),
    (KVForm(4, 16, 32, 64, rope="pre_adjacent"), 64),
    (KVForm(8, 3, 64, 0, rope="pre_adjacent"), 30),
]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=6), st.sampled_from(FORMS), st.sampled_from([1.0, 1.3]),
    st.integers(0, 2**31),
)  # fmt: skip
def test_store_equals_plain_model_whatever_the_chunks(chunks, form_and_rotary, scale, seed):
    """The plain model: all keys in a list, each rotated back by its own token's angles, quantised by the definition."""
    form, rotary = form_and_rotary
    total, half, g = sum(chunks), rotary // 2, form.group
    torch.manual_seed(seed)
    key, value = torch.randn(2, 2, total, 64), torch.randn(2, 2, total, 64)
    state = []
    for kind in ("key", "value"):
        made = [torch.zeros(s, dtype=d) for s, d in form.buffers(kind, 2, 2, 1024, 64, torch.float32)]
        state += made + [None] * (3 - len(made))
    table = torch.full(rope.table_shape(2, 1024, rotary), float("nan"), dtype=torch.float16)
    cos, sin = (x.float() for x in random_angles(2, total, half, seed, scale))
    with ops.reference_only():
        at = 0
        for count in chunks:
            here, new = torch.tensor(at), slice(at, at + count)
            torch.ops.effcompile.rope_store(table, here, cos[:, new], sin[:, new])
            pair = key[:, :, new], value[:, :, new]
            torch.ops.effcompile.kv_store(*state, here, *pair, form.name, table=table)
            at += count
        loaded, values = torch.ops.effcompile.kv_load(*state, torch.tensor(total), form.name, table=table)
    c, s = (x.half().float()[:, None] for x in (cos, sin))
    if form.rope == "pre":
        a, b = torch.arange(half), torch.arange(half) + half
    else:
        a, b = 2 * torch.arange(half), 2 * torch.arange(half) + 1
    plain = key.clone()
    plain[..., a] = (key[..., a] * c + key[..., b] * s) / (c * c + s * s)
    plain[..., b] = (key[..., b] * c - key[..., a] * s) / (c * c + s * s)
    expected, stop = key.clone(), form.packed(total)
    if stop:
        q = quantize.quantize(plain[:, :, :stop].unflatten(2, (-1, g)), form.key_bits, 3)
        back = quantize.dequantize(*q).flatten(2, 3)
        expected[:, :, :stop] = back
        c, s = c[:, :, :stop], s[:, :, :stop]
        expected[:, :, :stop, a] = back[..., a] * c - back[..., b] * s
        expected[:, :, :stop, b] = back[..., b] * c + back[..., a] * s
    assert torch.equal(loaded[:, :, :total], expected)
    assert not loaded[:, :, total:].any()
    assert values.shape == loaded.shape


def test_what_it_is_for():
    """Channels of keys that are large before RoPE: after it they are large in waves, and no scale of a group fits."""
    table, cos, sin = filled(KVForm(), 64, 512, 1.0)
    base = 20 * torch.randn(1, 2, 1, 64) + torch.randn(2, 2, 512, 64)
    key = rope.rotate(base, cos[:, None].float(), sin[:, None].float(), "pre")
    lost = {}
    for how in ("post", "pre"):
        form = KVForm(2, 16, 32, 0, rope=how)
        state = [torch.zeros(s, dtype=d) for s, d in form.buffers("key", 2, 2, 512, 64, torch.float32)]
        given_table = table if how == "pre" else None
        quantize.store_side(state, 0, key, form, "key", given_table)
        lost[how] = float((quantize.load_side(state, 512, form, "key", given_table) - key).square().mean())
    assert lost["pre"] < lost["post"] / 50


def test_tokens_past_the_capacity():
    table, cos, sin = filled(KVForm(), 32, 500, 1.0)
    before = table.clone()
    with pytest.raises(ops.CapacityError, match="512"):
        torch.ops.effcompile.rope_store(table, torch.tensor(500), cos[:, :13].float(), sin[:, :13].float())
    assert torch.equal(table.view(torch.int16), before.view(torch.int16))
    # Where nothing is read back to the host, they are dropped.
    rope.write(table, torch.tensor(500), cos[:, :40].float(), sin[:, :40].float())
    assert torch.equal(rope.angles(table, 496, 512)[0][:, 0, 4:], cos[:, :12].float())
    assert torch.equal(rope.angles(table, 0, 496)[0], rope.angles(before, 0, 496)[0])
    before = table.clone()
    rope.write(table, torch.tensor(512), cos[:, :40].float(), sin[:, :40].float())
    assert torch.equal(table, before)


def test_opcheck():
    form, rotary = FORMS[0]
    table, cos, sin = filled(form, rotary, 512, 1.0)
    state = []
    for kind in ("key", "value"):
        state += [torch.zeros(s, dtype=d) for s, d in form.buffers(kind, 2, 2, 512, 64, torch.float32)]
    key = torch.randn(2, 2, 150, 64)
    here = torch.tensor(0)
    with torch.no_grad():
        torch.library.opcheck(torch.ops.effcompile.rope_store, (table, here, cos[:1, :5].float(), sin[:1, :5].float()))
        torch.library.opcheck(torch.ops.effcompile.kv_store, (*state, here, key, key, form.name), {"table": table})
        torch.ops.effcompile.kv_store(*state, here, key, key, form.name, table=table)
        here = torch.tensor(150)
        torch.library.opcheck(torch.ops.effcompile.kv_load, (*state, here, form.name), {"table": table})
        args = (torch.randn(2, 6, 3, 64), *state, here, None, form.name, 0.125, True, -1)
        torch.library.opcheck(torch.ops.effcompile.attend, args, {"table": table})
        with ops.reference_only():
            with pytest.raises(ValueError, match="needs a table of angles"):
                torch.ops.effcompile.kv_load(*state, here, form.name)
            with pytest.raises(ValueError, match="takes no table of angles"):
                torch.ops.effcompile.kv_load(*state, here, form.name.removesuffix("pre"), table=table)


def test_names_and_forms():
    for how in ("post", "pre", "pre_adjacent"):
        form = KVForm(3, 2, 64, 128, rope=how)
        assert KVForm.parse(form.name) == form
    assert KVForm(2, 2, rope="pre").name == "k2v2g32r128pre"
    assert KVForm().name == "k4v4g32r128"
    with pytest.raises(FormError, match="key_bits=16 does not quantise them"):
        KVForm(16, 4, rope="pre")
    with pytest.raises(FormError, match="choose 'post' or 'pre'"):
        KVForm(4, 4, rope="before")
    with pytest.raises(ec.OptionError, match="rope='before'"):
        ec.compress_kv(rope="before")(model_of("llama"))


# --- what a model does ------------------------------------------------------------------------------------------------

HALF, WHOLE = ("pre", 32, 32, 1), ("pre_adjacent", 32, 32, 2)
NONE = ("post", 0, 0, 1)
ROTATIONS = {
    "llama": [HALF] * 2,
    "qwen3": [("pre", 64, 64, 1)] * 2,
    "phi3": [HALF] * 2,
    "neox": [("pre", 8, 8, 1)] * 2,
    "cohere": [WHOLE] * 2,
    "glm": [("pre_adjacent", 16, 16, 1)] * 2,
    "gpt_oss": [("pre", 32, 16, 1)] * 2,
    "smollm3": [*[HALF] * 3, NONE],
    "yarn": [HALF] * 2,
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_what_a_model_does_is_found_by_trying(name):
    model = model_of(name)
    random = torch.get_rng_state()
    found = learn(model, list(range(len(ROTATIONS[name]))))
    assert [(f.rope, f.rotary, f.width, f.step) for f in found.values()] == ROTATIONS[name]
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("name", "words"),
    [("gpt2", "attn is not given position_embeddings"), ("gptj", "is not given"), ("bloom", "self_attention is not")],
)
def test_models_that_hand_on_no_angles_are_refused(name, words):
    with pytest.raises(CacheError, match=words) as error:
        ec.Cache(model_of(name), **PRE)
    assert "layer 0" in str(error.value)
    assert "rope='post'" in str(error.value)
    model = ec.compress_kv(**PRE)(model_of(name))
    with pytest.raises(CacheError, match=words):
        model.generate(IDS, **GREEDY)


def test_a_rotation_that_is_not_what_cos_and_sin_say_is_refused():
    model = model_of("llama")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def backwards(hidden_states, position_embeddings=None, **kwargs):
        cos, sin = position_embeddings
        return forward(hidden_states, position_embeddings=(cos, -sin), **kwargs)

    attention.forward = backwards
    with pytest.raises(CacheError, match=r"layer 1: .* model.layers.1.self_attn does with cos and sin is no rotation"):
        ec.Cache(model, **PRE)


def test_layers_with_other_angles_are_refused():
    """They may be equal numbers today: one table holds them only if they are the same tensors."""
    model = model_of("llama")
    layer = model.model.layers[1]
    forward = layer.forward

    def other(hidden_states, position_embeddings=None, **kwargs):
        return forward(hidden_states, position_embeddings=tuple(x.clone() for x in position_embeddings), **kwargs)

    layer.forward = other
    with pytest.raises(CacheError, match="layers 0 and 1 rotate their keys by other angles"):
        ec.Cache(model, **PRE)
    # The user's way out: that layer after RoPE.
    ec.compress_kv(**PRE | {"rope": "post"})(layer.self_attn)
    cache = ec.Cache(model, **PRE)
    assert [each.form.rope for each in cache.compressed] == ["pre", "post"]


def test_angles_of_three_kinds_are_refused():
    """Of time, height and width (M-RoPE), for example: attention chooses among them."""
    model = model_of("llama")
    layer = model.model.layers[1]
    forward = layer.forward

    def other(hidden_states, position_embeddings=None, **kwargs):
        return forward(hidden_states, position_embeddings=tuple(torch.stack([x] * 3) for x in position_embeddings))

    layer.forward = other
    with pytest.raises(CacheError, match=r"layer 1: .* of shapes \(3, 1, 8, 32\)"):
        ec.Cache(model, **PRE)


def test_layers_without_rope_have_nothing_to_undo():
    model = ec.compress_kv(**PRE)(model_of("smollm3"))
    with torch.no_grad():
        cache = model(IDS).past_key_values
    assert [layer.form.rope for layer in cache.compressed] == ["pre"] * 3 + ["post"]
    with torch.no_grad():
        model(IDS[:, :9], past_key_values=cache)


def test_a_model_is_tried_once_and_again_with_other_attentions(monkeypatch):
    tries, once = [], learning._try
    monkeypatch.setattr(learning, "_try", lambda *args: tries.append(args) or once(*args))
    model = model_of("llama")
    assert learn(model, [0, 1]) == {i: Learned("pre", 32, 32, 1, 0) for i in (0, 1)}
    assert learn(model, [1]) == {1: Learned("pre", 32, 32, 1, 0)}
    assert len(tries) == 1
    model.model.layers[1].self_attn = copy.deepcopy(model.model.layers[0].self_attn)
    model.model.layers[1].self_attn.layer_idx = 1
    learn(model, [0, 1])
    assert len(tries) == 2
