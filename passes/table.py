"""The report as a table: equal decisions of a row of layers become one line."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from effcompile.passes.report import Decision, Report, quantity

_SEEN = ("error", "density", "kept")
"""Columns that only ``verify`` fills."""


def render(report: Report) -> Group:
    """The table, its notes, and the summary line, for rich."""
    parts: list[Any] = []
    for number, graph in enumerate(report.graphs):
        rows = _grouped([d for d in report.decisions if d.graph == number])
        title = f"graph {number} ({graph.label})"
        if rows:
            parts.append(_table(title, rows))
        else:
            parts.append(Text(f"{title}: no site was found" if graph.note is None else f"{title}: {graph.note}"))
        parts += [Text(f"  {graph.others_line}", style="dim")] * bool(graph.others)
        parts += [Text(f"  {sentence}", style="yellow") for sentence in graph.unmatched]
    if any(d.before is not None for d in report.decisions):
        parts.append(
            Text(
                "Bytes and FLOPs of one site in one call, before > after, at the first call's sizes and a full cache.",
                "dim",
            )
        )
    parts.append(Text(f"{report.model}: {report.summary}", style="bold"))
    return Group(*parts)


def to_text(report: Report) -> str:
    """The same as plain text, as wide as the terminal but at least 110 columns."""
    width = max(110, shutil.get_terminal_size((120, 40)).columns)
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render(report))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _table(title: str, rows: list[list[Decision]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("site", justify="right", no_wrap=True)
    short = all(len(_span_of(row)) <= 40 for row in rows)
    table.add_column("module and source", overflow="fold", no_wrap=short)
    for name in ("rule", "decision"):
        table.add_column(name, overflow="fold")
    for name in ("bytes", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    seen = [name for name in _SEEN if any(getattr(d, name) is not None for row in rows for d in row)]
    for name in seen:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        d = row[0]
        cells: list[Any] = [
            _span([one.site for one in row]),
            Text.assemble(_span_of(row), (f"\n{_place(d.source)}", "dim"), f"\n{d.detail}" * bool(d.detail)),
            Text(d.rule),
            _decision(d),
            _change(d.bytes_before, d.bytes_after),
            _change(d.flops_before, d.flops_after),
        ]
        table.add_row(*cells, *(_measured(row, name) for name in seen))
    return table


def _measured(row: Sequence[Decision], name: str) -> str:
    """What ``verify`` saw at the sites of a row: the largest error, or the least and the largest share."""
    found = [x for d in row if (x := getattr(d, name)) is not None]
    if not found:
        return ""
    if name == "error":
        return f"{max(found):.1e}"
    least, most = f"{min(found):.3f}", f"{max(found):.3f}"
    return least if least == most else f"{least}\nto {most}"


def _grouped(decisions: Sequence[Decision]) -> list[list[Decision]]:
    """Decisions that differ only in the number of the layer, in one list."""
    groups: dict[Any, list[Decision]] = {}
    for d in decisions:
        reason = None if d.reason is None else (d.reason.code, d.reason.text)
        module = re.sub(r"\d+", "#", d.module)
        key = (module, d.rule, d.action, d.form, reason, d.source, d.before, d.after, d.sizes, d.detail)
        groups.setdefault(key, []).append(d)
    return list(groups.values())


def _place(source: str) -> str:
    """``file:line`` without the folders and the code."""
    place = re.match(r"(.*?):(\d+)", source)
    return f"{os.path.basename(place[1])}:{place[2]}" if place else ""


def _decision(d: Decision) -> Text:
    if d.reason is not None:
        return Text.assemble(("left ", "yellow"), (d.reason.code, "bold"), f": {d.reason.text}")
    return Text.assemble(("rewritten ", "green"), d.form)


def _change(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return ""
    return quantity(before) if before == after else f"{quantity(before)}\n> {quantity(after)}"


def _span_of(row: Sequence[Decision]) -> str:
    return spanned([d.module for d in row])


def spanned(modules: Sequence[str]) -> str:
    """Several module paths as one.

    >>> spanned(["model.layers.0.attn", "model.layers.1.attn", "model.layers.2.attn", "model.layers.5.attn"])
    'model.layers.{0-2,5}.attn'
    """
    if len(set(modules)) == 1:
        return modules[0]
    split = [re.split(r"(\d+)", module) for module in modules]
    words = []
    for column in zip(*split, strict=True):
        distinct = list(dict.fromkeys(column))
        words.append(distinct[0] if len(distinct) == 1 else "{" + _span([int(x) for x in distinct]) + "}")
    return "".join(words)


def _span(numbers: Sequence[int]) -> str:
    """``0-2,5`` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
