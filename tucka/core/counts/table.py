"""The one table of counted methods: which sizes each takes, and its formulas. A new method is one entry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from tucka.checks import check_choice, check_count, check_keywords
from tucka.core.counts.costs import Cost, Layer, Sizes
from tucka.core.counts.low_rank import dora_cost, full_cost, lora_cost, vera_cost, vera_projection_cost
from tucka.core.counts.orthogonal import boft_cost, hra_cost, oft_cost
from tucka.core.counts.tucker import router_cost, tucker_cost
from tucka.errors import ConfigError, expected
from tucka.spec import LETTERS, Routing, TuckerSpec

__all__ = ["METHODS", "Method", "Size", "checked_layers", "checked_sizes", "total_cost"]


@dataclass(frozen=True)
class Size:
    """The rule of one size."""

    default: Any = None  # None if the size must be given
    choices: tuple[Any, ...] = ()  # none: a whole number of at least 1
    divides_inputs: bool = False  # whether every layer's input width must be a multiple of it

    def check(self, name: str, value: Any, *, where: str) -> Any:
        """Return `value` as a plain one if the rule allows it."""
        if not self.choices:
            return check_count(name, value, where=where)
        return check_choice(name, value, self.choices, where=where)


@dataclass(frozen=True)
class Method:
    """A counted method."""

    sizes: Mapping[str, Size]  # by their names in the method's configuration
    layer_cost: Callable[[Layer, Sizes], Cost]
    shared_cost: Callable[[Sequence[Layer], Sizes], Cost] | None = None  # of what all layers share


_SPEC = TuckerSpec()
_RANK = {"r": Size()}
_BLOCKS = {"block_size": Size(divides_inputs=True), "variant": Size("peft", ("peft", "paper"))}

METHODS: Mapping[str, Method] = {
    "tucka": Method(
        {
            **{letter: Size(getattr(_SPEC, name)) for name, letter in LETTERS.items()},
            "routing": Size(_SPEC.routing, get_args(Routing)),
            "pinned": Size(False, (False, True)),
            "rotation": Size(False, (False, True)),
        },
        tucker_cost,
        router_cost,
    ),
    "lora": Method(_RANK, lora_cost),
    "dora": Method(_RANK, dora_cost),
    "vera": Method(_RANK, vera_cost, vera_projection_cost),
    "oft": Method(_BLOCKS, oft_cost),
    "boft": Method(_BLOCKS, boft_cost),
    "hra": Method(_RANK, hra_cost),
    "full": Method({}, full_cost),
}


def checked_layers(layers: Iterable[tuple[int, int]], *, where: str) -> tuple[Layer, ...]:
    """Return `layers` as pairs of ints, or say which of them is none."""
    given: Any = layers
    rule = "pairs (in, out) of widths, at least one"
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ConfigError(expected("layers", rule, repr(given), where=where))
    listed = list(given)
    if not listed:
        raise ConfigError(expected("layers", rule, "none", where=where))
    return tuple(_checked_layer(f"layers[{index}]", layer, where) for index, layer in enumerate(listed))


def _checked_layer(name: str, layer: Any, where: str) -> Layer:
    if isinstance(layer, (str, bytes)) or not isinstance(layer, Sequence) or len(layer) != 2:
        raise ConfigError(expected(name, "a pair (in, out) of widths", repr(layer), where=where))
    return check_count(f"{name}[0]", layer[0], where=where), check_count(f"{name}[1]", layer[1], where=where)


def checked_sizes(method: str, sizes: Sizes, layers: Sequence[Layer], *, where: str) -> Sizes:
    """Return all sizes of a method, its defaults filled in, or say which one the layers or the method do not allow."""
    check_choice("method", method, tuple(METHODS), where=where)
    rules = METHODS[method].sizes
    check_keywords(f"{where} for {method!r}", sizes, rules, also_called=LETTERS)
    full = {}
    for name, size in rules.items():
        if name not in sizes and size.default is None:
            raise ConfigError(expected(name, f"a whole number of at least 1 for {method!r}", "nothing", where=where))
        full[name] = size.check(name, sizes.get(name, size.default), where=where)
        for index, (width, _) in enumerate(layers if size.divides_inputs else ()):
            if width % full[name]:
                divisor = f"a divisor of the input width {width} of layers[{index}]"
                raise ConfigError(expected(name, divisor, full[name], where=where))
    return full


def total_cost(method: str, layers: Iterable[tuple[int, int]], sizes: Sizes, *, where: str) -> Cost:
    """Add up the cost of a method on all layers and of what they share, after checking every number."""
    pairs = checked_layers(layers, where=where)
    full = checked_sizes(method, sizes, pairs, where=where)
    entry = METHODS[method]
    total = Cost() if entry.shared_cost is None else entry.shared_cost(pairs, full)
    for layer in pairs:
        total += entry.layer_cost(layer, full)
    return total
