"""lm-eval's HFLM on a decorated, compiled model: pass keys as a local task, dense and with a 4-bit cache.

Needs ``pip install lm_eval``; nothing is downloaded. A task that generates, since only later tokens read the cache: for
tasks of log-likelihoods a call is one prompt, and its result is the dense model's.

    python examples/lm_eval_local.py [tokens]
"""

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM

import effcompile as ec
from effcompile import smollm2


def task(tokenizer, tokens: int, folder: str) -> dict:
    """Four prompts with a pass key each, at different depths, and the answers."""
    rows = []
    for number, depth in enumerate(smollm2.DEPTHS):
        key = 71432 + 1111 * number
        ids = smollm2.passkey(tokenizer, tokens, depth, key)
        rows.append({"prompt": tokenizer.decode(ids[0]), "answer": str(key)})
    data = Path(folder, "passkey.jsonl")
    data.write_text("\n".join(map(json.dumps, rows)))
    return {
        "task": "passkey",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": folder},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": " ",
        "generation_kwargs": {"until": ["."], "do_sample": False, "max_gen_toks": 8},
        "filter_list": [{"name": "digits", "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def score(model, tokenizer, what: dict) -> float:
    """The share of pass keys found."""
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    results = lm_eval.simple_evaluate(model=lm, tasks=[what], bootstrap_iters=0)
    return results["results"]["passkey"]["exact_match,digits"]


def main(tokens: int) -> None:
    """Print the score of the dense model and of the compressed cache."""
    model, tokenizer = smollm2.load()
    with tempfile.TemporaryDirectory() as folder:
        what = task(tokenizer, tokens, folder)
        print("dense        ", score(model, tokenizer, what))
        ec.compress_kv(key_bits=4, value_bits=4)(model)
        model.compile(backend="effcompile")
        print("4-bit cache  ", score(model, tokenizer, what))
    print(ec.inspect(model).summary)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
