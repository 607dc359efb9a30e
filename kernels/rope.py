"""Keys before RoPE: the table of angles, and reference bodies of rotating back and forth.

The table holds cos and sin of every token of a cache, ``[B, C/16, 2, r/2, 16]`` fp16, for the ``r`` of ``D`` channels
that are rotated: tokens stand next to each other in runs of 16, as a vector of a kernel wants them, and ``[:, :, 0]``
is cos. One table serves all layers of a cache. A batch entry has angles of its own, because padding on the left moves
positions. Beside latents, which no rotated key is turned back for, it is fp32.

The table rounds the model's cos and sin to fp16, and that loses nothing: a key is rotated back with the *same* numbers
before it is quantised as forth after it, and ``[[c, s], [-s, c]] / (c*c + s*s)`` is the exact inverse of
``[[c, -s], [s, c]]`` for any ``c`` and ``s`` that are not both 0. So it may also carry a scale other than 1 (YaRN's
attention factor, section 3.4 of Peng et al., 2023). What is quantised is the key before RoPE up to that rounding.

Source: KVQuant (Hooper et al., NeurIPS 2024), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 16
"""Tokens that stand next to each other in a table."""


def table_shape(batch: int, capacity: int, rotary: int) -> tuple[int, ...]:
    """Shape of the table for ``capacity`` tokens, a multiple of 16, of ``rotary`` rotated channels."""
    return (batch, capacity // RUN, 2, rotary // 2, RUN)


def rotary_of(table: Tensor) -> int:
    """``r``, the channels of a key that are rotated."""
    return 2 * table.shape[3]


def write(table: Tensor, length: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Put cos and sin ``[B or 1, T, r/2]`` of the tokens from ``length`` (int64, 0-d) on into ``table``, in place.

    Tokens past the capacity are dropped. Nothing is read back to the host.
    """
    last = table.shape[1] * RUN - 1
    # A token without room is written as the last that has it, once more; if none has, nothing changes.
    at = torch.minimum(torch.arange(cos.shape[1], device=table.device), (last - length).clamp(min=0))
    token = (length + at).clamp(max=last)
    run, slot = token // RUN, token % RUN
    new = torch.stack([cos, sin], 2).to(table.dtype).index_select(1, at).expand(table.shape[0], -1, -1, -1)
    old = table[:, run, :, :, slot].movedim(0, 1)  # indices apart from each other: their dimension comes first
    table[:, run, :, :, slot] = torch.where(length <= last, new, old).movedim(1, 0)


def angles(table: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """cos and sin of tokens ``start`` to ``stop``, multiples of 16: two of ``[B, 1, stop - start, r/2]`` fp32."""
    part = table[:, start // RUN : stop // RUN].float()
    cos, sin = (x.transpose(2, 3).flatten(1, 2).unsqueeze(1) for x in part.unbind(2))
    return cos, sin


def _pairs(x: Tensor, half: int, adjacent: bool) -> tuple[Tensor, Tensor]:
    """The first and the second channels of all rotated pairs, as views."""
    if adjacent:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    """``x`` ``[B, G, T, D]`` with its first ``r`` channels rotated by angles ``[B, 1, T, r/2]``; a new tensor."""
    out = x.clone()
    a, b = _pairs(x, cos.shape[-1], rope == "pre_adjacent")
    first, second = _pairs(out, cos.shape[-1], rope == "pre_adjacent")
    first.copy_(a * cos - b * sin)
    second.copy_(b * cos + a * sin)
    return out


def unrotate(x: Tensor, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    """The inverse of :func:`rotate`, whatever ``cos**2 + sin**2`` is (not 0)."""
    out = x.clone()
    a, b = _pairs(x, cos.shape[-1], rope == "pre_adjacent")
    first, second = _pairs(out, cos.shape[-1], rope == "pre_adjacent")
    square = cos * cos + sin * sin
    first.copy_((a * cos + b * sin) / square)
    second.copy_((b * cos - a * sin) / square)
    return out
