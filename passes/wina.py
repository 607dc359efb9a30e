"""WINA: input channels that say little in a linear, by their size and its weights, are not multiplied.

Paper: WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference (Chen et al., ICLR 2026,
arXiv 2505.19427), section 3.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from effcompile.kernels.ffn import FeedForward
from effcompile.passes.teal import Teal, weights_of


@dataclasses.dataclass(frozen=True)
class Wina(Teal):
    """Drop, for each token, the input channels that say little in a linear: ``|x| * norm of its column <= threshold``.

    The norm is that of the weights that a channel is multiplied with (L2). For columns that are orthogonal no other
    choice of as many channels has a smaller error.

    Parameters
    ----------
    sparsity
        Share of the weights that thresholds leave unread on the calibration text, 0 to 1.
    allocation
        ``"uniform"``: this share of the inputs of every linear; ``"greedy"``: shares of their own, as for
        :class:`~effcompile.passes.teal.Teal`.
    transform
        Rotate the inputs of gate and up so that the columns of gate are orthogonal, at one more product of ``[d, d]``
        for each block. The paper rotates the residual stream instead, at two such products for each layer; the
        output of down is not rotated here, and needs no rotation back.

    Notes
    -----
    The paper takes the norms of every linear, as here; its official code those of the first linear of each half of a
    layer, and ones for the others.
    """

    name: ClassVar[str] = "wina"
    paper: ClassVar[str] = "WINA (Chen et al., ICLR 2026)"
    summary: ClassVar[str] = "feed-forward: input channels that say little, by their weights, are not multiplied"

    def scales(self, block: FeedForward) -> dict[str, Tensor]:
        """The norms of the columns."""
        return {part: rows.float().norm(dim=1) for part, rows in weights_of(block).items()}
