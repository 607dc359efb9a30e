"""A feed-forward block as numbers: ``down(act(gate x) * up x)``, gated or not, in plain PyTorch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
"""Activations by name; ``gelu_tanh`` is ``gelu`` with ``approximate="tanh"``, ``relu2`` its square."""


@dataclasses.dataclass(frozen=True, eq=False)
class FeedForward:
    """The weights of a block, each with a neuron to a row, and what it does with them.

    Parameters
    ----------
    up, gate
        ``[F, d]``; ``gate`` is None for a block without one, ``down(act(up x))``.
    down
        ``[F, d_out]``: column ``n`` of the linear is what neuron ``n`` writes.
    up_bias, gate_bias
        ``[F]`` or None.
    down_bias
        ``[d_out]`` or None.
    activation
        A name of :data:`ACTIVATIONS`.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None
    activation: str
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def width(self) -> int:
        """Neurons."""
        return self.up.shape[0]

    @property
    def inputs(self) -> int:
        """Channels that go in."""
        return self.up.shape[1]

    def middle(self, x: Tensor) -> Tensor:
        """What the neurons say of rows ``[n, d]``: ``[n, F]``."""
        act, up = ACTIVATIONS[self.activation], F.linear(x, self.up, self.up_bias)
        return act(up) if self.gate is None else act(F.linear(x, self.gate, self.gate_bias)) * up

    def __call__(self, x: Tensor) -> Tensor:
        """The block's output for rows ``[n, d]``: ``[n, d_out]``."""
        return F.linear(self.middle(x), self.down.t(), self.down_bias)

    def neurons(self, chosen: Tensor) -> FeedForward:
        """The block of these neurons alone, in this order; the last bias stays."""

        def some(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[chosen.to(t.device, torch.long)]

        up, down = some(self.up), some(self.down)
        assert up is not None
        assert down is not None
        return dataclasses.replace(
            self, up=up, down=down, gate=some(self.gate), up_bias=some(self.up_bias), gate_bias=some(self.gate_bias)
        )

    def normalised(self) -> FeedForward:
        """Rows of gate and up of length 1, in fp32, and so their biases."""
        biases = (None if b is None else b.float() for b in (self.up_bias, self.gate_bias))
        gate = None if self.gate is None else F.normalize(self.gate.float(), dim=-1)
        up, (up_bias, gate_bias) = F.normalize(self.up.float(), dim=-1), biases
        return dataclasses.replace(self, up=up, gate=gate, up_bias=up_bias, gate_bias=gate_bias)
