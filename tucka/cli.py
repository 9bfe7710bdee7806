"""The command line: ``tucka count`` and ``tucka demo``. The only module that prints."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tucka import __version__
from tucka.checks import check_choice
from tucka.core.counts import MethodCounts, compare_methods, count_parameters
from tucka.core.counts.paper_tables import PaperCell, paper_counts
from tucka.errors import ConfigError, TuckaError, expected
from tucka.layer_lists import layers_of_folder, parse_layers

__all__ = ["app", "run"]

app = typer.Typer(
    name="tucka",
    help="Tucker-structured expert adapters.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Left out of the tables: the default, and what a line below the table says.
_UNREMARKABLE = (("routing", "batch"), ("variant", "paper"))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; whatever is wrong with the arguments is said in one line.

    Parameters
    ----------
    arguments : sequence of str, optional
        The process's own if None.

    Returns
    -------
    int
        The exit code: 0, 1 for a run that failed, 2 for wrong arguments or missing packages, 130 after Ctrl-C.
    """
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="tucka", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("tucka: interrupted", err=True)
        return 130
    except Exception as error:
        # Usage errors. Their class lives in click or in typer, depending on typer's version.
        if not hasattr(error, "format_message"):
            raise
        typer.echo(f"tucka: {_one_line(error.format_message())}", err=True)
        return 2
    return code if isinstance(code, int) else 0


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _stop(message: object, code: int) -> NoReturn:
    typer.echo(f"tucka: {_one_line(message)}", err=True)
    raise typer.Exit(code)


@contextmanager
def _failures_in_one_line() -> Iterator[None]:
    try:
        yield
    except TuckaError as error:
        _stop(error, 2)
    except KeyboardInterrupt:
        _stop("interrupted", 130)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tucka {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def count(
    layers: Annotated[str | None, typer.Option(help="The adapted layers: 768x768*3,768x3072,3072x768.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="How often the list of layers follows itself.")] = 1,
    model: Annotated[Path | None, typer.Option(help="Instead: a folder with a Hugging Face config.json.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="With --model: last parts of layer names: query,value,dense. Default: all.")
    ] = None,
    r: Annotated[int, typer.Option(help="Rank of tucka, lora, dora and hra.")] = 8,
    k: Annotated[int, typer.Option(help="Expert groups.")] = 2,
    t: Annotated[int, typer.Option(help="Experts in a group.")] = 2,
    p: Annotated[int, typer.Option(help="Rank of the expert mode.")] = 2,
    routing: Annotated[str, typer.Option(help="batch, sample or token.")] = "batch",
    vera_r: Annotated[int, typer.Option(help="Rank of vera's random projections.")] = 256,
    block_size: Annotated[int, typer.Option(help="Blocks of oft and boft; divides every input width.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens in one forward; they share what is done once in it.")] = 2048,
    samples: Annotated[int, typer.Option(help="Samples in one forward, for --routing sample.")] = 16,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    methods: Annotated[str | None, typer.Option(help="Only these methods: tucka,lora.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="Instead: the paper's tables, counted again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare what adapters cost, before any is built."""
    ranked, blocks = {"r": r}, {"block_size": block_size}
    sizes: dict[str, Mapping[str, Any]] = {
        "tucka": {**ranked, "k": k, "t": t, "p": p, "routing": routing},
        "lora": ranked,
        "dora": ranked,
        "vera": {"r": vera_r},
        "oft": blocks,
        "boft": blocks,
        "hra": ranked,
        "full": {},
    }
    with _failures_in_one_line():
        sources = {"--layers": layers, "--model": model, "--paper": paper or None}
        given = [name for name, value in sources.items() if value is not None]
        if len(given) != 1:
            raise ConfigError(expected("arguments", f"one of {', '.join(sources)}", " and ".join(given) or "none"))
        if paper:
            return _show_paper(as_json)
        check_choice("--dtype", dtype, tuple(_ITEM_SIZES))
        pairs = _read_layers(layers, repeat, model, targets)
        chosen = _chosen(methods, sizes)
        # Methods in blocks do not fit every width. In a comparison of all that is a remark; asked for, it is an error.
        left_out = [] if methods else [name for name in chosen if not _blocks_fit(chosen[name], pairs)]
        rows = compare_methods(
            pairs,
            {name: chosen[name] for name in chosen if name not in left_out},
            tokens=tokens,
            samples=samples if routing == "sample" else None,
            itemsize=_ITEM_SIZES[dtype],
        )
    _show_comparison(pairs, rows, tokens=tokens, dtype=dtype, as_json=as_json)
    if left_out and not as_json:
        names = " and ".join(left_out)
        typer.echo(
            f"Left out: {names}, whose block_size={block_size} does not divide every input width; see --block-size."
        )
    return None


@app.command()
def demo(
    full: Annotated[bool, typer.Option("--full", help="Train on all sentences instead of a sample.")] = False,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    fetch_only: Annotated[bool, typer.Option("--fetch-only", help="Only fetch the sentences.")] = False,
) -> None:
    """Fine-tune a real encoder on real text with TuckA and with baselines."""
    with _failures_in_one_line():
        try:
            # By name and only here: it needs torch, transformers and more.
            module = importlib.import_module("tucka.demo")
        except ImportError as error:
            _stop(f"the demo lacks a package ({error}). Install all with: pip install 'tucka[demo]'", 2)
        try:
            module.run_demo(full=full, out=out, seed=seed, fetch_only=fetch_only)
        except module.DemoError as error:
            _stop(error, 1)


def _read_layers(layers: str | None, repeat: int, model: Path | None, targets: str | None) -> list[tuple[int, int]]:
    if model is None:
        if targets is not None:
            raise ConfigError(expected("--targets", "--model beside it", "--layers"))
        return parse_layers(layers or "", repeat=repeat)
    if repeat != 1:
        raise ConfigError(expected("--repeat", "--layers beside it", "--model"))
    return layers_of_folder(model, _split(targets))


def _blocks_fit(sizes: Mapping[str, Any], pairs: Sequence[tuple[int, int]]) -> bool:
    block = sizes.get("block_size", 1)
    return block < 1 or all(width % block == 0 for width, _ in pairs)


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",")] if text else []


def _chosen(methods: str | None, sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    names = _split(methods) or list(sizes)
    for name in names:
        check_choice("--methods", name, tuple(sizes))
    return {name: sizes[name] for name in names}


def _show_comparison(
    pairs: Sequence[tuple[int, int]], rows: Sequence[MethodCounts], *, tokens: int, dtype: str, as_json: bool
) -> None:
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


def _show_paper(as_json: bool) -> None:
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
        f"It would from {found} instead, which the paper does not state."
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
