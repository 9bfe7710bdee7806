"""``tucka count``: what adapters cost on given layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from tucka.checks import check_choice
from tucka.cli.layer_lists import layers_of_model, parse_layers
from tucka.cli.tables import show_comparison, show_paper
from tucka.core.counts import compare_methods
from tucka.errors import ConfigError, expected
from tucka.spec import TuckerSpec

__all__ = ["count_adapters"]

_SPEC = TuckerSpec()  # the defaults
_ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def count_adapters(
    layers: Annotated[str | None, typer.Option(help="The adapted layers: 768x768*3,768x3072,3072x768.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="How many times the list of layers is taken.")] = 1,
    model: Annotated[
        str | None, typer.Option(help="Instead: a folder with a model's config.json, or a name on the hub.")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="With --model: last parts of layer names: query,value,dense. Default: all.")
    ] = None,
    r: Annotated[int, typer.Option(help="Rank of tucka, lora, dora and hra.")] = _SPEC.rank,
    k: Annotated[int, typer.Option(help="Expert groups.")] = _SPEC.groups,
    t: Annotated[int, typer.Option(help="Experts in a group.")] = _SPEC.experts_per_group,
    p: Annotated[int, typer.Option(help="Rank of the expert mode.")] = _SPEC.expert_rank,
    routing: Annotated[str, typer.Option(help="batch, sample or token.")] = _SPEC.routing,
    rotation: Annotated[
        bool, typer.Option("--rotation", help="tucka with the rotation that adapters have by default.")
    ] = False,
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
    sources = {"--layers": layers, "--model": model, "--paper": paper or None}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise ConfigError(expected("arguments", f"one of {', '.join(sources)}", " and ".join(given) or "none"))
    if paper:
        show_paper(as_json=as_json)
        return
    check_choice("--dtype", dtype, tuple(_ITEM_SIZES))
    pairs = _layers(layers, repeat, model, targets)
    ranked, blocks = {"r": r}, {"block_size": block_size}
    sizes: dict[str, Mapping[str, Any]] = {
        "tucka": {**ranked, "k": k, "t": t, "p": p, "routing": routing, **({"rotation": True} if rotation else {})},
        "lora": ranked,
        "dora": ranked,
        "vera": {"r": vera_r},
        "oft": blocks,
        "boft": blocks,
        "hra": ranked,
        "full": {},
    }
    chosen = _chosen(methods, sizes)
    narrowest = min(width for width, _ in pairs)
    if "tucka" in chosen and 1 <= narrowest < r:
        rule = f"at most the smallest input width, {narrowest}, for tucka"
        raise ConfigError(expected("--r", rule, r, cure="Lower --r, or leave tucka out with --methods lora,dora"))
    # Methods in blocks do not fit every width. A comparison of all methods leaves them out and says so; where the user
    # named such a method, counting it raises.
    left_out = [] if methods else [name for name in chosen if not _blocks_fit(chosen[name], pairs)]
    counted = {name: own for name, own in chosen.items() if name not in left_out}
    of_samples = samples if routing == "sample" else None
    rows = compare_methods(pairs, counted, tokens=tokens, samples=of_samples, itemsize=_ITEM_SIZES[dtype])
    show_comparison(pairs, rows, tokens=tokens, dtype=dtype, as_json=as_json)
    if left_out and not as_json:
        names = " and ".join(left_out)
        typer.echo(
            f"Left out: {names}, whose block_size={block_size} does not divide every input width; see --block-size."
        )


def _layers(layers: str | None, repeat: int, model: str | None, targets: str | None) -> list[tuple[int, int]]:
    if model is None:
        if targets is not None:
            raise ConfigError(expected("--targets", "--model beside it", "--layers"))
        return parse_layers(layers or "", repeat=repeat)
    if repeat != 1:
        raise ConfigError(expected("--repeat", "--layers beside it", "--model"))
    return layers_of_model(model, _split(targets))


def _chosen(methods: str | None, sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    names = _split(methods) or list(sizes)
    for name in names:
        check_choice("--methods", name, tuple(sizes))
    return {name: sizes[name] for name in names}


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",")] if text else []


def _blocks_fit(sizes: Mapping[str, Any], pairs: Sequence[tuple[int, int]]) -> bool:
    block = sizes.get("block_size", 1)
    return block < 1 or all(width % block == 0 for width, _ in pairs)
