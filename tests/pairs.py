"""All pairs of values of all axes, in few cases."""

from __future__ import annotations

import itertools
from typing import Any


def pairwise(**axes: list[Any]) -> list[dict[str, Any]]:
    """Cases such that any two values of any two axes meet in one. Greedy, and the same every time.

    >>> len(pairwise(a=[1, 2, 3], b=[1, 2], c=[1, 2]))
    6
    """
    names = list(axes)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in range(len(axes[a]))
        for y in range(len(axes[b]))
    }
    cases = []
    while missing:
        chosen: dict[str, int] = dict(min(missing))
        for name in names:
            if name not in chosen:
                gains = [
                    sum(
                        tuple(sorted([(name, v), item], key=lambda p: names.index(p[0]))) in missing
                        for item in chosen.items()
                    )
                    for v in range(len(axes[name]))
                ]
                chosen[name] = gains.index(max(gains))
        picked = [(name, chosen[name]) for name in names]
        missing -= set(itertools.combinations(picked, 2))
        cases.append({name: axes[name][chosen[name]] for name in names})
    return cases
