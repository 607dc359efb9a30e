"""What methods share whose structure the user gives as a mask: attention under it, read by blocks.

``attention(mask)  ->  mask_blocks(mask), once for all layers; attend_blocks(query, key, value, lists, mask)``. A block
in which the mask lets nothing through is not visited, one in which it lets everything through is not tested, and of the
others each pair is. That is exact for any mask, whoever made it, so nothing is inferred and nothing lost.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch import fx

from effcompile import lowering
from effcompile.kernels.program import Predicate, Program
from effcompile.kernels.reason import Reason
from effcompile.passes.base import Pass
from effcompile.passes.operands import once
from effcompile.passes.rewrite import Rewrite
from effcompile.passes.sites import DENSE, fresh_store, unsupported
from effcompile.patterns.attention import AttentionSite
from effcompile.patterns.masks import Mask
from effcompile.patterns.walk import same_size, shape, value


@dataclasses.dataclass(frozen=True)
class GivenMask(Pass):
    """Attention under a boolean mask ``[B or 1, H or 1, T, S]`` that the model was called with.

    A row that sees no key gives 0, where SDPA may give NaN on some devices; a layout has no such row.

    Parameters
    ----------
    block_size
        Tokens in a block of queries and of keys; a multiple of 16. Chunks are short, so it is half of what methods
        that look at content take.
    """

    block_size: int = 64

    phases: ClassVar[tuple[str, ...]] = ("prefill",)
    family: ClassVar[str] = "sparse_attention"
    limit: ClassVar[dict[str, Any]] = {"block_size": 64}  # and at every other

    def __post_init__(self) -> None:
        if self.block_size < 16 or self.block_size % 16:
            raise ValueError(f"block_size={self.block_size!r} is not offered; choose a multiple of 16, such as 64.")

    def match(self, site: AttentionSite) -> Rewrite | Reason:
        """Attention over the blocks of the mask, or why the site stays as it is."""

        def no(code: str, text: str) -> Reason:
            return Reason(code, text, site.source)

        mask = site.mask
        if isinstance(mask, Mask):
            text = f"{self.name} reads a mask that was given; this one is the rule {mask.predicate.name}"
            return no("no-given-mask", text)
        if mask.code in ("mask-and-causal", "mask-mutated"):
            return no(mask.code, mask.text)
        if site.dropout:
            return no("dropout", f"attention dropout {site.dropout} is active; call model.eval()")
        if site.load is not None:
            return no("reads-store", f"{self.name} is for a first call; this one reads a cache")
        if site.spelling != "sdpa":
            return no("not-supported", f'{self.name} reads masks of SDPA; load with attn_implementation="sdpa"')
        (given,) = site.mask_terms
        if value(given).dtype != torch.bool:
            return no("mask-not-honoured", f"the mask is {value(given).dtype}, which may be a bias; give a bool mask")
        scores, sizes = (*shape(site.query)[:3], shape(site.key)[2]), shape(given)
        one = [same_size(n, 1) for n in sizes[:2]] + [False, False]
        if len(sizes) != 4 or not all(o or same_size(n, m) for o, n, m in zip(one, sizes, scores)):
            text = f"a mask of {list(map(str, sizes))} for scores of {list(map(str, scores))}"
            return no("mask-shape", text)
        if problem := unsupported(site):
            return problem
        program = Program(
            "prefill",
            DENSE,
            Predicate(causal=False),
            value(site.query).dtype,
            site.ratio,
            shape(site.query)[3],
            shape(site.value)[3],
            blocks=True,
            given=True,
        )
        if why := lowering.refusal(program, value(site.query).device.type):
            return no("not-supported", why)

        def emit(graph: fx.Graph) -> fx.Node:
            ours, block = torch.ops.effcompile, self.block_size
            made = once(graph, given, ("mask", block), lambda call: call(ours.mask_blocks.default, given, block))
            lists = [graph.call_function(operator.getitem, (made, i)) for i in range(4)]
            state, length = fresh_store(graph, site)
            call = graph.call_function(
                ours.attend_blocks.default,
                (site.query, *state, length, None, *lists, block, DENSE.name, site.scale, False, -1),
                {"allowed": given},
            )
            call.meta.update(site.output.meta)
            return graph.call_function(operator.getitem, (call, 0))

        return Rewrite(f"{self.name}_{program.name}", emit, (program,))
