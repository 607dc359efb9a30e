"""Linears of low rank: each weight in two thin factors, with ranks chosen under one budget.

Papers: SVD-LLM (Wang et al., ICLR 2025, arXiv 2403.07378, section 3.1), ASVD (Yuan et al., arXiv 2312.05821, section
3.2), LoRC (arXiv 2410.03111) for the schedule of that name. The factors are made in :mod:`effcompile.passes.factors`,
the ranks chosen in :mod:`effcompile.passes.ranks`, and put into a graph in :mod:`effcompile.passes.factored`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from effcompile.kernels import low_rank_ops, ops
from effcompile.kernels.cost import Cost
from effcompile.kernels.program import OperatorProgram
from effcompile.kernels.reason import Reason
from effcompile.passes import weight_form
from effcompile.passes.adapters import adapters_of, match_adapter
from effcompile.passes.base import Pass
from effcompile.passes.factored import Covered, emit
from effcompile.passes.factors import Metric
from effcompile.passes.feed_forward import TOKENS
from effcompile.passes.masa import materialized
from effcompile.passes.ranks import PLANNERS, Item, Ranks, bytes_of
from effcompile.passes.rewrite import Rewrite
from effcompile.passes.weight_form import DENSE, WeightForm
from effcompile.passes.weights import real, wants_gradients
from effcompile.patterns.linear import LinearSite, operands_of, readers_of
from effcompile.patterns.walk import module_path, shape, value
from effcompile.runtime import discarded
from effcompile.runtime.plan import PlanError, Record

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class LowRank(Pass):
    """Two thin linears in the place of each, ``up (down x)``, where that is less to read and to compute.

    All linears are covered but heads, routers, and those whose weight has another reader.

    Parameters
    ----------
    method
        Under which metric of the inputs the weight is cut: ``"svd"`` none, ``"asvd"`` the mean size of each channel,
        ``"whitened"`` the second moment. ``"masa"``: layers of a group share matrices besides, and what these leave is
        cut under the second moment.
    ratio
        Share of the covered linears that is kept, 0 to 1.
    planner
        What shares ranks out: ``"sensitivity"`` the measured growth of the loss, ``"energy"`` the same share of what
        outputs hold, ``"lorc"`` more for what is followed by more amplification, ``"uniform"`` the same share of each.
    budget
        What ``ratio`` is a share of, ``"parameters"`` or ``"bytes"``; or what all covered linears may take together,
        in bytes (``300_000_000`` or ``"300MB"``), in place of ``ratio``.
    milliseconds
        What all covered linears may take together for one token, in place of ``ratio``: the times of each shape are
        measured where the model is calibrated.
    rank
        One rank for all of them, in place of a budget.
    alpha
        Exponent of ``"asvd"``.
    damping
        Share of its mean diagonal that is added to the second moment of ``"whitened"``; more, if it has no root.
    bias
        Put the mean of what is lost back, as a bias.
    round_to
        Ranks are multiples of this.
    break_even
        Leave a linear dense where its factors would have as many parameters.
    head
        Cover the linear that makes the logits, too.
    residual
        Share of what factors cost that goes to single entries of the weight instead: the largest of what factors of
        the smaller rank lose, in a sparse matrix beside them.
    group, atoms, materialize
        Of ``"masa"``: layers that share, and how many matrices they do (None: what loses least of the outputs). The
        weight of each layer is made when the model is compiled, which costs a step what the dense one does; or, with
        ``materialize=False``, never, which costs less memory and more time.
    adapters
        What becomes of LoRA beside a linear: ``"keep"`` it, each adapter as one product on its own tensors, or
        ``"fold"`` it into the weight, before that is factored. Neither counts in the budget.
    """

    method: Metric | Literal["masa"] = "whitened"
    ratio: float = 0.8
    planner: Literal["sensitivity", "energy", "lorc", "uniform"] = "sensitivity"
    budget: int | str = "parameters"
    milliseconds: float | None = None
    rank: int | None = None
    alpha: float = 0.5
    damping: float = 1e-6
    bias: bool = True
    round_to: int = 16
    break_even: bool = True
    head: bool = False
    residual: float = 0.0
    group: int = 4
    atoms: int | None = None
    materialize: bool = True
    adapters: Literal["keep", "fold"] = "keep"

    name: ClassVar[str] = "low_rank"
    paper: ClassVar[str] = "SVD-LLM (Wang et al., ICLR 2025); ASVD (Yuan et al., 2023); LoRC (2024); MASA (AAAI 2026)"
    summary: ClassVar[str] = "linears as two thin ones, with ranks chosen under one budget"
    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    site_kind: ClassVar[str] = "linear"
    limit: ClassVar[dict[str, Any]] = {"ratio": 1.0}

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio!r}; expected a share above 0, at most 1.")
        if self.budget not in ("parameters", "bytes"):
            bytes_of(self.budget)
        if self.milliseconds is not None and not 0 < self.milliseconds < math.inf:
            raise ValueError(f"milliseconds={self.milliseconds!r}; expected a number above 0.")
        if not 0 <= self.residual < 1:
            raise ValueError(f"residual={self.residual!r}; expected a share of 0 or more, below 1.")
        if self.residual and self.milliseconds is not None:
            raise ValueError("residual= beside milliseconds=: the time of single entries is not measured; give bytes.")
        if self.group < 2 or (self.atoms is not None and self.atoms < 1):
            raise ValueError(f"group={self.group!r}, atoms={self.atoms!r}; expected 2 or more, and 1 or more.")
        others = {
            n: getattr(self, n) for n in ("group", "atoms", "materialize") if getattr(self, n) != getattr(LowRank, n)
        }
        if others and self.method != "masa":
            raise ValueError(f"{', '.join(others)}: options of method='masa', beside method={self.method!r}.")
        total = self.budget not in ("parameters", "bytes")
        if self.method == "masa":
            if total or self.milliseconds is not None or self.residual or self.planner in ("energy", "lorc"):
                raise ValueError(
                    "method='masa' has a ratio, or a rank with a number of atoms, and the same share for each group: "
                    "leave budget, milliseconds, residual and planner as they are."
                )
            if self.rank is not None and self.atoms is None:
                raise ValueError(f"rank={self.rank!r} with method='masa' is of what atoms leave; give atoms, too.")
        given = {"rank": self.rank is not None, "milliseconds": self.milliseconds is not None, "budget": total}
        if sum(given.values()) > 1:
            raise ValueError(f"{', '.join(n for n, g in given.items() if g)}: each says how much is kept; give one.")
        if (total or self.milliseconds is not None) and self.ratio != LowRank.ratio:
            raise ValueError(f"ratio={self.ratio!r} beside a whole budget; leave ratio out, or say a share of it.")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank!r}; expected 1 or more.")
        if self.round_to < 1:
            raise ValueError(f"round_to={self.round_to!r}; expected 1 or more.")
        if self.alpha < 0 or self.damping < 0:
            raise ValueError(f"alpha={self.alpha!r}, damping={self.damping!r}; expected 0 or more.")
        if self.rank is None and not self.break_even:
            raise ValueError("break_even=False is for one rank for all; give rank, too.")

    def covers(self, site: LinearSite) -> Covered | Reason:
        """The linear of a site, or why it is left alone."""

        def no(code: str, text: str) -> Reason:
            return Reason(code, text, site.source)

        if site.role == "router":
            return no("router", "this linear scores experts, and with another choice nothing is as it was")
        if site.role == "adapter":
            return no("adapter", "it is half of an adapter, which is of low rank already")
        if site.role == "head" and not self.head:
            return no("head", "it makes logits, or shares the embedding's weight; low_rank(head=True) covers it")
        linear = operands_of(site.anchor)
        weight = None if linear is None else real(linear.weight)
        if linear is None or weight is None:
            return no("computed-weight", "the weight is computed in the graph, or belongs to another library")
        bias = None if linear.bias is None else real(linear.bias)
        if linear.bias is not None and bias is None:
            return no("computed-weight", "the bias of this linear is no parameter")
        for t in (weight, *([] if bias is None else [bias])):
            if type(t) not in (Tensor, torch.nn.Parameter):
                where = f"{type(t).__module__}.{type(t).__qualname__}"
                return no("computed-weight", f"a tensor of this linear is a {where}, of another library")
        if weight.dtype not in DTYPES:
            return no("not-supported", f"the weight is {weight.dtype}; {', '.join(map(str, DTYPES))} can be factored")
        if weight.ndim != 2 or (bias is not None and bias.shape != (linear.outputs,)) or len(shape(linear.input)) < 2:
            return no(
                "not-supported", "the weight is no matrix, the bias no vector of its outputs, or the input no rows"
            )
        if others := readers_of(linear.weight) - {linear.node}:
            places = ", ".join(sorted({f"{n.name} in {module_path(n) or 'the model'}" for n in others}))
            text = (
                f"its weight is also read by {places}: that stays as it is, so the factors would be memory on top, and "
                "the two would no longer be of one tensor"
            )
            return no("tied-weight", text)
        if site.adapted is None or self.adapters == "keep":
            return Covered(linear, weight, bias)
        adapters = adapters_of(site.adapted)
        if isinstance(adapters, str):
            return no("computed-weight", adapters)
        return Covered(linear, weight, bias, site.adapted, adapters)

    def match(self, site: LinearSite) -> Rewrite | Reason:
        """The factors that the plan gives to this linear, or why it stays as it is."""

        def no(code: str, text: str) -> Reason:
            return Reason(code, text, site.source)

        if site.role == "adapter":
            return match_adapter(site, self.name, self.adapters)
        record: Record | None = getattr(site, "record", None)
        covered = self.covers(site)
        if isinstance(covered, Reason):
            return covered
        if record is None and not covered.adapters:
            return no("no-plan", f"no plan says what {self.name} does here; see effcompile.calibrate")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        if record is not None and defaults | dict(record.options) != json.loads(self.text):
            told = f"made with {dict(record.options)}, and here {json.loads(self.text)} is asked for"
            return no("other-options", f"the plan was {told}")
        if record is not None:
            covered.check(record)
        factored = record is not None and ("up" in record.tensors or "atoms" in record.tensors)
        if record is not None and not factored and not covered.adapters:
            return Reason(*stays_dense(record), site.source)
        linear, (outputs, inputs) = covered.linear, covered.size
        x, out = value(linear.input), value(linear.node)
        if wants_gradients(linear.node.graph):
            return no("gradients", f"gradients are needed, and {self.name} has none; use torch.no_grad()")
        if len({x.dtype, out.dtype, covered.weight.dtype, *([] if covered.bias is None else [covered.bias.dtype])}) > 1:
            return no("mixed-dtypes", "this linear reads and writes different dtypes, as under autocast")
        size: Any = {"itemsize": x.dtype.itemsize}
        before = low_rank_ops.linear_cost(TOKENS, outputs, inputs, bias=covered.bias is not None, **size)
        for one in covered.adapters:
            rank = one.down.shape[0]
            before += low_rank_ops.linear_cost(TOKENS, rank, inputs, bias=one.down_bias is not None, **size)
            before += low_rank_ops.linear_cost(TOKENS, outputs, rank, bias=one.up_bias is not None, **size)
        made = record if factored else None
        if made is not None and "values" in made.tensors and x.device.type != "cpu":
            told = "which would cost as much as the weight there; calibrate with residual=0"
            return no("no-kernel", f"no kernel for {x.device.type} reads the entries of a residual, {told}")
        form, after, sides = self._form(made, covered, size)
        kept = self._kept(site, covered, made)
        bits = weight_form.form_of(kept.get(site.anchor))
        if made is not None and (text := self._dearer(bits, sides, covered)):
            if not covered.adapters:
                return no("break-even", text)
            made, kept = None, self._kept(site, covered, None)
            form, after, sides = self._form(None, covered, size)
            bits = weight_form.form_of(kept.get(site.anchor))
        chain = made is not None and "up" in made.tensors and (self.method != "masa" or not self.materialize)
        operator = "quantized_linear" if bits != DENSE else "low_rank_linear" if chain else ""
        served = operator and ops.has_launcher(operator, x.device.type)
        programs = (OperatorProgram(operator, x.dtype),) if served else ()
        taken = () if covered.adapted is None else covered.adapted.adapters
        return Rewrite(
            form + weight_form.told([bits]),
            lambda graph: emit(graph, covered, made, bits),
            weights=tuple((site.module, n, covered.tensors[role]) for role, n in covered.nodes.items()),
            cost=(before, sum((bits.change(*sizes, **size) for sizes in sides), after)),
            rows=tuple(shape(linear.input)[:-1]),
            operators=programs,
            output=covered.output,
            takes=tuple(node for one in taken for node in (one.down, one.up)),
            kept=kept,
        )

    def _form(self, made: Record | None, covered: Covered, size: Any) -> tuple[str, Cost, list[tuple[int, int]]]:
        """Its name, what it costs if all is dense, and outputs and inputs of the linears that may be in few bits."""
        outputs, inputs = covered.size
        folded = f" with {len(covered.adapters)} folded" if covered.adapters else ""
        if made is None:
            after = low_rank_ops.linear_cost(TOKENS, outputs, inputs, bias=covered.shift is not None, **size)
            return f"{self.name} dense{folded}", after, [(outputs, inputs)]
        if self.method == "masa":
            form, after = self._shared(made, covered, size)
            return form + folded, after, [(outputs, inputs)]
        rank = self._checked(made, outputs, inputs)
        form = f"{self.name} {self.method} {rank} of {min(outputs, inputs)}{folded}"
        bias = "shift" in made.tensors or covered.shift is not None
        entries = made.tensors["values"].numel() if "values" in made.tensors else 0
        form += f" + {entries:,} entries" if entries else ""
        after = low_rank_ops.low_rank_cost(TOKENS, outputs, inputs, rank, bias=bias, entries=entries, **size)
        return form, after, [(rank, inputs), (outputs, rank)]

    def _kept(self, site: LinearSite, covered: Covered, made: Record | None) -> dict[fx.Node, WeightForm | Reason]:
        """In which bits the factors of ``made`` are kept, or the one weight in the place of the linear."""
        own = {} if made is None else made.tensors

        def weights() -> list[Tensor]:
            if "atoms" not in own and own:
                return [own["down"], own["up"]]
            if any(discarded.name_of(t) is not None for t in covered.tensors.values()):
                return []  # it was in range when it was prepared
            return [materialized(own) if own else covered.rows]

        text = ""
        if "atoms" in own and not self.materialize:
            text = "layers share matrices, which stay as they are; with materialize=True each has a weight of its own"
        elif "values" in own:
            text = "single entries are read in one call with the factors, which stay as they are; residual=0 has none"
        answers = weight_form.asked(site, {site.anchor: list if text else weights})
        refused = text and isinstance(answers.get(site.anchor), WeightForm)
        return {site.anchor: Reason("not-supported", text, site.source)} if refused else answers

    def _dearer(self, bits: WeightForm, sides: Sequence[tuple[int, int]], covered: Covered) -> str:
        """Why factors in few bits are no gain beside the weight in as many, or ''; tails of groups are read, too."""
        factors, dense = sum(bits.nbytes(*sizes, 0) for sizes in sides), bits.nbytes(*covered.size, 0)
        if bits == DENSE or self.method == "masa" or not self.break_even or factors < dense:
            return ""
        return f"in {bits.text} factors of rank {sides[0][0]} would have {factors:,} bytes, and the weight {dense:,}"

    def _shared(self, record: Record, covered: Covered, size: Any) -> tuple[str, Cost]:
        """What the report says of a linear with shared atoms, and what it costs."""
        outputs, inputs = covered.size
        count = record.tensor("atoms", -1, outputs, inputs).shape[0]
        record.tensor("coefficients", count)
        rank = self._checked(record, outputs, inputs) if "up" in record.tensors else 0
        if "shift" in record.tensors:
            record.tensor("shift", outputs)
        layers, kept = (record.numbers.get(name, math.nan) for name in ("layers", "parameters"))
        bias = "shift" in record.tensors or covered.shift is not None
        after = low_rank_ops.linear_cost(TOKENS, outputs, inputs, bias=bias, **size)
        told = "a step costs what the dense one does"
        if not self.materialize:
            after = low_rank_ops.linear_cost(TOKENS, count * outputs, inputs, bias=False, **size)
            after += low_rank_ops.low_rank_cost(TOKENS, outputs, inputs, rank, bias=bias, **size)
            told = "a step costs more than the dense one"
        form = f"{self.name} masa {count} atoms for {layers:.0f} layers + rank {rank}"
        return f"{form}: {kept / (outputs * inputs):.0%} of the bytes in the plan, {told}", after

    def _checked(self, record: Record, outputs: int, inputs: int) -> int:
        """The rank of a record. Raises :class:`PlanError` if its tensors do not fit the linear."""
        rank = record.tensor("up", outputs, -1).shape[1]
        record.tensor("down", rank, inputs)
        if not 1 <= rank <= min(outputs, inputs):
            raise PlanError(
                f"plan: {self.name} at {record.module}: rank {rank} of a weight {outputs} x {inputs}; expected 1 to "
                "its smaller side. Calibrate again."
            )
        if "shift" in record.tensors:
            record.tensor("shift", outputs)
        if "values" in record.tensors:
            # A kernel reads where the lists say.
            count = record.tensor("values", -1).numel()
            columns, starts = record.tensor("columns", count), record.tensor("starts", outputs + 1)
            ends = int(starts[0]) == 0 and int(starts[-1]) == count and bool((starts.diff() >= 0).all())
            inside = not count or (int(columns.min()) >= 0 and int(columns.max()) < inputs)
            types = columns.dtype is low_rank_ops.index_dtype(inputs) and starts.dtype is torch.int32
            if not (ends and inside and types):
                raise PlanError(
                    f"plan: {self.name} at {record.module}: columns and starts are no rows of a matrix {outputs} x "
                    f"{inputs}. Calibrate again."
                )
        return rank

    @property
    def unit(self) -> str:
        """What the budget is in."""
        if self.milliseconds is not None:
            return "ms"
        return "parameters" if self.budget == "parameters" else "bytes"

    def whole(self, items: Sequence[Item]) -> float:
        """The budget, in the unit of what ``items`` cost; no more than they do."""
        dense = sum(item.dense for item in items)
        if self.milliseconds is not None:
            return min(self.milliseconds, dense)
        return self.ratio * dense if self.budget in ("parameters", "bytes") else min(bytes_of(self.budget), dense)

    def plan_ranks(self, items: Sequence[Item], names: Sequence[str]) -> Ranks:
        """A rank for each linear, None for those that stay dense. Raises ``ValueError`` if that cannot be said."""
        if self.rank is None:
            return PLANNERS[self.planner](items, self.whole(items), self.round_to)
        for item, name in zip(items, names, strict=True):
            if self.rank > len(item.lost):
                raise ValueError(f"rank={self.rank}, but {name} has at most {len(item.lost)}; give a smaller rank.")
        return [None if self.break_even and i.cost(self.rank) >= i.dense else self.rank for i in items]


def stays_dense(record: Record) -> tuple[str, str]:
    """Why a linear that was calibrated stays dense: a code, and a text with both numbers."""
    if record.options.get("method") == "masa" and record.numbers.get("layers", 1) > 1:
        return "kept-dense", "with ratio=1 every weight is kept as it is"
    if record.options.get("method") == "masa":
        return "no-group", "no other layer has a linear of this shape in this place, so there is nothing to share"
    # Told, not used: a plan that was edited may lack them.
    rank, factors, dense = (record.numbers.get(name, math.nan) for name in ("tried", "factors", "dense"))
    what = "parameters" if record.options.get("budget", "parameters") == "parameters" else "bytes"
    one, two = f"{factors:,.0f}", f"{dense:,.0f}"
    if record.options.get("milliseconds") is not None:
        what, one, two = "ms", f"{factors:.4g}", f"{dense:.4g}"
    if factors >= dense:
        return "break-even", f"factors of rank {rank:.0f} would have {one} {what}, and the weight has {two}"
    text = (
        f"the planner keeps the weight with its {two} {what}: even rank {rank:.0f}, with {one}, would lose more here "
        "than the same elsewhere"
    )
    return "kept-dense", text
