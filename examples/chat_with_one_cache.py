"""Several turns on one compressed cache: what was read stays packed, and each turn reads only what is new.

python examples/chat_with_one_cache.py
"""

import torch

import effcompile as ec
from effcompile import smollm2

model, tokenizer = smollm2.load()
cache = ec.Cache(model, capacity=2048, key_bits=8, value_bits=4)
model.compile(backend="effcompile")

# The tokens themselves are carried on, never decoded and tokenised again: they must stay those that the cache holds.
text = torch.empty(1, 0, dtype=torch.long)
for question in ("What is a cache?", "Give one example.", "And what is a cache miss?"):
    turn = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    text = torch.cat([text, tokenizer(turn, return_tensors="pt").input_ids], 1)
    with torch.inference_mode():
        out = model.generate(
            text, attention_mask=torch.ones_like(text), past_key_values=cache, max_new_tokens=48, do_sample=False
        )
    print(f"> {question}\n{tokenizer.decode(out[0, text.shape[1] :], skip_special_tokens=True).strip()}")
    print(f"  ({cache.tokens} tokens in {cache.nbytes / 2**20:.1f} MiB)\n")
    text = out
