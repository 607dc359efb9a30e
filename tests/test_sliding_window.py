"""``sliding_window`` against transformers' own: the same weights, with the window in the config, and by the pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import effcompile as ec

pytestmark = pytest.mark.usefixtures("no_inductor", "no_fallback")

IDS = torch.randint(0, 60, (2, 301), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[0, :77] = 0
HOW: dict[str, Any] = {
    "attention_mask": MASK, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
    "output_logits": True, "return_dict_in_generate": True,
}  # fmt: skip


def mistral(window: int | None, dtype: torch.dtype = torch.float32) -> MistralForCausalLM:
    """The same weights each time."""
    torch.manual_seed(0)
    config = MistralConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=2,
                           head_dim=32, intermediate_size=64, vocab_size=60, max_position_embeddings=1024,
                           sliding_window=window)  # fmt: skip
    return MistralForCausalLM(config).eval().to(dtype)


@pytest.mark.one_in(3, rest="exhaustive")
@pytest.mark.parametrize("window", [*(pytest.param(w, marks=pytest.mark.slow) for w in (2, 305, 5000)), 100])
def test_generate_is_that_of_a_model_with_the_window_in_its_config(window: int) -> None:
    """Padded prompt and decoding on a cache of ours; 305 is passed while decoding, 5000 never."""
    expected = mistral(window).generate(IDS, **HOW)
    model = mistral(None)
    ec.sparse_attention("sliding_window", window=window)(model)
    ec.compress_kv(key_bits=16, value_bits=16)(model)
    model.compile(backend="effcompile")
    out = model.generate(IDS, **HOW)
    assert torch.equal(out.sequences, expected.sequences)
    for ours, theirs in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    found = [d for d in ec.inspect(model).decisions if d.action == "rewritten"]
    assert len(found) == 2
    assert all(d.form.startswith("sliding_window_attend") and f"_w{window}" in d.form for d in found)
    assert {name.split("_")[1] for d in found for name in d.kernels if name.startswith("attend")} == {
        "prefill", "decode",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("own", "asked", "dtype"), [(None, 33, torch.bfloat16), pytest.param(40, 60, torch.float32, marks=pytest.mark.slow)]
)
def test_a_prompt_needs_no_cache_of_ours_and_the_narrower_window_holds(
    own: int | None, asked: int, dtype: torch.dtype
) -> None:
    ids, window = IDS[:, :157], min(own or asked, asked)
    with torch.no_grad():
        exact = mistral(window, dtype).double()(ids, use_cache=False).logits
        theirs = mistral(window, dtype)(ids, use_cache=False).logits
        model = ec.sliding_window(window=asked)(mistral(own, dtype))
        ours = torch.compile(model, backend="effcompile", dynamic=True)(ids, use_cache=False).logits
    lost = (theirs.double() - exact).abs().max()
    assert (ours.double() - exact).abs().max() <= 2 * lost + torch.finfo(dtype).eps * exact.abs().max()
    assert [d.form.split("_attend")[0] for d in ec.inspect(model).decisions] == ["sliding_window"]


def test_a_step_on_a_cache_of_transformers_is_left_and_told() -> None:
    """Its mask says that one query sees all keys; whether that is causality cannot be seen."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=64, vocab_size=60)  # fmt: skip
    model = ec.sliding_window(window=33)(LlamaForCausalLM(config).eval())
    model.compile(backend="effcompile")
    model.generate(IDS[:, :50], max_new_tokens=2, do_sample=False, pad_token_id=0)
    codes = [d.reason.code if d.reason is not None else "" for d in ec.inspect(model).decisions]
    assert codes[0] == ""
    assert codes[1:] == ["mask-not-honoured"]


@pytest.mark.parametrize("window", [0, -3])
def test_wrong_windows(window: int) -> None:
    with pytest.raises(ec.OptionError, match="at least 1"):
        ec.sliding_window(window=window)
