"""The sizes and options of Tucker experts, as plain values that are validated once; the one place of their defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, get_args

from tucka.checks import (
    check_choice,
    check_count,
    check_finite,
    check_least,
    check_positive,
    refuse_unknown_keywords,
)
from tucka.errors import ConfigError, expected

__all__ = [
    "CENTERED",
    "LETTERS",
    "OTHER_WORDS",
    "Affinity",
    "FactorNorm",
    "RouterInit",
    "Routing",
    "TuckerSpec",
    "check_spec",
    "mixes_each_row",
]

#: What one routing decision is made for, see `tucka.routing_feature`; ``"batch"`` is the paper's.
Routing = Literal["batch", "sample", "token"]
#: How a feature is compared with the centroids, see `tucka.affinity_logits`; ``"dot"`` is the paper's.
Affinity = Literal["dot", "group_norm", "centered", "directional"]
#: How an update is kept from growing, see `TuckerSpec`; ``"frobenius"`` is that of the authors' code.
FactorNorm = Literal["rotation", "columns", "frobenius"]
RouterInit = Literal["balanced", "dai", "kaiming"]
# The affinities that subtract a centre from the features.
CENTERED = ("centered", "directional")

# The paper's letters, which `TuckAConfig`, the counts and the command line keep, for the words of `TuckerSpec`.
LETTERS = {"rank": "r", "groups": "k", "experts_per_group": "t", "expert_rank": "p"}
# What other libraries, and earlier versions of this one, call its options.
OTHER_WORDS = {"lora_alpha": "alpha", "granularity": "routing", "kind": "affinity", "normalize": "gate_norm"}

_RULES: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(LETTERS, check_count),
    "alpha": check_finite,
    "routing": partial(check_choice, choices=get_args(Routing)),
    "affinity": partial(check_choice, choices=get_args(Affinity)),
    "temperature": check_positive,
    "balance_rate": partial(check_least, least=0),
    "router_init": partial(check_choice, choices=(None, *get_args(RouterInit))),
    "gate_norm": partial(check_choice, choices=(True, False)),
    "factor_norm": partial(check_choice, choices=(None, *get_args(FactorNorm))),
}


def check_spec(values: Mapping[str, Any], *, words: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return all fields of a `TuckerSpec` as plain values; a message calls a field by `words`, if that has it."""
    plain = {name: rule(words.get(name, name), values[name], where=where) for name, rule in _RULES.items()}
    if plain["router_init"] == "balanced" and plain["affinity"] not in CENTERED:
        rule, cure = f"'dai' or 'kaiming' with affinity={plain['affinity']!r}", "Use affinity='directional'"
        raise ConfigError(expected("router_init", rule, "'balanced'", where=where, cure=cure))
    return plain


@refuse_unknown_keywords({**{letter: name for name, letter in LETTERS.items()}, **OTHER_WORDS})
@dataclass(frozen=True)
class TuckerSpec:
    r"""Sizes and options of one set of Tucker experts; see the notation page for the paper's letters.

    Parameters
    ----------
    rank : int
        Multilinear rank of the two weight modes (the paper's r).
    groups : int
        Number of expert groups (k).
    experts_per_group : int
        Experts in one group (t).
    expert_rank : int
        Multilinear rank of the expert mode (p).
    alpha : float
        Scale of the update (α).
    routing : {"batch", "sample", "token"}
        How fine the routing is; ``"batch"`` is the paper's.
    affinity : {"directional", "centered", "dot", "group_norm"}
        How a feature is compared with the centroids, see `tucka.affinity_logits`; ``"dot"`` is the paper's.
    temperature : float
        Divides the logits before the sigmoid; lower makes the gates of a group differ more.
    balance_rate : float
        γ: by how much a router's bias on the choice moves against the load at each update; 0 for no such bias.
    router_init : {None, "balanced", "dai", "kaiming"}
        How data starts a router. ``"balanced"`` needs an affinity with a centre. None stands for it there, and for
        the paper's ``"dai"`` elsewhere.
    gate_norm : bool
        Whether the gates of the chosen group are made to sum to one (the paper's Eq. 8).
    factor_norm : {"rotation", "columns", None, "frobenius"}
        How the update is kept from growing. With ``"rotation"`` all experts have the core of one rotation in common,
        which the basis gives (`tucka.rotation_core`), and each adds its own part. ``"columns"`` keeps the columns of
        the basis shorter than one, see `tucka.soft_unit_columns`. ``"frobenius"`` divides cores, expert factor and
        basis by their norms, as the authors' code does. None is the paper's.

    Raises
    ------
    ConfigError
        If a number or an option is outside its rule, or a keyword is unknown. Numbers of NumPy are stored as Python's.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (5) for the sizes and Eq. (6) to (9) for the options.

    Examples
    --------
    >>> TuckerSpec(rank=8, groups=4).num_experts
    8
    >>> TuckerSpec(rank=0)
    Traceback (most recent call last):
        ...
    tucka.errors.ConfigError: rank: expected a whole number of at least 1, got 0 (TuckerSpec)
    """

    rank: int = 8
    groups: int = 2
    experts_per_group: int = 2
    expert_rank: int = 2
    alpha: float = 1.0
    routing: Routing = "batch"
    affinity: Affinity = "directional"
    temperature: float = 1.0
    balance_rate: float = 0.0
    router_init: RouterInit | None = None
    gate_norm: bool = True
    factor_norm: FactorNorm | None = "rotation"

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in check_spec(given, words={}, where="TuckerSpec").items():
            object.__setattr__(self, name, value)

    @property
    def has_center(self) -> bool:
        """Whether the affinity subtracts a centre from the features."""
        return self.affinity in CENTERED

    @property
    def initialization(self) -> RouterInit:
        """How data starts a router: `router_init`, or what it stands for if None."""
        return self.router_init or ("balanced" if self.has_center else "dai")

    @property
    def num_experts(self) -> int:
        """Experts in all groups together (M = k·t)."""
        return self.groups * self.experts_per_group


def mixes_each_row(rank: int, slices: int) -> bool:
    """Tell whether rows with gates of their own get mixed cores, r² numbers each; else their x U is spread to k·p·r."""
    # Both orders take r² multiply-adds for each row and core slice. The one that writes fewer numbers takes less memory
    # and, as `benchmarks/orders.py` measures, less time in training.
    return rank < slices
