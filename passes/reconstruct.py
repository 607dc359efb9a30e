"""Rounding that is learned on data: blocks of a model are given codes whose outputs are near those of the original.

Papers: FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization (Lee et al., ICML
2023), equation 2 and section 3; CBQ: Cross-Block Quantization for Large Language Models (Ding et al., ICLR 2025),
cross-block reconstruction and low-rank rounding. CBQ has no code that was found; what is not in its text is said at
:class:`LowRank`.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcompile.kernels import weight_ops
from effcompile.kernels.weight_ops import Packed
from effcompile.runtime.plan import digest

RANK = 5
"""Of CBQ's rounding."""

ENDS = tuple(n / 40 for n in range(11))
"""Shares of a group's range that may be cut off at either end of it."""

WINDOW = 2
"""Blocks that CBQ reconstructs together; the next window begins one block later."""


class ReconstructionError(ValueError):
    """The model has no row of blocks that can be reconstructed one after another; says why."""


def through(hard: Tensor, soft: Tensor) -> Tensor:
    """The values of ``hard`` with the gradient of ``soft``."""
    return soft + (hard - soft).detach()


class Rounding(abc.ABC):
    """The codes of one weight ``[N, K]`` while they are learned; at first those of round to nearest.

    A weight is ``s * (code - z)``. The steps ``s`` are learned as logarithms, and ``z`` is not. With ``moments``, the
    mean squares ``[K]`` of the inputs, the ranges of groups are clipped first.
    """

    def __init__(self, weight: Tensor, bits: int, group: int, symmetric: bool, moments: Tensor | None = None) -> None:
        self.outputs, self.inputs = weight.shape
        self.bits, self.levels = bits, 2**bits - 1
        self.rows = weight_ops.grouped(weight, group)
        self.nearest = weight_ops.round_to_nearest(weight, bits, group, symmetric)
        _, scales, zeros = self.nearest
        step = scales.float()
        step = step.where(step > 0, 1)
        self.zero = torch.full_like(step, 2.0 ** (bits - 1)) if zeros is None else -zeros.float() / step
        self.symmetric = symmetric
        if moments is not None:
            step, self.zero = self._clipped(step, moments)
        self.log_step = step.log().requires_grad_()

    def _clipped(self, step: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Steps and zeros of ranges that lose the least, the first of those that are equal.

        A search as in AWQ (Lin et al., MLSys 2024), for both ends. What a group loses is the square of what its weights
        do, each times the moment of its input: the error of an output, if inputs were uncorrelated. Weights outside a
        range become its first or last code.
        """
        each = F.pad(moments.to(self.rows), (0, self.rows[0].numel() - len(moments)))
        each = each.view(1, *self.rows.shape[1:])
        best = torch.full_like(step, torch.inf)
        steps, zeros = step, self.zero
        for low, high in [(n, n) for n in ENDS] if self.symmetric else itertools.product(ENDS, ENDS):
            short = step * (1 - low - high)
            zero = self.zero if self.symmetric else (self.zero - low * self.levels) / (1 - low - high)
            codes = (self.rows / short + zero).round_().clamp_(0, self.levels)
            lost = ((codes - zero) * short).sub_(self.rows).square_().mul_(each).sum(2, keepdim=True)
            less = lost < best
            best, steps, zeros = lost.where(less, best), short.where(less, steps), zero.where(less, zeros)
        return steps, zeros

    @abc.abstractmethod
    def codes(self, step: Tensor) -> Tensor:
        """Codes ``[N, G, g]``, whole numbers with a gradient."""

    @property
    def learned(self) -> list[Tensor]:
        """What an optimiser moves."""
        return [self.log_step]

    def weight(self) -> Tensor:
        """What stands in the place of the weight, ``[N, K]``."""
        step = self.log_step.exp()
        wide = step * (self.codes(step).clamp(0, self.levels) - self.zero)
        return wide.flatten(1)[:, : self.inputs]

    @torch.no_grad()
    def packed(self) -> Packed:
        """What was learned, as the operator takes it."""
        step = self.log_step.exp()
        codes = self.codes(step).round().clamp(0, self.levels).to(torch.uint8)
        return weight_ops.pack(codes, step, None if self.symmetric else -self.zero * step, self.bits)


class FlexRound(Rounding):
    """``round(W / (s * S2 * s3))``: each weight is divided by a number of its own, and each row by one."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.each = torch.zeros_like(self.rows, requires_grad=True)
        self.row = self.rows.new_zeros(self.outputs, 1, 1).requires_grad_()

    @property
    def learned(self) -> list[Tensor]:
        """Steps, and the logarithms of the divisors."""
        return [self.log_step, self.each, self.row]

    def codes(self, step: Tensor) -> Tensor:
        """Codes of the divided weights."""
        wide = self.rows / (step * (self.each + self.row).exp()) + self.zero
        return through(wide.round(), wide)


class LowRank(Rounding):
    """Up or down, as a low-rank matrix says: CBQ's LoRA-Rounding.

    The offset ``A1 A2`` is added to what a weight is above the code below it, and the weight goes up from one half. The
    choice is made as it will be in the end, with the gradient of the clipped sum; in the paper it is a sigmoid, which a
    term of the loss makes hard by and by. An offset moves a weight by one code at most, so ranges are clipped before,
    in the place of the paper's coarse-to-fine truncation of outliers.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        inputs = self.rows.shape[1] * self.rows.shape[2]
        self.left = self.rows.new_zeros(self.outputs, RANK).requires_grad_()
        # The same numbers at every call, whatever was drawn before.
        drawn = torch.randn(RANK, inputs, generator=torch.Generator().manual_seed(0))
        self.right = drawn.to(self.rows.device).requires_grad_()

    @property
    def learned(self) -> list[Tensor]:
        """Steps, and the two factors."""
        return [self.log_step, self.left, self.right]

    def codes(self, step: Tensor) -> Tensor:
        """Codes below, or one more."""
        wide = self.rows / step + self.zero
        below = wide.detach().floor()
        above = wide - below + (self.left @ self.right).view_as(wide)
        return through(below + (above >= 0.5), below + above.clamp(0, 1))


Make = Callable[[Tensor, Tensor | None], Rounding | None]
"""What learns the codes of a weight ``[N, K]``, or None if it stays; with the mean squares ``[K]`` of what it reads."""

ROUNDINGS: dict[str, type[Rounding]] = {"flexround": FlexRound, "cbq": LowRank}
"""By the name of the method."""


@dataclasses.dataclass(eq=False)
class Block:
    """One block of a model: its path, and the weights in it that are learned, by their names in it."""

    path: str
    module: nn.Module
    weights: dict[str, Rounding]
    flipped: frozenset[str]

    def run(self, x: Tensor, call: tuple[tuple[Any, ...], Mapping[str, Any]], made: Mapping[str, Tensor]) -> Tensor:
        """What the block makes of ``x``, with ``made`` in the place of weights."""
        own: dict[str, Any] = {name: p.detach() for name, p in self.module.named_parameters()}
        own |= {name: (w.t() if name in self.flipped else w).to(own[name].dtype) for name, w in made.items()}
        out = torch.func.functional_call(self.module, own, (x, *call[0]), dict(call[1]))
        found: Tensor = out if isinstance(out, Tensor) else out[0]
        return found

    def learning(self) -> dict[str, Tensor]:
        """The weights as they are now, with gradients."""
        return {name: rounding.weight() for name, rounding in self.weights.items()}

    def stored(self, packed: Mapping[str, Packed]) -> dict[str, Tensor]:
        """The weights that packed ones give back."""
        return {
            name: weight_ops.dequantize(packed[name], rounding.outputs, rounding.inputs, rounding.bits)
            for name, rounding in self.weights.items()
        }

    def nearest(self) -> dict[str, Packed]:
        """All weights, rounded to nearest."""
        return {name: weight_ops.pack(*one.nearest, one.bits) for name, one in self.weights.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Learned:
    """What became of one weight: its module, a digest of it, its codes, and the error of its window on the data."""

    module: str
    digest: str
    packed: Packed
    numbers: dict[str, float]


@dataclasses.dataclass(eq=False)
class Text:
    """One batch on its way through the blocks."""

    x: Tensor
    """Outputs of the original blocks so far."""
    own: Tensor
    """Outputs of the blocks in few bits so far."""
    calls: list[tuple[tuple[Any, ...], Mapping[str, Any]]]
    """What each block is called with besides."""
    keep: Tensor | None
    """Tokens that count, bool ``[B, T]``."""

    def kept(self, x: Tensor) -> Tensor:
        """The rows of the tokens that count."""
        return x.flatten(0, -2) if self.keep is None else x[self.keep]


def rows_of_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The longest list of modules that hold linears: the layers of a decoder. Raises :class:`ReconstructionError`."""

    def has_linear(module: nn.Module) -> bool:
        return any(_is_linear(m) for m in module.modules())

    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and all(map(has_linear, m))]
    if not lists:
        raise ReconstructionError("the model has no list of layers")
    return max(lists, key=lambda item: len(item[1]))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def read(
    layers: nn.ModuleList, batches: Iterable[Any], call: Callable[[Any], Any], mask: Callable[[Any], Tensor | None]
) -> list[Text]:
    """Run the model over the data and keep what the first layer reads, and what all are called with besides.

    Raises :class:`ReconstructionError` where a layer does not read what the one before it gives.
    """
    seen: list[tuple[Tensor, tuple[Any, ...], Mapping[str, Any]]] = []
    given: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {name: x for name, x in kwargs.items() if name != "hidden_states"}
        x, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        seen.append((x, rest, named))

    def after(_: nn.Module, __: Any, out: Any) -> None:
        given.append(out if isinstance(out, Tensor) else out[0])

    hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in layers]
    hooks += [m.register_forward_hook(after) for m in layers]
    texts = []
    try:
        for batch in batches:
            seen.clear()
            given.clear()
            with torch.no_grad():
                call(batch)
            chained = all(x[0] is y or torch.equal(x[0], y) for x, y in zip(seen[1:], given))
            if len(seen) != len(layers) or not chained:
                raise ReconstructionError("its layers are not called one after another, each on what the last one gave")
            texts.append(Text(seen[0][0], seen[0][0], [one[1:] for one in seen], mask(batch)))
    finally:
        for hook in hooks:
            hook.remove()
    return texts


