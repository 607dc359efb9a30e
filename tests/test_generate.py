"""Ways of ``generate`` beside plain greedy decoding: assistants, prompt lookup, streaming, sampling, padded batches."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers
from transformers.generation.streamers import BaseStreamer

import effcompile as ec
from effcompile.runtime.cache import CacheError
from models import MODELS

IDS = torch.randint(1, 128, (2, 300), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def llama():
    return MODELS["llama"]("sdpa")


pytestmark = pytest.mark.filterwarnings("ignore:compress_kv. generate")


def compressed(model, bits, residual=128):
    return ec.compress_kv(key_bits=bits, value_bits=bits, residual=residual)(copy.deepcopy(model))


def assistant_of(model):
    """A model that often, and not always, proposes what ``model`` would say."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn(other.lm_head.weight.shape) * 0.06)
    return other


def loaded(cache):
    return [
        x
        for layer in cache.compressed
        for x in torch.ops.effcompile.kv_load(*layer.state, cache.length, layer.form_name)
    ]


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("way", ["assistant", "compressed assistant", "lookup"])
def test_assisted_generation_at_sixteen_bits(llama, way, compiled, no_inductor):
    prompt = IDS[:1, :50].repeat(1, 2)
    expected = llama.generate(prompt, **GREEDY)
    fast = compressed(llama, 16)
    if compiled:
        fast.compile(backend="effcompile")
    if way == "lookup":
        how = {"prompt_lookup_num_tokens": 3}
    else:
        how = {"assistant_model": compressed(assistant_of(llama), 16) if "comp" in way else assistant_of(llama)}
    assert torch.equal(fast.generate(prompt, **how, **GREEDY), expected)


@pytest.mark.parametrize("residual", [0, 32])
@pytest.mark.parametrize("count", [20, 150, 300])
def test_assisted_generation_leaves_packed_bits_as_if_nothing_had_been_proposed(llama, count, residual, monkeypatch):
    """Proposals come and go, also over the edges of groups: the store is that of the accepted tokens alone.

    Their keys depend on which groups were packed when they came, so they are noted as the model makes them.
    """
    removed, crop = [], ec.Cache.crop
    fast, helper = compressed(llama, 4, residual), compressed(assistant_of(llama), 4, residual)
    made: list[torch.Tensor] = []
    update = ec.Cache.update

    def noting(self, key, value, index, *args, **kwargs):
        if self.belongs_to(fast) and index == 0:
            made.append(key)
        return update(self, key, value, index, *args, **kwargs)

    def cropping(self, tokens):
        if self.belongs_to(fast):
            removed.append(-int(tokens))
            if tokens:
                made[:] = [torch.cat(made, 2)[:, :, : int(tokens)]]
        crop(self, tokens)

    monkeypatch.setattr(ec.Cache, "update", noting)
    monkeypatch.setattr(ec.Cache, "crop", cropping)
    out = fast.generate(IDS[:1, :count], assistant_model=helper, return_dict_in_generate=True, **GREEDY)
    cache = out.past_key_values
    assert sum(removed) > 3, "nothing was proposed in vain, so nothing was tested"
    assert cache.tokens == out.sequences.shape[1] - 1
    keys = torch.cat(made, 2)
    assert keys.shape[2] == cache.tokens
    afresh = ec.Cache(fast, 512)
    for part in keys.split([7, keys.shape[2] - 7], dim=2):
        for index in range(2):
            afresh.update(part, part, index)
    assert torch.equal(loaded(cache)[0], loaded(afresh)[0])


def test_recording_reaches_back_over_packed_groups(llama):
    """Long calls, short ones and many of them: what is removed was never there. What is noted is counted in bytes."""
    for residual in (0, 32):
        options = {"key_bits": 4, "value_bits": 8, "residual": residual}
        keys = torch.randn(1, 2, 480, 32)
        for chunks, count in (([200], 60), ([400], 230), ([400], 257), ([40] * 8, 150), ([150, 1, 1, 130, 30], 200)):
            cache, afresh = ec.Cache(llama, 512, **options), ec.Cache(llama, 512, **options)
            cache.activate_past_recording()
            plain = cache.nbytes
            at = 0
            for size in chunks:
                fill(cache, keys[:, :, at : at + size])
                at += size
            assert cache.nbytes > plain or at <= residual
            if count > cache.removable:
                assert cache.removable >= 256
                with pytest.raises(CacheError, match=r"activate_past_recording\(\)"):
                    cache.crop(-count)
                continue
            cache.crop(-count)
            fill(afresh, keys[:, :, : at - count])
            for each in (cache, afresh):
                fill(each, keys[:, :, at : at + 50] - 1)
            assert all(torch.equal(a, b) for a, b in zip(loaded(cache), loaded(afresh)))


