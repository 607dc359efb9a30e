"""Prompts with a structure that the user knows: which runs of tokens see which, and where each stands.

A layout is what an unmodified Hugging Face model takes: token ids, positions, and a 4-D mask, which it hands on to
every attention as it is. So eager PyTorch means the same, and the passes that read such masks by blocks
(:mod:`effcompile.passes.given_mask`) only save time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Ids = Sequence[int] | Tensor
"""Token ids: a flat list, or a tensor of one dimension."""


def ids_of(given: Ids) -> Tensor:
    """Token ids as int64 ``[n]`` on the CPU. Raises ``ValueError`` for anything else, also for a batch of one."""
    ids = torch.as_tensor(given, device="cpu")
    if ids.ndim != 1 or (ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise ValueError(f"expected token ids, integers in one dimension; found {ids.dtype} of {tuple(ids.shape)}.")
    return ids.long()


class Chunk(NamedTuple):
    """A run of tokens: each sees those before it in the chunk, and all of the earlier chunks in ``sees``.

    ``position`` is that of its first token; several chunks may stand at one place.
    """

    tokens: Ids
    position: int
    sees: Sequence[int] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Prompts made of chunks, for ``model(**layout.inputs)``.

    Parameters
    ----------
    input_ids, position_ids
        int64 ``[B, T]``.
    attention_mask
        bool ``[B, 1, T, T]``: whether a token (third dimension) sees another (last). It takes ``B * T * T`` bytes.
    chunks
        int64 ``[B, T]``: the number of the chunk that a token is in, and -1 for padding, which is on the left, sees
        itself alone, and is seen by nobody.
    counts
        Chunks in each row.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    chunks: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> Layout:
        """One prompt, its chunks in order. Raises ``ValueError`` for an empty chunk, or one that sees a later one.

        >>> made = Layout.of([Chunk([5, 6], 0), Chunk([7, 8], 2, sees=[0])])
        >>> made.attention_mask[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
        """
        tokens = [ids_of(chunk.tokens) for chunk in chunks]
        seen = torch.zeros(len(chunks), len(chunks), dtype=torch.bool)
        for i, chunk in enumerate(chunks):
            if not len(tokens[i]):
                raise ValueError(f"chunk {i} of the layout has no tokens.")
            if any(not 0 <= j < i for j in chunk.sees):
                raise ValueError(f"chunk {i} of the layout sees {list(chunk.sees)}; expected numbers of earlier ones.")
            seen[i, list(chunk.sees)] = True
        if not tokens:
            raise ValueError("a layout needs at least one chunk.")
        number = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor([len(x) for x in tokens]))
        positions = [chunk.position + torch.arange(len(ids)) for chunk, ids in zip(chunks, tokens, strict=True)]
        same = (number[:, None] == number).tril()
        mask = seen[number][:, number] | same
        return cls(torch.cat(tokens)[None], torch.cat(positions)[None], mask[None, None], number[None], (len(chunks),))

    @classmethod
    def batch(cls, layouts: Sequence[Layout], pad_id: int = 0) -> Layout:
        """Several as the rows of one, padded on the left with ``pad_id``."""
        total = max(layout.input_ids.shape[1] for layout in layouts)

        def padded(name: str, fill: int) -> Tensor:
            rows = [getattr(layout, name) for layout in layouts]
            return torch.cat([torch.nn.functional.pad(x, (total - x.shape[1], 0), value=fill) for x in rows])

        mask = torch.eye(total, dtype=torch.bool, device=layouts[0].input_ids.device)
        mask = mask.repeat(sum(len(layout.counts) for layout in layouts), 1, 1, 1)
        row = 0
        for layout in layouts:
            rows, first = len(layout.counts), total - layout.input_ids.shape[1]
            mask[row : row + rows, :, first:, first:] = layout.attention_mask
            row += rows
        counts = tuple(count for layout in layouts for count in layout.counts)
        return cls(padded("input_ids", pad_id), padded("position_ids", 0), mask, padded("chunks", -1), counts)

    def to(self, device: Any) -> Layout:
        """The same on another device."""
        names = ("input_ids", "position_ids", "attention_mask", "chunks")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in names})

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Arguments of the model for the prompt."""
        return {name: getattr(self, name) for name in ("input_ids", "position_ids", "attention_mask")}

    def grown(self, tokens: Tensor) -> dict[str, Tensor]:
        """Arguments of the model, or of ``generate``, for the text after the prompt, int64 ``[B, n]``.

        They are those of prompt and text together, as ``generate`` takes them beside a cache that holds the prompt; a
        call of the model takes the last ``n`` ids and positions. New tokens see everything, so the mask is the usual
        padding mask ``[B, T + n]``; they stand behind the last chunk.
        """
        more = self.position_ids[:, -1:] + 1 + torch.arange(tokens.shape[1], device=tokens.device)
        return {
            "input_ids": torch.cat([self.input_ids, tokens], 1),
            "position_ids": torch.cat([self.position_ids, more], 1),
            "attention_mask": torch.cat([(self.chunks >= 0).long(), torch.ones_like(tokens)], 1),
        }
