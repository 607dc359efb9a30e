"""Graph-KV: prompts of text chunks with edges, where a chunk sees those that point to it.

Paper: Graph-KV: Breaking Sequence via Injecting Structural Biases into Large Language Models (Wang et al., NeurIPS
2025, arXiv 2506.07334), with one round of encoding, as in its experiments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar

from effcompile.passes.given_mask import GivenMask
from effcompile.passes.layout import Chunk, Ids, Layout, ids_of


@dataclasses.dataclass(frozen=True)
class GraphKV(GivenMask):
    """Read the mask of :func:`~effcompile.passes.graph_kv.graph_kv_layout` by blocks: cost by chunks and edges.

    The pass is exact for the mask that the model is called with, ``model(**ec.graph_kv_layout(...).inputs)``, and
    leaves every other call alone. The *structure* is for checkpoints tuned to read blocks independently (the paper's is
    a Llama-3.1-8B); on others it degrades what they say, and where order carries the answer a plain prompt is better.

    Notes
    -----
    All chunks are in one call, and a target sees the keys that its sources have at their shared place: nothing is
    rotated anew, and one layer after another gives what the paper's separate calls give.
    """

    name: ClassVar[str] = "graph_kv"
    paper: ClassVar[str] = "Graph-KV (Wang et al., NeurIPS 2025)"
    summary: ClassVar[str] = "prompts of chunks with edges, under a given mask: a chunk sees those that point to it"


def graph_kv_layout(
    chunks: Sequence[Ids],
    edges: Iterable[tuple[int, int]],
    query: Ids,
    *,
    prefix: Ids = (),
    length: int | None = None,
    sources: Iterable[int] | None = None,
    see_prefix: bool = False,
) -> Layout:
    """A prompt ``[prefix | sources | targets | query]``.

    A source is a chunk read alone, at positions ``[0, L)`` behind the prefix; a target is a chunk read after its
    sources, at ``[L, 2L)``; the query sees everything and begins at ``2L``, or at ``L`` without targets. A chunk with
    edges to and from it is there twice.

    Parameters
    ----------
    chunks, query, prefix
        Token ids.
    edges
        Pairs ``(source, target)`` of numbers of chunks; a chunk may point to itself.
    length
        ``L``; at least, and by default, the longest chunk.
    sources
        Chunks to be read alone: those that edges begin at, by default also those that none ends at. All of them, as
        the official code for retrieval has it: ``range(len(chunks))``.
    see_prefix
        Whether chunks see the prefix too. In the paper and the official code only the query does, so that a chunk's
        keys are the same in every prompt.

    Raises
    ------
    ValueError
        For an edge to or from a chunk that is not there, an empty chunk, a ``length`` below the longest chunk, and
        ``sources`` without one that an edge begins at.

    Notes
    -----
    The official code for retrieval rotates sources and targets anew to one sequence of positions, against the paper;
    its code for citations shares them, as here, but begins the query right behind the centre paper, before ``2L``.
    """
    texts, head = [ids_of(chunk) for chunk in chunks], ids_of(prefix)
    pairs, count = sorted(set(edges)), len(texts)
    if any(not 0 <= end < count for pair in pairs for end in pair):
        raise ValueError(f"edges {pairs} among {count} chunks; expected numbers from 0 to {count - 1}.")
    begin, targets = {s for s, _ in pairs}, sorted({t for _, t in pairs})
    alone = sorted(begin | (set(range(count)) - set(targets)) if sources is None else set(sources))
    if not begin <= set(alone) or any(not 0 <= s < count for s in alone):
        raise ValueError(f"sources={alone} of {count} chunks; edges begin at {sorted(begin)}.")
    longest = max(map(len, texts), default=0)
    if length is not None and length < longest:
        raise ValueError(f"length={length!r}, but a chunk has {longest} tokens.")
    span, start, first = length or longest, len(head), [0] if len(head) and see_prefix else []
    made = [Chunk(head, 0)] if len(head) else []
    places = {s: len(made) + i for i, s in enumerate(alone)}
    made += [Chunk(texts[s], start, first) for s in alone]
    made += [Chunk(texts[t], start + span, [*first, *(places[s] for s, end in pairs if end == t)]) for t in targets]
    return Layout.of([*made, Chunk(query, start + span * (2 if targets else 1), range(len(made)))])