def distance(got: Tensor, wanted: Tensor) -> Tensor:
    """Square of the difference, over that of ``wanted``."""
    return F.mse_loss(got.float(), wanted.float()) / wanted.float().square().mean()


def divergence(got: Tensor, wanted: Tensor) -> Tensor:
    """KL of the softmax over channels, mean over tokens."""
    p, q = wanted.float().log_softmax(-1), got.float().log_softmax(-1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def reconstruct(
    layers: nn.ModuleList,
    path: str,
    texts: Sequence[Text],
    make: Make,
    *,
    window: int,
    iterations: int,
    lr: float,
    crossed: bool,
    clipped: bool,
    shown: Callable[[Iterable[Any]], Iterable[Any]],
) -> list[Learned]:
    """Learn the codes of all layers, window by window.

    Each window of layers is optimised to give, on the outputs of what is in few bits already, what the original gives
    on its own. With ``crossed`` also on the original's outputs, and with the divergence of CBQ's loss. With ``clipped``
    ``make`` gets the mean squares of what a linear reads in the original, besides its weight. A layer is done
    when no later window holds it; where what it learned is worse on the data than round to nearest, at the end of its
    window, that stands.
    """
    window = min(window, len(layers))
    taken: list[Block] = []
    found: list[Learned] = []
    for first in shown(range(len(layers) - window + 1)):
        for n in range(first + len(taken), first + window):
            moments = _moments(taken, first, layers[n], texts) if clipped else {}
            taken.append(_block(f"{path}.{n}", layers[n], make, moments))
        with torch.no_grad():
            wanted = [_run(taken, first, text, text.x, [{} for _ in taken]) for text in texts]
        _optimise(taken, first, texts, wanted, iterations, lr, crossed)
        last = first + window == len(layers)
        for n in range(first, len(layers) if last else first + 1):
            found += _finish(taken, n, texts)
            taken.pop(0)
    return found


def _block(path: str, module: nn.Module, make: Make, moments: Mapping[str, Tensor]) -> Block:
    weights, flipped = {}, set()
    for name, inner in module.named_modules():
        if name and _is_linear(inner):
            key = f"{name}.weight"
            turned = not isinstance(inner, nn.Linear)
            weight = inner.weight.detach()
            if (rounding := make(weight.t() if turned else weight, moments.get(name))) is not None:
                weights[key] = rounding
                flipped |= {key} if turned else set()
    return Block(path, module, weights, frozenset(flipped))


@torch.no_grad()
def _moments(before: Sequence[Block], first: int, module: nn.Module, texts: Sequence[Text]) -> dict[str, Tensor]:
    """Mean squares of what the linears of a layer read, by their names in it; those that read nothing are left out."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    keep: Tensor | None = None

    def reads(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: Tensor = (*args, *kwargs.values())[0]
            # Where tokens were gathered, as for an expert, which of them were hidden is not known.
            x = x.flatten(0, -2) if keep is None or x.shape[:-1] != keep.shape else x[keep]
            sums[name] = sums.get(name, 0) + x.float().square().sum(0)
            rows[name] = rows.get(name, 0) + len(x)

        return hook

    linears = [(name, m) for name, m in module.named_modules() if name and _is_linear(m)]
    hooks = [m.register_forward_pre_hook(reads(name), with_kwargs=True) for name, m in linears]
    try:
        for text in texts:
            keep = text.keep
            x = _run(before, first, text, text.x, [{} for _ in before])
            args, kwargs = text.calls[first + len(before)]
            module(x, *args, **kwargs)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: total / rows[name] for name, total in sums.items() if rows[name]}


def _run(blocks: Sequence[Block], first: int, text: Text, x: Tensor, made: Sequence[Mapping[str, Tensor]]) -> Tensor:
    for n, (block, own) in enumerate(zip(blocks, made, strict=True), first):
        x = block.run(x, text.calls[n], own)
    return x


def _rate(step: int, steps: int) -> float:
    """The share of the rate at a step: upwards for a fifth of them, and then down to a twentieth.

    Adam's first steps are as long as the rate whatever the gradient; all weights of a window taking one at once can
    cost more than it began with.

    >>> [round(_rate(step, 10), 2) for step in range(10)]
    [0.33, 0.67, 1.0, 0.88, 0.76, 0.64, 0.53, 0.41, 0.29, 0.17]
    """
    rise = max(1, steps // 5)
    return min((step + 1) / (rise + 1), 0.05 + 0.95 * (steps - step) / (steps - rise)) if steps > rise else 1.0


def _optimise(
    blocks: Sequence[Block], first: int, texts: Sequence[Text], wanted: Sequence[Tensor], iterations: int, lr: float,
    crossed: bool,
) -> None:  # fmt: skip
    learned = [t for block in blocks for one in block.weights.values() for t in one.learned]
    if not learned or not iterations:
        return
    optimiser = torch.optim.Adam(learned, lr)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, iterations))
    order = torch.Generator().manual_seed(first)
    for _ in range(iterations):
        n = int(torch.randint(len(texts), (), generator=order))
        text, target = texts[n], texts[n].kept(wanted[n])
        with torch.enable_grad():
            made = [block.learning() for block in blocks]
            loss = torch.zeros((), device=target.device)
            for x in (text.own, text.x) if crossed else (text.own,):
                got = text.kept(_run(blocks, first, text, x, made))
                loss = loss + distance(got, target)
                if crossed:
                    loss = loss + divergence(got, target)
            grads = torch.autograd.grad(loss, learned)
        for t, grad in zip(learned, grads, strict=True):
            t.grad = grad
        optimiser.step()
        rate.step()


@torch.no_grad()
def _finish(blocks: Sequence[Block], n: int, texts: Sequence[Text]) -> list[Learned]:
    """Take the better of what the first block learned and round to nearest, and move the texts behind it.

    Which is better is seen where it was learned: behind the whole window, with what the others have learned so far.
    """
    block, rest = blocks[0], blocks[1:]
    choices = {"learned": {name: one.packed() for name, one in block.weights.items()}, "nearest": block.nearest()}
    behind = [one.stored({name: r.packed() for name, r in one.weights.items()}) for one in rest]
    wanted = [block.run(text.x, text.calls[n], {}) for text in texts]
    ends = [_run(rest, n + 1, text, x, [{} for _ in rest]) for text, x in zip(texts, wanted, strict=True)]
    outs, errors = {}, {}
    for name, packed in choices.items():
        stored = block.stored(packed)
        outs[name] = [block.run(text.own, text.calls[n], stored) for text in texts]
        got = [_run(rest, n + 1, text, x, behind) for text, x in zip(texts, outs[name], strict=True)]
        parts = [distance(t.kept(x), t.kept(y)) for t, x, y in zip(texts, got, ends, strict=True)]
        errors[name] = float(torch.stack(parts).mean())
    best = "learned" if errors["learned"] <= errors["nearest"] else "nearest"
    for text, x, own in zip(texts, wanted, outs[best], strict=True):
        text.x, text.own = x, own
    numbers = {"error": errors[best], "error_nearest": errors["nearest"]}
    modules = dict(block.module.named_modules())
    return [
        Learned(
            f"{block.path}.{name.removesuffix('.weight')}",
            digest(modules[name.removesuffix(".weight")].weight),
            packed,
            numbers,
        )
        for name, packed in choices[best].items()
    ]
