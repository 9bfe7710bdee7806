"""The sizes and options of Tucker experts, as plain numbers that are validated once.

Everything that takes sizes (modules, counts, the PEFT configuration) builds a `TuckerSpec` first, so a rule and its
message exist in one place and no tensor is made before the numbers are known to be good.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tucka.checks import check_choice, check_count, check_finite, check_positive
from tucka.errors import ConfigError, expected

__all__ = [
    "CENTERED",
    "Affinity",
    "FactorNorm",
    "RouterInit",
    "Routing",
    "TuckerSpec",
]

Routing = Literal["batch", "sample", "token"]
Affinity = Literal["dot", "group_norm", "centered", "directional"]
FactorNorm = Literal["frobenius"]
RouterInit = Literal["balanced", "dai", "kaiming"]
# The affinities that subtract a centre from the features.
CENTERED = ("centered", "directional")


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
    affinity : {"dot", "group_norm", "centered", "directional"}
        How a feature is compared with the centroids, see `tucka.affinity_logits`.
    temperature : float
        Divides the logits before the sigmoid; lower makes the gates of a group differ more.
    balance_rate : float
        γ: by how much a router's bias on the choice moves against the load at each update; 0 for no such bias.
    router_init : {None, "balanced", "dai", "kaiming"}
        How data starts a router. ``"balanced"`` needs an affinity with a centre. None stands for it there, and for
        the paper's ``"dai"`` elsewhere.
    gate_norm : bool
        Whether the gates of the chosen group are made to sum to one (the paper's Eq. 8).
    factor_norm : {None, "frobenius"}
        ``"frobenius"`` divides cores, expert factor and basis by their norms, as the authors' code does.

    Raises
    ------
    ConfigError
        If a number or an option is outside its rule.

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
    factor_norm: FactorNorm | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "groups", "experts_per_group", "expert_rank"):
            check_count(name, getattr(self, name), where="TuckerSpec")
        check_finite("alpha", self.alpha, where="TuckerSpec")
        check_choice("routing", self.routing, get_args(Routing), where="TuckerSpec")
        check_choice("affinity", self.affinity, get_args(Affinity), where="TuckerSpec")
        check_positive("temperature", self.temperature, where="TuckerSpec")
        if check_finite("balance_rate", self.balance_rate, where="TuckerSpec") < 0:
            rule = "a number that is not negative"
            raise ConfigError(expected("balance_rate", rule, repr(self.balance_rate), where="TuckerSpec"))
        self._check_router_init()
        check_choice("gate_norm", self.gate_norm, (True, False), where="TuckerSpec")
        check_choice("factor_norm", self.factor_norm, (None, *get_args(FactorNorm)), where="TuckerSpec")

    def _check_router_init(self) -> None:
        check_choice("router_init", self.router_init, (None, *get_args(RouterInit)), where="TuckerSpec")
        if self.router_init == "balanced" and not self.has_center:
            rule, cure = f"'dai' or 'kaiming' with affinity={self.affinity!r}", "Use affinity='directional'"
            raise ConfigError(expected("router_init", rule, "'balanced'", where="TuckerSpec", cure=cure))

    @property
    def has_center(self) -> bool:
        """Whether the affinity subtracts a centre from the features.

        Returns
        -------
        bool
            True for ``"centered"`` and ``"directional"``.
        """
        return self.affinity in CENTERED

    @property
    def initialization(self) -> RouterInit:
        """How data starts a router: `router_init`, or what it stands for if None.

        Returns
        -------
        {"balanced", "dai", "kaiming"}
            The way.
        """
        return self.router_init or ("balanced" if self.has_center else "dai")

    @property
    def num_experts(self) -> int:
        """Experts in all groups together (M = k·t).

        Returns
        -------
        int
            The number of experts.
        """
        return self.groups * self.experts_per_group
