"""The attention program: which parts one kernel is assembled from. A value, compared and cached by value."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from effcompile.kernels.form import KVForm

Phase = Literal["decode", "prefill", "select"]

DECODE_ROWS = 16
"""Query rows per key/value head up to which the decode skeleton is used (rows = query length x heads per group)."""

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
HEAD_SIZES = range(16, 257)


@dataclasses.dataclass(frozen=True)
class Predicate:
    """Which keys a query may see, as a rule instead of a tensor.

    Parameters
    ----------
    causal
        Key ``j`` is visible to the query at position ``p`` only if ``j <= p``.
    window
        If given, only if ``j > p - window``.
    key_mask
        Whether a bool ``[B, C]`` operand (padding) hides further keys.
    segments
        Whether an int64 ``[B, C]`` operand says which sequence a token belongs to (packed sequences): key ``j`` is
        visible to the query at position ``p`` only if both belong to the same.
    prefix
        Whether an int64 ``[B]`` operand makes that many keys from the first on visible, whatever ``causal`` says
        (prefix language models; Raffel et al., JMLR 2020, section 3.2.1). Not together with ``window``.
    """

    causal: bool = True
    window: int | None = None
    key_mask: bool = False
    segments: bool = False
    prefix: bool = False

    @property
    def name(self) -> str:
        """For example ``causal``, ``causal_w4096_pad`` or ``full``."""
        words = ["causal" if self.causal else "full"]
        if self.window is not None:
            words.append(f"w{self.window}")
        if self.key_mask:
            words.append("pad")
        words += ["seg"] * self.segments + ["pre"] * self.prefix
        return "_".join(words)


@dataclasses.dataclass(frozen=True)
class ScoreParts:
    """What a score goes through between the product and the softmax, besides the scale and the predicate.

    In the order in which they act. Their values are operands, so that one compiled program serves every layer.

    Parameters
    ----------
    softcap
        ``c * tanh(s / c)`` (Gemma 2, Gemma Team 2024, section 2).
    bias
        A number added to each score: ALiBi (Press et al., ICLR 2022), relative positions (Raffel et al., JMLR 2020).
    sinks
        One more logit for each head, which takes mass in the softmax and gives no value (gpt-oss, OpenAI 2025; the
        attention sinks of Xiao et al., ICLR 2024).

    >>> ScoreParts(softcap=True, sinks=True).name
    'cap_sink'
    """

    softcap: bool = False
    bias: bool = False
    sinks: bool = False

    @property
    def name(self) -> str:
        """The parts that are there, as one word; '' for none."""
        return "_".join(w for w, on in (("cap", self.softcap), ("bias", self.bias), ("sink", self.sinks)) if on)


@dataclasses.dataclass(frozen=True)
class Program:
    """Attention over one layer's store, as a choice of parts.

    ``ratio`` is ``H // G``; ``key_size`` and ``value_size`` are ``D`` and ``E``. Lengths, batch and head counts are not
    part of a program: one compiled program serves every step. ``rotary`` is ``r``, the channels in which keys before
    RoPE are rotated, and 0 for other forms. With ``blocks`` it visits listed blocks only
    (:mod:`effcompile.kernels.blocks`; in decode :mod:`effcompile.kernels.pages`), whose size comes with the lists; a
    prefill then has with ``columns`` single keys besides, with ``positions`` keys that stand elsewhere than their
    slots say (:mod:`effcompile.kernels.columns`), or with ``given`` a mask of pairs, by which partial blocks are
    tested too. What C++ takes as operands that may be absent are parts of a program of a GPU: with ``moved`` queries
    stand elsewhere than last, with ``ranges`` pairs of partial blocks are tested by the keys of each query too
    (:mod:`effcompile.kernels.ranges`), and with ``before`` the result of attention to other keys is taken in. The phase
    ``select`` makes such lists for a decode: of the form it knows what says where a page's keys end
    (:func:`for_select`). Keys that are rebuilt from latents may be ``normed`` before they are rotated.
    """

    phase: Phase
    form: KVForm
    predicate: Predicate
    dtype: torch.dtype
    ratio: int
    key_size: int
    value_size: int
    score: ScoreParts = ScoreParts()
    rotary: int = 0
    blocks: bool = False
    columns: bool = False
    positions: bool = False
    given: bool = False
    moved: bool = False
    ranges: bool = False
    before: bool = False
    normed: bool = False

    @property
    def name(self) -> str:
        """A readable identifier, the name of the generated kernel."""
        size = f"d{self.key_size}" if self.key_size == self.value_size else f"d{self.key_size}e{self.value_size}"
        listed = "blocks" if self.phase == "prefill" else "pages"
        phase, turned = listed if self.blocks else self.phase, f"rot{self.rotary}" if self.rotary else ""
        normed = "norm" if self.normed else ""
        parts = "_col" * self.columns + "_pos" * self.positions + "_given" * self.given
        parts += "_moved" * self.moved + "_ranges" * self.ranges + "_before" * self.before
        rule = "_".join(filter(None, (self.predicate.name, self.score.name, turned, normed)))
        verb = "select" if self.phase == "select" else f"attend_{phase}"
        return f"{verb}{parts}_{self.form.name}_{size}_h{self.ratio}_{DTYPES[self.dtype]}_{rule}"

    @classmethod
    def for_select(cls, form: KVForm, dtype: torch.dtype, ratio: int, size: int, unit: int | None) -> Program:
        """Ranking pages by bounds: those of groups that are packed per channel, or of every ``unit`` tokens."""
        ends = form if unit is None else KVForm(16, 16, unit, 0)
        return cls("select", ends, Predicate(), dtype, ratio, size, size)

    @staticmethod
    def phase_for(queries: int, ratio: int) -> Phase:
        """Decode while the rows that share a key/value head are few, else prefill."""
        return "decode" if queries * ratio <= DECODE_ROWS else "prefill"


BY_MASS = Program.for_select(KVForm(), torch.float32, 1, 16, 16)
"""Ranking pages by their mass. Nothing is read but that, so one program serves all."""


@dataclasses.dataclass(frozen=True)
class StoreProgram:
    """Quantise-and-append for one layer's store, as a choice of parts."""

    form: KVForm
    dtype: torch.dtype
    key_size: int
    value_size: int
    rotary: int = 0

    @property
    def name(self) -> str:
        """A readable identifier, the name of the generated kernel."""
        turned = f"_rot{self.rotary}" if self.rotary else ""
        return f"store_{self.form.name}_d{self.key_size}e{self.value_size}_{DTYPES[self.dtype]}{turned}"


@dataclasses.dataclass(frozen=True)
class OperatorProgram:
    """The kernels of an ``effcompile::`` operator that are written by hand and serve all sizes, for one dtype."""

    operator: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The operator and the dtype, such as ``grouped_ffn_bf16``."""
        return f"{self.operator}_{DTYPES.get(self.dtype, self.dtype)}"
