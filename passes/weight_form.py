"""How the weights of linears are kept, whichever method puts those into a graph: as they are, or in few bits.

Few bits are no method beside others but what ``quantize_weights`` says of each linear of the user's. The driver asks it
on behalf of a form (``site.few_bits``), and the form prepares, calls and counts its own linears by the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, fx

from effcompile.kernels import weight_ops
from effcompile.kernels.cost import Cost
from effcompile.kernels.reason import Reason
from effcompile.patterns.site import Site
from effcompile.patterns.walk import aten

Weights = Callable[[], Iterable[Tensor]]
"""Gives the weights that a form has in the place of one linear; asked only where they would be in few bits."""


@dataclasses.dataclass(frozen=True)
class WeightForm:
    """How a weight ``[N, K]`` is kept: as it is with 16 bits, or rounded to nearest in groups of inputs."""

    bits: int = 16
    group: int = 32
    symmetric: bool = False

    @property
    def text(self) -> str:
        """For reports, and for the names of what is prepared: ``w4g32``, or ``dense``."""
        return "dense" if self.bits == 16 else f"w{self.bits}g{self.group}{' symmetric' * self.symmetric}"

    def tensors(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """What is read of ``weight`` ``[N, K]``, by names that begin with ``name``; :meth:`call` finds it there."""
        if self.bits == 16:
            return {name: weight.contiguous()}
        found = weight_ops.round_to_nearest(weight.detach(), self.bits, self.group, self.symmetric)
        packed = weight_ops.pack(*found, self.bits)
        return {f"{name} {part}": t for part, t in packed._asdict().items() if t is not None}

    def call(
        self, name: str, nodes: Mapping[str, fx.Node], x: fx.Node, outputs: int, bias: fx.Node | None
    ) -> tuple[Any, ...]:
        """The linear on what :meth:`tensors` made, which are constants of the graph by now: target, and arguments."""
        if self.bits == 16:
            return aten.linear.default, x, nodes[name], bias
        sides = nodes[f"{name} codes"], nodes[f"{name} scales"], nodes.get(f"{name} zeros")
        return weight_ops.QUANTIZED_LINEAR, x, *sides, bias, outputs, self.bits, self.group

    def nbytes(self, outputs: int, inputs: int, itemsize: int) -> int:
        """Bytes of a weight, with all that fills its last group and its last block of outputs."""
        if self.bits == 16:
            return outputs * inputs * itemsize
        blocks, groups = -(-outputs // weight_ops.LANES), -(-inputs // self.group)
        return blocks * weight_ops.LANES * groups * (self.group * self.bits // 8 + (2 if self.symmetric else 4))

    def change(self, outputs: int, inputs: int, itemsize: int) -> Cost:
        """What it adds to the cost of the dense linear: fewer bytes, and two FLOPs for each number."""
        if self.bits == 16:
            return Cost(0, 0)
        dense = DENSE.nbytes(outputs, inputs, itemsize)
        return Cost(self.nbytes(outputs, inputs, itemsize) - dense, 2 * outputs * inputs)


DENSE = WeightForm()


def asked(site: Site, weights: Mapping[fx.Node, Weights]) -> dict[fx.Node, WeightForm | Reason]:
    """What ``quantize_weights`` says of the linears of a form, by the user's linears in whose place they are.

    Those of which nobody asked anything are left out.
    """
    if site.few_bits is None:
        return {}
    answers = {node: site.few_bits(node, make) for node, make in weights.items()}
    return {node: answer for node, answer in answers.items() if answer is not None}


def form_of(answer: WeightForm | Reason | None) -> WeightForm:
    """The form that an answer comes down to."""
    return answer if isinstance(answer, WeightForm) else DENSE


def told(forms: Iterable[WeightForm]) -> str:
    """What a report adds to the name of a form; nothing if all of its weights are dense.

    >>> told([WeightForm(4), WeightForm(4), WeightForm(8, 64)])
    ', w4g32 and w8g64'
    """
    texts = dict.fromkeys(form.text for form in forms)
    return f", {' and '.join(texts)}" if texts.keys() - {DENSE.text} else ""
