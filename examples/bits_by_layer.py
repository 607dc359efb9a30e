"""Other bits for some layers: the deepest decoration wins, and the report says which one did.

python examples/bits_by_layer.py
"""

import torch

import effcompile as ec
from effcompile import smollm2

model, tokenizer = smollm2.load()
ec.compress_kv(key_bits=4, value_bits=4)(model)
for layer in (model.model.layers[0], model.model.layers[-1]):
    ec.compress_kv(key_bits=8, value_bits=8)(layer)
model.compile(backend="effcompile")

inputs = tokenizer("The first and the last layer keep 8 bits, because", return_tensors="pt")
with torch.inference_mode():
    model.generate(**inputs, max_new_tokens=8, do_sample=False)

for decision in ec.inspect(model).decisions:
    if decision.action == "rewritten":
        print(decision.module, decision.rule, decision.form, sep="  ")
ec.remove(model)
