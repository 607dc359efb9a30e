"""Weights of several layers as sums of shared ones: matrix PCA of a group, and factors for the rest.

Paper: MASA ("Share Your Attention", arXiv 2508.04581, AAAI 2026), the variant for pretrained models, without training.
For a group of ``G`` layers and one place in them, ``W_l = sum_s c_ls D_s + R_l``: the atoms ``D_s`` are the first
principal components of the ``G`` matrices, orthonormal under the Frobenius product, and ``R_l`` is cut like any weight,
under the second moment of what layer ``l`` reads. How layers are grouped is ours: consecutive ones, as many in each.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effcompile.passes.factors import spectrum
from effcompile.runtime.plan import Record, digest

if TYPE_CHECKING:
    from effcompile.passes.calibrate_linear import _Site
    from effcompile.passes.low_rank import LowRank

Made = tuple[dict[str, Tensor], dict[str, float]]
"""Tensors and numbers of a record."""


def groups_of(places: Sequence[tuple[str, Any]], size: int) -> list[list[int]]:
    """Which of the linears at ``places``, a path and what must be equal in a group, share atoms: their indices.

    Paths of a group differ in the number of the layer alone. Groups are of consecutive layers, of at most ``size``.

    >>> groups_of([("layers.0.q", 8), ("layers.0.k", 4), ("layers.1.q", 8), ("layers.1.k", 8), ("head", 8)], 4)
    [[0, 2], [1], [3], [4]]
    """
    rows: dict[tuple[str, Any], list[tuple[int, int]]] = {}
    for n, (path, kind) in enumerate(places):
        number = re.search(r"(?<=\.)\d+(?=\.)", f".{path}.")
        name = path if number is None else f"{path[: number.start() - 1]}*{path[number.end() - 1 :]}"
        rows.setdefault((name, kind), []).append((0 if number is None else int(number[0]), n))
    found = []
    for row in rows.values():
        row.sort()
        count = -(-len(row) // size)
        ends = [len(row) * k // count for k in range(count + 1)]
        found += [[n for _, n in row[a:b]] for a, b in itertools.pairwise(ends)]
    return sorted(found)


def matrix_pca(weights: Sequence[Tensor], atoms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Atoms ``[S, m, n]``, coefficients ``[G, S]`` and all eigenvalues ``[G]`` of matrices ``[m, n]``, in fp64.

    From the Gram matrix of the group, ``G x G``. There are fewer atoms where the matrices do not span as many
    directions. An atom's entries have the mean square 1, so that it can be rounded to few bits.
    """
    stacked = torch.stack([w.detach().double() for w in weights]).flatten(1)
    values, vectors = torch.linalg.eigh(stacked @ stacked.t())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    atoms = min(atoms, int((values > values[0] * 1e-12).sum()))
    size, roots = math.sqrt(stacked.shape[1]), values[:atoms].sqrt()
    found = (vectors[:, :atoms] / roots).t() @ stacked * size
    return found.view(atoms, *weights[0].shape), vectors[:, :atoms] * roots / size, values


def masa_records(method: LowRank, sites: Sequence[_Site]) -> list[Record]:
    """A record for each linear, with atoms that a group holds together; alone in its group it stays dense."""
    places = [(s.module, (tuple(s.covered.size), str(s.covered.weight.dtype), s.covered.weight.device)) for s in sites]
    records: dict[int, Record] = {}
    for group in groups_of(places, method.group):
        # All of it, or nothing to share: dense.
        dense_ones: list[Made] = [({}, {"layers": float(len(group)), "error": 0.0})] * len(group)
        whole = method.ratio == 1 and method.rank is None
        made = dense_ones if whole or len(group) == 1 else _group(method, [sites[n] for n in group])
        for n, (tensors, numbers) in zip(group, made, strict=True):
            covered = sites[n].covered
            dense = float(covered.rows.numel())
            parameters = {role: digest(t) for role, t in covered.tensors.items()}
            numbers = {"parameters": dense, "dense": dense} | numbers
            options = json.loads(method.text)
            records[n] = Record(sites[n].module, method.name, options, parameters, numbers, tensors)
    return [records[n] for n in range(len(sites))]


def _group(method: LowRank, sites: Sequence[_Site]) -> list[Made]:
    """The best of all numbers of atoms that the budget allows: that of least lost outputs, relative to the whole."""
    count, (outputs, inputs) = len(sites), sites[0].covered.size
    best: tuple[float, list[Made]] | None = None
    tried = range(1, count) if method.atoms is None else [min(method.atoms, count)]
    for atoms in tried:
        rank = method.rank
        if rank is None:
            left = (method.ratio - atoms / count) * outputs * inputs - atoms
            left -= sum(outputs for s in sites if method.bias and s.covered.shift is None) / count
            # Beyond the smaller side there is nothing left to keep.
            rank = min(math.floor(left / (outputs + inputs)) // method.round_to * method.round_to, outputs, inputs)
        if rank < 0:
            continue
        made = _with(method, sites, atoms, rank)
        lost = sum(numbers["error"] ** 2 for _, numbers in made)
        if best is None or lost < best[0]:
            best = lost, made
    if best is None:
        raise ValueError(
            f"ratio={method.ratio} leaves no room for one atom in a group of {count} layers ({sites[0].module} and "
            "others); give a larger ratio, or a larger group."
        )
    return best[1]


def _with(method: LowRank, sites: Sequence[_Site], atoms: int, rank: int) -> list[Made]:
    weights = [site.covered.rows for site in sites]
    dtype = weights[0].dtype
    found, _, _ = matrix_pca(weights, atoms)
    shared = found.to(dtype)
    # Coefficients of atoms as they are stored: the rounding of one is made up for as far as it can be.
    flat = shared.double().flatten(1)
    targets = torch.stack([w.double().flatten() for w in weights])
    coefficients = torch.linalg.lstsq(flat @ flat.t(), flat @ targets.t()).solution.t().float()
    made: list[Made] = []
    for site, weight, row in zip(sites, weights, coefficients, strict=True):
        common = torch.einsum("s,smn->mn", row.double(), shared.double())
        moment = site.inputs.covariance if method.bias else site.inputs.moment
        rest = weight.double() - common
        own: dict[str, Tensor] = {}
        if rank:
            how: Any = {"alpha": method.alpha, "damping": method.damping, "mean": method.bias}
            factors = spectrum(rest, site.inputs, "whitened", **how).factors(rank)
            own = {name: factors[name].to(dtype) for name in ("down", "up")}
            rest = rest - own["up"].double() @ own["down"].double()
        if method.bias:
            own["shift"] = (rest @ site.inputs.mean).to(dtype)
        wide = weight.double()
        lost, whole = (float(((w @ moment) * w).sum().clamp(min=0)) for w in (rest, wide))
        error = math.sqrt(lost / max(whole, torch.finfo(torch.float64).tiny))
        numbers = {"layers": float(len(sites)), "atoms": float(len(shared)), "rank": float(rank), "error": error}
        numbers["parameters"] = shared.numel() / len(sites) + len(shared) + sum(t.numel() for t in own.values())
        made.append(({"atoms": shared, "coefficients": row.clone(), **own}, numbers))
    return made


def materialized(tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight that a record stands for, fp64 ``[m, n]``."""
    weight = torch.einsum("s,smn->mn", tensors["coefficients"].double(), tensors["atoms"].double())
    return weight + tensors["up"].double() @ tensors["down"].double() if "up" in tensors else weight
