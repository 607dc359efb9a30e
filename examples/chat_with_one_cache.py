"""Several turns on one compressed cache: what was read stays packed, and each turn reads only what is new.

python examples/chat_with_one_cache.py
"""

import torch

import effcompile as ec
from effcompile import smollm2

model, tokenizer = smollm2.load()
cache = ec.Cache(model, capacity=2048, key_bits=8, value_bits=4)
model.compile(backend="effcompile")

messages = []
for question in ("What is a cache?", "Give one example.", "And what is a cache miss?"):
    messages.append({"role": "user", "content": question})
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        out = model.generate(**ids, past_key_values=cache, max_new_tokens=48, do_sample=False)
    answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    messages.append({"role": "assistant", "content": answer})
    print(f"> {question}\n{answer}\n  ({cache.tokens} tokens in {cache.nbytes / 2**20:.1f} MiB)\n")