def fill(cache, keys):
    """Append ``[B, G, T, D]`` to every layer as a call of a model would."""
    cache.prepare(keys.shape[0], keys.shape[2], keys.dtype)
    for index in range(len(cache.layers)):
        cache.update(keys, keys + index, index)


def test_what_was_recorded_of_other_tokens_is_not_used(llama):
    """Rows changed, or tokens that no hook announced: then only the plain rule holds."""
    keys = torch.randn(2, 2, 200, 32)
    changes = {
        "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        "repeat": lambda cache: cache.batch_repeat_interleave(2),
        "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
        "unannounced": lambda cache: [cache.update(keys[:, :, :1], keys[:, :, :1], index) for index in range(2)],
    }
    for change in changes.values():
        cache = ec.Cache(llama, 512)
        cache.activate_past_recording()
        fill(cache, keys)
        assert cache.removable == 200
        change(cache)
        assert cache.removable == (cache.tokens - 128) % 32
        with pytest.raises(CacheError, match="packed groups"):
            cache.crop(-100)


def test_a_sliding_window_refuses_assistants_before_anything_is_generated():
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, use_sliding_window=True, sliding_window=64, max_window_layers=1,
    )  # fmt: skip
    model = compressed(transformers.Qwen2ForCausalLM(config).eval(), 16)
    for how in ({"prompt_lookup_num_tokens": 3}, {"past_key_values": ec.Cache(model, 512), "assistant_model": model}):
        with pytest.raises(CacheError, match=r"assisted generation removes tokens .* layers \[1\] keep"):
            model.generate(IDS[:1], **how, **GREEDY)
    plain = copy.deepcopy(model)
    ec.remove(plain)
    with pytest.raises(CacheError, match="assisted generation"):
        plain.generate(IDS[:1], assistant_model=model, **GREEDY)


class Tokens(BaseStreamer):
    """Collects what is streamed."""

    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("bits", [16, 4])
def test_streamed_tokens_are_those_of_the_result(llama, bits, no_inductor):
    fast = compressed(llama, bits)
    fast.compile(backend="effcompile")
    streamer = Tokens()
    out = fast.generate(IDS[:1], streamer=streamer, **GREEDY)
    assert streamer.ended
    assert streamer.seen == out[0].tolist()
    if bits == 16:
        assert torch.equal(out, llama.generate(IDS[:1], **GREEDY))


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids, **kwargs):
        return "".join(chr(0x100 + int(i)) for i in ids)


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize("bits", [16, 4])
def test_text_streamed_from_a_thread(llama, bits, no_inductor):
    """TextIteratorStreamer: generate runs in a thread of its own, and the caller reads what comes."""
    fast = compressed(llama, bits)
    expected = fast.generate(IDS[:1], **GREEDY)
    fast.compile(backend="effcompile")
    for _ in range(2):
        streamer = transformers.TextIteratorStreamer(Letters(), skip_prompt=True, timeout=120)
        thread = threading.Thread(target=fast.generate, args=(IDS[:1],), kwargs={"streamer": streamer, **GREEDY})
        thread.start()
        text = "".join(streamer)
        thread.join(60)
        assert text == Letters().decode(expected[0, 300:])


@pytest.mark.one_in(2, rest="exhaustive")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_prompt_lookup_on_packed_groups(llama, compiled, monkeypatch, no_inductor):
    """Proposals from the prompt come and go over the edges of groups; the length is that of the accepted tokens."""
    removed, crop = [], ec.Cache.crop
    monkeypatch.setattr(ec.Cache, "crop", lambda self, n: (removed.append(-int(n)), crop(self, n))[1])
    # Repetition, so that there is something to look up.
    prompt = IDS[:1, :50].repeat(1, 4)
    fast = compressed(llama, 8, residual=32)
    expected = fast.generate(prompt, **{**GREEDY, "max_new_tokens": 80})
    if compiled:
        fast.compile(backend="effcompile")
    how = {**GREEDY, "max_new_tokens": 80, "prompt_lookup_num_tokens": 5, "return_dict_in_generate": True}
    out = fast.generate(prompt, **how)
    assert sum(removed) > 3, "nothing was proposed in vain, so nothing was tested"
    assert out.past_key_values.tokens == out.sequences.shape[1] - 1
    # At 8 bits no two tokens of this model are nearly as likely, so they are those of plain decoding.
    assert torch.equal(out.sequences, expected)


