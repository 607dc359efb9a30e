"""One decision about one site: what was found, what was done or why not, and what it costs before and after."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import torch

from effcompile.kernels import cost
from effcompile.kernels.cost import Cost
from effcompile.kernels.form import KVForm
from effcompile.kernels.program import Predicate, Program
from effcompile.kernels.reason import Reason
from effcompile.kernels.rope import rotary_of
from effcompile.passes.backend_options import clean_path

Which = Literal["before", "after"]

_OTHERWISE = ("before", "after", "cache", "fixed")
"""Fields that JSON shows in another form."""


class Seen(NamedTuple):
    """What ``verify`` saw of one rewritten site: the fields of :class:`Decision` of these names."""

    error: float
    density: float | None = None
    kept: float | None = None


@dataclasses.dataclass(frozen=True)
class Decision:
    """What one pass decided about one site.

    Parameters
    ----------
    site, kind, module, source
        Number of the site in its graph, what it is, the module it is in, and the user's line.
    rule
        The user's choice that led here (:class:`~effcompile.passes.backend_options.Resolved`), or ``""``.
    action, form, reason
        ``"rewritten"`` and the name of what stands there now, or ``"left"`` and why.
    before, after
        Cost of the site as found and as it is now, with the sizes left open; ``None`` where it is not known.
    sizes
        The size of each letter at the first call, the length of a cache being its whole capacity.
    fixed
        The letters that no later call of this graph can change.
    error
        Largest difference that ``verify`` saw, over the largest value.
    density, kept
        Of a sparse form, as ``verify`` saw it: pairs of query and key visited over those that may see each other, and
        the mean share of a row's attention mass that the visited ones hold.
    kernels
        Names of the programs that are launched.
    cache
        Bytes of this layer's cache, and of a dense one of the same capacity; 0 without a cache.
    detail
        What was found, in words, where its kind does not say that.
    table_bytes
        Of the angles that all layers with keys before RoPE share, in no layer's bytes; 0 without them.
    """

    site: int
    kind: str
    module: str
    rule: str
    action: Literal["rewritten", "left"]
    form: str = ""
    reason: Reason | None = None
    source: str = ""
    before: Cost | None = None
    after: Cost | None = None
    sizes: tuple[tuple[str, int], ...] = ()
    fixed: str = ""
    error: float | None = None
    density: float | None = None
    kept: float | None = None
    kernels: tuple[str, ...] = ()
    cache: tuple[int, int] = (0, 0)
    table_bytes: int = 0
    graph: int = 0
    detail: str = ""

    def _number(self, which: Which, what: str) -> int | None:
        amount = getattr(self, which)
        found = None if amount is None else _at(getattr(amount, what), self.sizes)
        return found if isinstance(found, int) else None

    @property
    def bytes_before(self) -> int | None:
        """Bytes moved by the site as found, at :attr:`sizes`."""
        return self._number("before", "bytes")

    @property
    def bytes_after(self) -> int | None:
        """Bytes moved now, at :attr:`sizes`."""
        return self._number("after", "bytes")

    @property
    def flops_before(self) -> int | None:
        """FLOPs of the site as found, at :attr:`sizes`."""
        return self._number("before", "flops")

    @property
    def flops_after(self) -> int | None:
        """FLOPs now, at :attr:`sizes`."""
        return self._number("after", "flops")

    def formula(self, which: Which, what: Literal["bytes", "flops"]) -> str:
        """The cost as text in the letters that a later call can change, such as ``1536*S + 4644``."""
        amount = getattr(self, which)
        fixed = tuple(pair for pair in self.sizes if pair[0] in self.fixed)
        return "" if amount is None else str(_at(getattr(amount, what), fixed))

    def to_dict(self) -> dict[str, Any]:
        """The decision in JSON's types, costs as number and as formula."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _OTHERWISE}
        plain["reason"] = None if self.reason is None else dataclasses.asdict(self.reason)
        plain["sizes"] = dict(self.sizes)
        plain["cache_bytes"], plain["cache_bytes_dense"] = self.cache
        sides: tuple[Which, Which] = ("before", "after")
        for which in sides:
            plain[f"bytes_{which}"] = self._number(which, "bytes")
            plain[f"flops_{which}"] = self._number(which, "flops")
            plain[f"bytes_{which}_formula"] = self.formula(which, "bytes")
            plain[f"flops_{which}_formula"] = self.formula(which, "flops")
        return plain


@functools.lru_cache(maxsize=4096)
def _at(expression: Any, sizes: tuple[tuple[str, int], ...]) -> Any:
    return cost.at(expression, **dict(sizes))


def left(index: int, site: Any, rule: str, reason: Reason) -> Decision:
    """The decision to leave ``site`` as it is; without a query it is of another kind, or could not be described."""
    if not hasattr(site, "query"):
        rows = _hint(getattr(site, "queries", None))
        sizes = () if rows is None else (("T", rows),)
        place = clean_path(site.module)
        detail = getattr(site, "detail", "")
        return Decision(
            index, site.kind, place, rule, "left", reason=reason, source=site.source, sizes=sizes, detail=detail
        )
    common = _common(index, site, rule)
    before = _cost_before(site)
    return Decision(**common, action="left", reason=reason, before=before, after=before)


