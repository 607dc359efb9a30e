"""Batches of text that a model is calibrated on: how it is called on one, and which of its tokens count."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class CalibrationError(ValueError):
    """What was given cannot be calibrated: no data, no sites, or statistics that are not numbers."""


def mask_of(batch: Any) -> Tensor | None:
    """Which tokens of a batch count, bool ``[B, T]``; None for all."""
    mask = batch.get("attention_mask") if hasattr(batch, "keys") else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def shown(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    """The same, with a bar on the error output if ``progress`` is asked for."""
    if not progress:
        return batches
    from rich.console import Console
    from rich.progress import track

    return track(batches, "calibrating", console=Console(stderr=True), transient=True)


def count(batch: Any) -> int:
    """The tokens of a batch that its mask does not hide."""
    given = dict(batch) if hasattr(batch, "keys") else {"input_ids": batch}
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return int(mask.bool().sum())
    ids = next((x for x in given.values() if isinstance(x, Tensor)), None)
    if ids is None:
        raise CalibrationError(f"calibrate(...): a batch without a tensor: {batch!r:.80}.")
    return ids.numel()


def call(model: Any, batch: Any, logits_to_keep: int = 1) -> Any:
    """The model on one batch. Neither a cache nor the logits of all tokens are made where the model can leave them."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    takes = inspect.signature(model.forward).parameters
    if isinstance(batch, Tensor) and "input_ids" not in takes:
        return model(batch.to(device))
    given = dict(batch) if hasattr(batch, "keys") else {"input_ids": batch}
    given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    spare = {"use_cache": False, "logits_to_keep": logits_to_keep}
    return model(**{name: x for name, x in spare.items() if name in takes} | given)
