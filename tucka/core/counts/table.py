"""The one table of counted methods: which sizes each takes, and its formulas. A new method is one entry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from tucka.checks import check_choice, check_count
from tucka.core.counts.costs import Cost, Layer, Sizes
from tucka.core.counts.low_rank import dora_cost, full_cost, lora_cost, vera_cost, vera_projection_cost
from tucka.core.counts.orthogonal import boft_cost, hra_cost, oft_cost
from tucka.core.counts.tucker import router_cost, tucker_cost
from tucka.errors import ConfigError, expected
from tucka.spec import Routing, TuckerSpec

__all__ = ["METHODS", "Method", "Size", "checked_layers", "checked_sizes", "total_cost"]


@dataclass(frozen=True)
class Size:
    """The rule of one size.

    Parameters
    ----------
    default : object
        Its value when it is not given; None if it must be.
    choices : tuple
        The values allowed; a whole number of at least 1 if empty.
    divides_inputs : bool
        Whether every layer's input width must be a multiple of it.

    Examples
    --------
    >>> Size(default=8)
    Size(default=8, choices=(), divides_inputs=False)
    """

    default: Any = None
    choices: tuple[Any, ...] = ()
    divides_inputs: bool = False

    def check(self, name: str, value: Any, *, where: str) -> Any:
        """Return `value` if the rule allows it.

        Parameters
        ----------
        name : str
            The size's name, for the message.
        value : object
            The value given.
        where : str
            The caller, for the message.

        Returns
        -------
        object
            The value, numbers as int.

        Raises
        ------
        ConfigError
            If the rule does not allow it.
        """
        if not self.choices:
            return check_count(name, value, where=where)
        check_choice(name, value, self.choices, where=where)
        return value


@dataclass(frozen=True)
class Method:
    """A counted method.

    Parameters
    ----------
    sizes : mapping of str to Size
        The sizes it takes, by their names in the method's configuration.
    layer_cost : callable
        The cost of one layer: ``layer_cost((d, d'), sizes)``.
    shared_cost : callable, optional
        The cost of what all layers share: ``shared_cost(layers, sizes)``.

    Examples
    --------
    >>> sorted(METHODS["tucka"].sizes)
    ['k', 'p', 'pinned', 'r', 'routing', 't']
    """

    sizes: Mapping[str, Size]
    layer_cost: Callable[[Layer, Sizes], Cost]
    shared_cost: Callable[[Sequence[Layer], Sizes], Cost] | None = None


_SPEC = TuckerSpec()
_RANK = {"r": Size()}
_BLOCKS = {"block_size": Size(divides_inputs=True), "variant": Size("peft", ("peft", "paper"))}

METHODS: Mapping[str, Method] = {
    "tucka": Method(
        {
            "r": Size(_SPEC.rank),
            "k": Size(_SPEC.groups),
            "t": Size(_SPEC.experts_per_group),
            "p": Size(_SPEC.expert_rank),
            "routing": Size(_SPEC.routing, get_args(Routing)),
            "pinned": Size(False, (False, True)),
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
    """Return `layers` as pairs of ints, or say which of them is none.

    Parameters
    ----------
    layers : iterable of tuple of int
        Input and output width of each layer.
    where : str
        The caller, for the message.

    Returns
    -------
    tuple of tuple of int
        The layers.

    Raises
    ------
    ConfigError
        If there is none, or one is no pair of whole numbers of at least 1.

    Examples
    --------
    >>> checked_layers([[3, 4]], where="example")
    ((3, 4),)
    """
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
    """Return the sizes of a method with its defaults filled in.

    Parameters
    ----------
    method : str
        A name in `METHODS`.
    sizes : mapping
        The sizes given.
    layers : sequence of tuple of int
        The layers they must suit.
    where : str
        The caller, for the message.

    Returns
    -------
    mapping
        One value for each of the method's sizes.

    Raises
    ------
    ConfigError
        If there is no such method, a size is missing, unknown or outside its rule, or does not divide an input width.

    Examples
    --------
    >>> checked_sizes("oft", {"block_size": 4}, [(8, 8)], where="example")
    {'block_size': 4, 'variant': 'peft'}
    """
    check_choice("method", method, tuple(METHODS), where=where)
    rules = METHODS[method].sizes
    for name, value in sizes.items():
        if name not in rules:
            rule = f"only the sizes of {method!r} ({', '.join(rules) or 'none'})"
            raise ConfigError(expected(name, rule, repr(value), where=where))
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
    """Add up the cost of a method on all layers, after checking every number.

    Parameters
    ----------
    method : str
        A name in `METHODS`.
    layers : iterable of tuple of int
        Input and output width of each layer.
    sizes : mapping
        The sizes given.
    where : str
        The caller, for the message.

    Returns
    -------
    Cost
        Of all layers and what they share.

    Raises
    ------
    ConfigError
        As `checked_layers` and `checked_sizes`.

    Examples
    --------
    >>> total_cost("lora", [(768, 768)] * 2, {"r": 8}, where="example").parameters
    24576
    """
    pairs = checked_layers(layers, where=where)
    full = checked_sizes(method, sizes, pairs, where=where)
    entry = METHODS[method]
    total = Cost() if entry.shared_cost is None else entry.shared_cost(pairs, full)
    for layer in pairs:
        total += entry.layer_cost(layer, full)
    return total