def rewritten(index: int, site: Any, rule: str, rewrite: Any) -> Decision:
    """The decision to put ``rewrite`` in the place of ``site``."""
    if not hasattr(site, "query"):
        place, detail = clean_path(site.module), getattr(site, "detail", "")
        # Tokens of what has no batch are those of one entry.
        batches, *tokens = rewrite.rows if len(rewrite.rows) > 1 else (1, *rewrite.rows)
        given = {"B": batches, "T": math.prod(tokens)} if rewrite.rows else {}
        costs = dict(zip(("before", "after"), rewrite.cost or (), strict=False))
        return Decision(
            index, site.kind, place, rule, "rewritten", form=rewrite.form, source=site.source, **costs, detail=detail,
            sizes=tuple((letter, hint) for letter, size in given.items() if (hint := _hint(size)) is not None),
            fixed="".join(letter for letter, size in given.items() if isinstance(size, int)),
            kernels=tuple(p.name for p in rewrite.operators),
        )  # fmt: skip
    common = _common(index, site, rule)
    program = next((p for p in rewrite.programs if isinstance(p, Program)), None)
    item = site.query.meta["val"].element_size()
    after = cost.dense(Predicate(), item)
    if program is not None:
        # Chosen tokens cost what as many of the newest do.
        predicate = dataclasses.replace(program.predicate, window=rewrite.tokens or program.predicate.window)
        after = cost.attend(program.form, predicate, item, program.rotary)
        if site.load is not None and (form := KVForm.parse(site.load.args[7])).latents and not program.form.latents:
            after += cost.load(form, item, _rotary(site))
    if program is not None and program.score.name:
        after += cost.score_operands(
            program.predicate, _bias(site) if program.score.bias else None, program.score.sinks
        )
    names = tuple(p.name for p in rewrite.programs)
    before = _cost_before(site)
    return Decision(**common, action="rewritten", form=rewrite.form, before=before, after=after, kernels=names)


def _bias(site: Any) -> tuple[bool, bool, bool]:
    """Whether the bias of a site has rows of the batch, heads and queries of its own."""
    own = [False, False, False]
    for term in site.mask.bias:
        sizes = term.node.meta["val"].shape[:-1]
        sizes = (*sizes[:1], *sizes) if term.folded else sizes
        for place, size in enumerate(reversed(sizes), 1):
            own[-place] |= bool(size != 1) if isinstance(size, int) else True
    return own[0], own[1], own[2]


def _cost_before(site: Any) -> Cost:
    item = site.query.meta["val"].element_size()
    mask = sum(term.meta["val"].element_size() for term in site.mask_terms)
    if site.load is not None:
        return cost.unfused(KVForm.parse(site.load.args[7]), item, mask, _rotary(site))
    found = cost.dense(Predicate(causal=site.is_causal), item)
    return found + Cost(cost.B * cost.T * cost.S * mask, 0)


def _rotary(site: Any) -> int:
    """The channels that the table of angles of a site's store rotates; 0 without one."""
    table = site.load.kwargs.get("table")
    return 0 if table is None else rotary_of(table.meta["val"])


def _common(index: int, site: Any, rule: str) -> dict[str, Any]:
    """Where the site is, and its sizes."""
    (batches, query_heads, queries, size), key = site.query.meta["val"].shape, site.key.meta["val"]
    keys, value = key.shape[2], site.value.meta["val"].shape[3]
    given = {"B": batches, "H": query_heads, "T": queries, "D": size, "E": value, "C": keys, "S": keys}
    sizes = {letter: hint for letter, length in given.items() if (hint := _hint(length)) is not None}
    if "H" in sizes:
        sizes["G"] = sizes["H"] // site.ratio
    fixed = {letter for letter, length in given.items() if isinstance(length, int)} | {"G"}
    form = KVForm.parse(site.load.args[7]) if site.load is not None else None
    cache, table = (0, 0), 0
    if form is not None:
        fixed.discard("S")
        if set("BGCDE") <= sizes.keys():
            dims = sizes["B"], sizes["G"], sizes["C"], sizes["D"], sizes["E"]
            table = cost.at(cost.table(_rotary(site), form.latent > 0), B=sizes["B"], C=sizes["C"])
            cache = (form.nbytes(*dims, key.dtype), KVForm(16, 16).nbytes(*dims, key.dtype))
    return {
        "site": index,
        "kind": site.kind,
        "module": clean_path(site.module),
        "rule": rule,
        "source": site.source,
        "sizes": tuple(sorted(sizes.items())),
        "fixed": "".join(sorted(fixed)),
        "cache": cache,
        "table_bytes": table,
    }


def _hint(size: Any) -> int | None:
    """A size at the first call. Never adds a guard."""
    if isinstance(size, torch.SymInt):
        size = size.node.hint
    return size if isinstance(size, int) else None
