"""The tables of ``tucka count``, or the same numbers as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tucka.core.counts import MethodCounts, count_parameters
from tucka.core.counts.paper_tables import PaperCell, paper_counts

__all__ = ["show_comparison", "show_paper"]

# Left out of the column of sizes: the default, and what a line below the table says.
_UNREMARKABLE = (("routing", "batch"), ("variant", "paper"))


def show_comparison(
    pairs: Sequence[tuple[int, int]], rows: Sequence[MethodCounts], *, tokens: int, dtype: str, as_json: bool
) -> None:
    """Print what methods cost, a row each."""
    if as_json:
        report = {"layers": pairs, "tokens": tokens, "dtype": dtype, "methods": [asdict(row) for row in rows]}
        typer.echo(json.dumps(report, indent=2))
        return
    shapes = ", ".join(f"{times} of {width}x{out}" for (width, out), times in Counter(pairs).items())
    table = _table(f"{len(pairs)} layers: {shapes}", left=("method", "sizes"))
    for heading in ("parameters", "share\nof full", "multiply-adds\nper token", "file\nbytes", "kept bytes\nper token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        short = (row.forward / tokens, row.file_bytes, row.activation_bytes / tokens)
        exact = (row.method, _sizes(row.sizes), f"{row.parameters:,}", f"{row.share:.2%}")
        table.add_row(*exact, *map(_short, short))
    Console().print(table)
    typer.echo(f"{dtype}, {tokens:,} tokens in a forward, which share what it does once.")
    own = _short(count_parameters("full", pairs))
    typer.echo(f"Multiply-adds: of the forward's matrix products, beyond the layers' own {own} per token.")
    typer.echo("Kept: from forward to backward, beyond what the frozen layers keep.")


def show_paper(*, as_json: bool) -> None:
    """Print the cells of the paper's column "# Par.", counted again."""
    cells = paper_counts()
    if as_json:
        extra = [{"agrees": cell.agrees, "other_sizes": cell.other_sizes()} for cell in cells]
        typer.echo(json.dumps([asdict(cell) | more for cell, more in zip(cells, extra, strict=True)], indent=2))
        return
    table = _table('The paper\'s column "# Par.", counted again', left=("table", "model", "method", "sizes"))
    for heading in ("paper", "counted", "agrees"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in cells:
        verdict = "yes" if cell.agrees else "no"
        shown = (cell.model, cell.method, _sizes(cell.sizes), cell.figure, f"{cell.count:,}", verdict)
        table.add_row(str(cell.table), *shown)
    Console().print(table)
    for cell in cells:
        if not cell.agrees:
            typer.echo(_remark(cell))
    typer.echo("OFT is counted with full blocks and an output scale, as the paper does; PEFT 0.21's OFT is smaller.")


def _remark(cell: PaperCell) -> str:
    changes = [(name, sizes[name]) for sizes in cell.other_sizes() for name in sizes if sizes[name] != cell.sizes[name]]
    found = " or ".join(f"{name}={value}" for name, value in changes)
    return (
        f"Table {cell.table}, {cell.method} {_sizes(cell.sizes)}: {cell.figure} does not follow from these sizes. "
        f"It would follow from {found} instead, which the paper does not state."
    )


def _table(title: str, *, left: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, collapse_padding=True)
    for heading in left:
        table.add_column(heading, no_wrap=heading != "sizes", overflow="fold")
    return table


def _sizes(sizes: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in sizes.items() if (name, value) not in _UNREMARKABLE)


def _short(number: float) -> str:
    """Write a number with three digits and its decimal unit: 1.23M."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:#.3g}".rstrip(".") + unit if unit else f"{number:.3g}"
        number /= 1000
    return f"{number:,.3g}T"