@pytest.mark.parametrize("asked", [False, True])
def test_recording_on_a_users_cache_ends_with_the_generation(llama, asked):
    """It costs a copy of what each token takes over; what the user asked for stays."""
    cache = ec.Cache(llama, 512, residual=32)
    prompt = IDS[:1, :50].repeat(1, 4)
    with torch.no_grad():
        llama(prompt[:, :-1], past_key_values=cache)
    if asked:
        cache.activate_past_recording()
    plain = cache.nbytes
    llama.generate(prompt, past_key_values=cache, prompt_lookup_num_tokens=3, **GREEDY)
    assert all(layer.record_past == asked for layer in cache.compressed)
    assert (cache.nbytes > plain) == asked
    with torch.no_grad():
        llama(IDS[:1, :1], past_key_values=cache)
    assert (cache.nbytes > plain) == asked


@pytest.mark.slow
def test_sampling_with_a_seed_is_that_of_the_eager_model(llama, no_inductor):
    sampled = {"max_new_tokens": 10, "do_sample": True, "temperature": 1.3, "top_k": 40, "pad_token_id": 0}
    outs = []
    for model, compiled in ((llama, False), (compressed(llama, 16), False), (compressed(llama, 16), True)):
        if compiled:
            model.compile(backend="effcompile")
        torch.manual_seed(7)
        outs.append(model.generate(IDS, num_return_sequences=2, **sampled))
    assert torch.equal(outs[1], outs[0])
    assert torch.equal(outs[2], outs[0])
    # At few bits compiled and eager mean the same, so the same dice fall the same way.
    packed = []
    for compiled in (False, True):
        model = compressed(llama, 4)
        if compiled:
            model.compile(backend="effcompile")
        torch.manual_seed(7)
        packed.append(model.generate(IDS, **sampled))
    assert torch.equal(*packed)


@pytest.mark.parametrize(("name", "compiled"), [("llama", True), ("gpt2", False)])
def test_rows_of_a_padded_batch_are_those_of_single_prompts(name, compiled, no_inductor):
    """Left padding of any amount, into groups that were packed with it; 16 bits, where each row stands alone."""
    model = MODELS[name]("sdpa")
    lengths = [1, 63, 170, 200]
    ids, mask = torch.zeros(4, 200, dtype=torch.long), torch.zeros(4, 200, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 200 - length :] = IDS[row % 2, :length]
        mask[row, 200 - length :] = 1
    # No end of text: every row has all of its tokens to compare.
    keep = {
        **GREEDY,
        "max_new_tokens": 10,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    fast = compressed(model, 16)
    if compiled:
        fast.compile(backend="effcompile")
    out = fast.generate(ids, attention_mask=mask, **keep)
    for row, length in enumerate(lengths):
        single = model.generate(IDS[row % 2 : row % 2 + 1, :length], **keep)
        assert torch.equal(out.sequences[row, 200:], single.sequences[0, length:])
        for a, b in zip(out.logits, single.logits):
            torch.testing.assert_close(a[row], b[0], rtol=1e-4, atol=5e-5)


def test_a_pipeline_with_a_tokenizer_made_here(llama, no_inductor):
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(127)} | {"<pad>": 127}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", padding_side="left")
    texts = [" ".join(f"w{int(i) % 127}" for i in IDS[row, :count]) for row, count in ((0, 40), (1, 60))]

    def texts_of(model):
        run = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        made = run(texts, batch_size=2, do_sample=False, max_new_tokens=12)
        return [one[0]["generated_text"] for one in made]

    expected = texts_of(llama)
    fast = compressed(llama, 16)
    fast.compile(backend="effcompile")
    assert texts_of(fast) == expected
    assert ec.inspect(fast).sites
