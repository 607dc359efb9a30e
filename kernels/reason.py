"""Typed reasons: why a site was left as it is."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Reason:
    """One condition that failed, in the words of the user's model.

    Parameters
    ----------
    code
        A stable kebab-case word for programs and golden files, such as ``mask-unknown`` or ``no-compressed-cache``.
    text
        What was found, what was expected, and what to do about it.
    source
        The line in the user's model, ``file:line: code``, where it is known.
    """

    code: str
    text: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.code}: {self.text}" + (f" ({self.source})" if self.source else "")
