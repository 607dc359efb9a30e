"""BlockRank: ranking prompts whose documents do not see each other.

Paper: Scalable In-context Ranking with Generative Models (Gupta et al., NeurIPS 2025, arXiv 2510.05396).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from effcompile.passes.given_mask import GivenMask
from effcompile.passes.layout import Chunk, Ids, Layout, ids_of


@dataclasses.dataclass(frozen=True)
class BlockRank(GivenMask):
    """Read the mask of :func:`~effcompile.passes.blockrank.blockrank_layout` by blocks: cost linear in documents.

    The pass is exact for the mask that the model is called with, ``model(**ec.blockrank_layout(...).inputs)``, and
    leaves every other call alone. The *mask* is for checkpoints that were fine-tuned with it (the paper's auxiliary
    loss on attention besides): applied to others it degrades what they say.

    Notes
    -----
    The official code pads every block to one length, a multiple of 16, and cuts what is longer; here chunks keep their
    lengths, and nothing is cut. Padding takes no part in either.
    """

    name: ClassVar[str] = "blockrank"
    paper: ClassVar[str] = "BlockRank (Gupta et al., NeurIPS 2025)"
    summary: ClassVar[str] = "ranking prompts under a given mask: documents see the instruction and themselves"


def blockrank_layout(instruction: Ids, documents: Sequence[Ids], query: Ids, *, offset: int = 8192) -> Layout:
    """A ranking prompt: each document sees the instruction and itself, the query sees everything.

    Documents all stand right behind the instruction, so that none is nearer to the query than another.

    Parameters
    ----------
    instruction, query
        Token ids. The instruction should contain the query's text as well, and the query end with the signal tokens.
    documents
        Token ids of each.
    offset
        Position of the query's first token. 8192 in the paper, 16384 in the official code: its model's rotary range
        must reach there.

    Raises
    ------
    ValueError
        If a part is empty, or if a document reaches to ``offset``.
    """
    start, texts = len(ids_of(instruction)), [ids_of(document) for document in documents]
    end = start + max(map(len, texts), default=0)
    if end > offset:
        raise ValueError(f"offset={offset!r}, but a document ends at position {end - 1}; choose a larger one.")
    chunks = [Chunk(instruction, 0), *(Chunk(text, start, (0,)) for text in texts)]
    return Layout.of([*chunks, Chunk(query, offset, range(len(chunks)))])


def blockrank_scores(query: Tensor, key: Tensor, layout: Layout, scale: float, *, signal: int = 2) -> Tensor:
    """What the last ``signal`` tokens attend to in each document: fp32 ``[B, most documents]``, the rank order.

    Parameters
    ----------
    query, key
        ``[B, H, signal or more, D]``, the last ones, and ``[B, G, T, D]`` of one layer, rotated: the paper's ``l*``,
        found by trial near the middle (20 of 32 layers in the official code). Layers behind it need not run.
    layout
        Of :func:`blockrank_layout`, or a batch of such.
    scale
        Of the layer's scores.
    signal
        Signal tokens at the end of the query; the paper has two, ``:`` and ``[``.

    Returns
    -------
    Tensor
        Softmax over the tokens of all documents, averaged over heads and signal tokens as in the official code (the
        paper sums the latter), summed in each document. Rows sum to 1; where a row has fewer documents than another it
        has 0.
    """
    most = max(layout.counts) - 2
    if most < 1:
        raise ValueError("the layout has no documents to score.")
    inside = (layout.chunks >= 1) & (layout.chunks < layout.chunks[:, -1:])
    rows = query[:, :, -signal:].float().unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("bgrtd,bgsd->bgrts", rows, key.float()) * scale
    weights = scores.masked_fill(~inside[:, None, None, None], -torch.inf).softmax(-1).mean((1, 2, 3))
    shares = torch.zeros(len(layout.counts), most, device=query.device)
    numbers = (layout.chunks - 1).clamp(0, most - 1)
    return shares.scatter_add_(1, numbers, weights.masked_fill(~inside, 0))
