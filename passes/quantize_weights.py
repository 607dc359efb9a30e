"""Weights in few bits: linears that read codes of 8 to 2 bits, unpacked inside the product.

Papers: round to nearest in groups, as in GPTQ (Frantar et al., ICLR 2023) and the formats that followed; the codes of
FlexRound (Lee et al., ICML 2023) and CBQ (Ding et al., ICLR 2025) are learned (:mod:`effcompile.passes.reconstruct`).
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from effcompile.kernels import cost, low_rank_ops, ops, weight_ops
from effcompile.kernels.program import DTYPES, OperatorProgram
from effcompile.kernels.reason import Reason
from effcompile.passes.base import Pass
from effcompile.passes.feed_forward import check_weights
from effcompile.passes.reconstruct import ROUNDINGS, Rounding
from effcompile.passes.rewrite import Rewrite
from effcompile.passes.weight_form import WeightForm, Weights
from effcompile.passes.weights import LENT, constant, prepared, real, wants_gradients
from effcompile.patterns.linear import LinearSite, operands_of
from effcompile.patterns.walk import shape, value
from effcompile.runtime import discarded
from effcompile.runtime.plan import Record

NORMAL = 2.0**-14
"""The least fp16 number with all its digits."""


@dataclasses.dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Read the weights of linears in few bits: codes, and for each group of inputs of each output a scale and a zero.

    What is multiplied by is ``code * scale + zero``; activations stay as they are. The user's parameters stay as they
    are, too: the packed ones are made when the model is compiled, and belong to the compiled code.

    Parameters
    ----------
    bits
        8, 4, 3 or 2; 16 leaves weights as they are.
    group
        Inputs that share a scale: fewer are more accurate, and cost more bytes. A last group may be shorter.
    symmetric
        Without zeros, which saves 16 bits a group; the middle code is 0.
    method
        ``"rtn"`` rounds to nearest, and needs no data. ``"flexround"`` and ``"cbq"`` learn how to round, layer by layer
        or over two layers at a time: they are calibrated first (:func:`effcompile.calibrate`), and applied by a plan.
    iterations, lr
        Of those two: steps of Adam for each layer or window, and its rate at the first of them, which falls to a
        twentieth. The numbers are those of FlexRound's code.
    clip
        Of those two: begin with the range of each group that loses least of the outputs on the data, in place of the
        one from the least to the largest weight. None is what the papers do: ``"cbq"`` truncates, ``"flexround"`` not.
    head
        Also the linear that makes the logits. Where its weight is tied to the embedding, that keeps reading the
        original, and only the head reads the packed copy. It is rounded to nearest.
    """

    bits: int = 4
    group: int = 32
    symmetric: bool = False
    method: Literal["rtn", "flexround", "cbq"] = "rtn"
    head: bool = False
    iterations: int = 5000
    lr: float = 3e-3
    clip: bool | None = None

    name: ClassVar[str] = "quantize_weights"
    paper: ClassVar[str] = "round to nearest; FlexRound (Lee et al., ICML 2023); CBQ (Ding et al., ICLR 2025)"
    summary: ClassVar[str] = "linears: weights in few bits, unpacked inside the product"
    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    site_kind: ClassVar[str] = "linear"
    limit: ClassVar[dict[str, Any]] = {"bits": 16}

    def __post_init__(self) -> None:
        if self.bits not in (16, *weight_ops.BITS):
            offered = ", ".join(map(str, weight_ops.BITS))
            raise ValueError(f"bits={self.bits!r} is not offered; choose {offered}, or 16 to leave weights alone.")
        if self.group < 8 or self.group % 8:
            raise ValueError(f"group={self.group!r}; expected a multiple of 8, such as 32, 64 or 128.")
        if self.iterations < 0 or not self.lr > 0:
            raise ValueError(f"iterations={self.iterations!r}, lr={self.lr!r}; expected 0 or more, and a rate above 0.")
        if self.clip is not None and self.method == "rtn":
            raise ValueError(f"clip={self.clip!r} needs data, and method='rtn' has none; choose 'flexround' or 'cbq'.")

    def match(self, site: LinearSite) -> Rewrite | Reason:
        """The same linear on packed weights, or why it stays as it is."""

        def no(code: str, text: str) -> Reason:
            return Reason(code, text, site.source)

        if left := self._left(site):
            return left
        parts = operands_of(site.anchor)
        weight = None if parts is None else real(parts.weight)
        if parts is None or weight is None:
            return no("computed-weight", "its weight is computed, as from another library's codes; it is left alone")
        if type(weight) not in (Tensor, nn.Parameter):
            return no("other-library", f"its weight is a {type(weight).__name__}, a form of another library")
        nodes = [parts.input, parts.weight, site.anchor, *([] if parts.bias is None else [parts.bias])]
        if len({value(n).dtype for n in nodes}) > 1:
            return no("mixed-dtypes", "it reads and writes different dtypes, as under autocast")
        if weight.dtype not in DTYPES or weight.ndim != 2 or (parts.bias is not None and len(shape(parts.bias)) != 1):
            return no("not-supported", f"its weight is {weight.dtype} {tuple(weight.shape)}, or its bias no vector")
        if wants_gradients(site.anchor.graph):
            return no("gradients", "gradients are needed, and packed weights have none; use torch.no_grad()")
        if not ops.has_launcher("quantized_linear", weight.device.type):
            return no("no-kernel", f"there is no kernel for {weight.device.type}")
        # What was prepared from a discarded weight was in range.
        if discarded.name_of(weight) is None and (why := self.out_of_range(weight)):
            return no("range", why)
        rows, form = weight.t() if parts.flipped else weight, self.weight_form
        record: Record | None = site.record
        if self.method == "rtn" or site.role == "head":
            record = None
        elif record is None:
            return no("no-plan", f"no plan says how {self.method} rounds here; see effcompile.calibrate")
        elif dict(record.options) != json.loads(self.text):
            told = f"made with {dict(record.options)}, and here {json.loads(self.text)} is asked for"
            return no("other-options", f"the plan was {told}")
        else:
            check_weights(record, {"linear": weight})

        def make() -> dict[str, Tensor]:
            if record is not None:
                own = self._recorded(record, rows.shape[0], rows.shape[1])
                return {name: t.to(weight.device) for name, t in own.items()}
            return form.tensors("weight", rows)

        def emit(graph: fx.Graph) -> fx.Node:
            key = f"{self.name} {form.text} {parts.flipped}" if record is None else record.text
            own = {n: constant(graph, t, parts.input) for n, t in prepared(key, [weight], make).items()}
            for name, node in own.items():
                # Codes of a plan are not copied, if they are where the weight is.
                node.meta[LENT] = None if record is None else record.tensors[name.removeprefix("weight ")]
            target, *arguments = form.call("weight", own, parts.input, rows.shape[0], parts.bias)
            return graph.call_function(target, tuple(arguments))

        (outputs, inputs), itemsize = rows.shape, weight.dtype.itemsize
        dense = low_rank_ops.linear_cost(cost.B * cost.T, outputs, inputs, itemsize=itemsize, bias=False)
        return Rewrite(
            self.form,
            emit,
            weights=((site.module, parts.weight, weight),),
            cost=(dense, dense + form.change(outputs, inputs, itemsize)),
            rows=shape(parts.input)[:-1],
            operators=(OperatorProgram("quantized_linear", weight.dtype),),
        )

    @property
    def form(self) -> str:
        """Bits, group and method, for the report."""
        return f"{self.weight_form.text} {self.method}"

    @property
    def weight_form(self) -> WeightForm:
        """Bits and groups, for every form that linears have."""
        return WeightForm(self.bits, self.group, self.symmetric)

    def _left(self, site: LinearSite) -> Reason | None:
        """Why a linear is not taken, as far as that lies in what it is for."""
        if self.bits == 16:
            return Reason("nothing-to-do", "with 16 bits weights stay as they are", site.source)
        if site.role == "head" and not self.head:
            text = "this linear makes logits, or shares the embedding's weight; head=True takes it too"
            return Reason("head", text, site.source)
        if site.role == "router":
            return Reason("router", "this linear chooses experts, and a rounding changes which", site.source)
        if site.role == "adapter":
            text = "it is half of an adapter: little to read, and trained beside the weight; it stays as it is"
            return Reason("adapter", text, site.source)
        return None

    def keeps(self, site: LinearSite, weights: Weights) -> WeightForm | Reason:
        """How another method keeps the ``weights`` that it has in the place of this linear: in few bits, or why not."""

        def no(code: str, text: str) -> Reason:
            return Reason(code, text, site.source)

        if left := self._left(site):
            return left
        if self.method != "rtn" and site.role != "head":
            text = (
                f"{self.method} has learned codes of the weight as it was, and another method has put weights of its "
                "own there; method='rtn' rounds those, by a rule or a decorator here, or without these records"
            )
            return no("learned-rounding", text)
        dtype, device = value(site.anchor).dtype, value(site.anchor).device
        if dtype not in DTYPES:
            return no("not-supported", f"its weights are {dtype}")
        if not ops.has_launcher("quantized_linear", device.type):
            return no("no-kernel", f"there is no kernel for {device.type}")
        for weight in weights():
            if weight.numel() and (text := self.out_of_range(weight)):
                return no("range", text)
        return self.weight_form

    def _recorded(self, record: Record, outputs: int, inputs: int) -> dict[str, Tensor]:
        """The codes of a plan. Raises :class:`~effcompile.runtime.plan.PlanError` if they do not fit the weight."""
        blocks, groups = -(-outputs // weight_ops.LANES), -(-inputs // self.group)
        side = blocks, groups, weight_ops.LANES
        found = {"codes": record.tensor("codes", blocks, groups, self.group * self.bits // 8, weight_ops.LANES)}
        found |= {n: record.tensor(n, *side) for n in ("scales", "zeros")[: 1 if self.symmetric else 2]}
        return {f"weight {name}": t for name, t in found.items()}

    @property
    def clipped(self) -> bool:
        """Whether ranges are clipped before codes are learned."""
        return self.method == "cbq" if self.clip is None else self.clip

    def make(self, weight: Tensor, moments: Tensor | None) -> Rounding | None:
        """What learns the codes of ``weight``; None if it stays as it is. With ``moments`` of its inputs: clipped."""
        if weight.ndim != 2 or weight.dtype not in DTYPES or self.out_of_range(weight):
            return None
        return ROUNDINGS[self.method](weight, self.bits, self.group, self.symmetric, moments)

    def out_of_range(self, weight: Tensor) -> str:
        """Why scales in fp16 are no good for ``weight``, or ''."""
        largest = float(weight.detach().abs().amax())
        if not largest <= torch.finfo(torch.float16).max:
            return f"its weights reach {largest:g}, and scales are fp16"
        if 0 < largest / 2**self.bits < NORMAL:
            return f"its weights are at most {largest:g}, and scales in fp16 would lose digits"
        return ""
