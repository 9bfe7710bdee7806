"""Adapters as modules: the trainable parts of one layer, and a wrapper for any layer that maps the last axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.base_layers import checked_rows, from_rows, is_convolution, open_weight, step_gain, width_of
from tucka.backends.torch.checks import check_fits_width, check_gates, check_lead, check_spec_type, check_tensors
from tucka.backends.torch.functional import add_gated_update, add_own_update
from tucka.backends.torch.laid_out import LaidOut
from tucka.backends.torch.mixing import (
    between_columns,
    column_scale,
    has_own_gates,
    rotation_cores,
    with_rotation,
)
from tucka.backends.torch.private import (
    buffers_by_name,
    has_master_copy,
    is_in_pieces,
    is_transformed,
    parameters_by_name,
    whole_shape,
)
from tucka.backends.torch.thin import cast, compute_dtype, without_autocast
from tucka.backends.torch.update import add_update
from tucka.core.rotation import rotation_strength
from tucka.errors import ConfigError, RouteError, expected
from tucka.spec import FactorNorm, TuckerSpec

__all__ = ["ExpertParts", "TuckerAdapter", "adapt_rows"]

# Measures how far a layer's outputs move for a step of its input, see `step_gain`. None, given or returned, stands for
# a typical layer.
Gain = Callable[[], float | None]

# How strongly cores lead to the zero half at first, times √r, at a typical gain of the layer; and how long the columns
# are that read: short ones turn faster. A rotation leads by itself. Chosen by accuracy, see
# `docs/explanation/comparison.md`.
_LEAD: dict[str | None, float] = {None: 12.0, "columns": 1.6}
_READING: dict[str | None, float] = {None: 1.0, "columns": 0.5, "rotation": 2.0}
_TYPICAL_GAIN = 2.0


class ExpertParts(nn.Module):
    """The trainable parts of one adapted layer: cores G (k, p, r, r), expert factor C (t, p) and basis U (d, r)."""

    def __init__(
        self,
        spec: TuckerSpec,
        in_features: int,
        *,
        init_weights: bool = True,
        gain: Gain | None = None,
        dropout: float = 0.0,
        starts_apart: bool = False,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.starts_apart = starts_apart  # whether groups lead to the zero half in orders of their own
        self.dropout = dropout  # of what the update is computed from
        self.scale = 1.0  # by which callers weaken or strengthen the update
        rank, slices = spec.rank, spec.expert_rank
        self.cores = nn.Parameter(torch.empty(spec.groups, slices, rank, rank))
        self.expert_factor = nn.Parameter(torch.empty(spec.experts_per_group, slices))
        self.basis = nn.Parameter(torch.empty(in_features, rank))
        if spec.factor_norm == "rotation":
            self.register_buffer("strength", torch.tensor(rotation_strength(rank)))
        self.reset_parameters(init_weights=init_weights, gain=gain)

    @torch.no_grad()
    def reset_parameters(self, *, init_weights: bool = True, gain: Gain | None = None) -> None:
        """Draw the parts anew: for an update of exactly zero, or a visible random one."""
        if self.basis.is_meta:
            return
        # In float32: the decompositions behind these starts exist in no half precision.
        self.basis.copy_(nn.init.orthogonal_(torch.empty(self.basis.shape, device=self.basis.device)))
        is_authors = self.spec.factor_norm == "frobenius"
        if is_authors:
            # The authors' start, whose update is random: one random slice, repeated.
            first = nn.init.kaiming_uniform_(torch.empty_like(self.cores[0, 0], dtype=torch.float32))
            self.cores.copy_(first.expand_as(self.cores))
        else:
            self.cores.copy_(torch.randn(self.cores.shape, device=self.cores.device))
        self.expert_factor.copy_(_holding_ones(self.expert_factor))
        if init_weights and not is_authors:
            self._start_at_base(gain)

    def _start_at_base(self, gain: Gain | None) -> None:
        """Make half of the basis zero, and let the cores or a rotation lead to it what the other half reads."""
        # The update is zero and its gradient reaches every direction of the zero half at once, as LoRA's first factor
        # leads to its zero factor. Were the cores zero instead, only their r² numbers would get a gradient at first.
        rank = self.spec.rank
        written = rank // 2
        read = rank - written
        self.basis[:, read:] = 0.0
        self.cores.zero_()
        measured = gain() if written and gain is not None else None
        # In inverse proportion to the gain: one learning rate then suits layers and models of very different weights.
        share = 1.0 if measured is None else _TYPICAL_GAIN / measured
        self.basis[:, :read] *= _READING[self.spec.factor_norm]
        if self.spec.factor_norm == "rotation":  # which leads by itself
            self.strengths[0].fill_(share * rotation_strength(rank))
            return
        lead = share * _LEAD[self.spec.factor_norm] / rank**0.5
        # Weighted so that all experts start alike.
        weights = self.expert_factor.sum(dim=0)
        for group, cores in enumerate(self.cores):
            # Where groups differ in what they are for, gradients of opposite aims would cancel in columns that all
            # groups lead to alike.
            shift = group if self.starts_apart else 0
            order = [read + (column + shift) % written for column in range(written)]
            cores[:, range(written), order] = lead * weights[:, None]

    @torch.no_grad()
    def add_group(self) -> None:
        """Add a core of zeros: a group with nothing of its own, whose core gets a gradient from the trained basis."""
        old = self.cores
        self.cores = nn.Parameter(torch.cat([old, torch.zeros_like(old[:1])]), requires_grad=old.requires_grad)
        self.spec = replace(self.spec, groups=self.spec.groups + 1)

    def extra_repr(self) -> str:
        """Describe the sizes in the module's line."""
        spec, width = self.spec, whole_shape(self.basis)[0]
        sizes = f"rank={spec.rank}, groups={spec.groups}, experts_per_group={spec.experts_per_group}"
        return f"in_features={width}, {sizes}, expert_rank={spec.expert_rank}"

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return cores, expert factor and basis as they enter the equations; a rotation is one more core slice."""
        (cores, expert_factor, basis), norm = self.unscaled()
        if norm == "rotation":
            with without_autocast(basis.device.type):
                return *with_rotation(cores, expert_factor, rotation_cores([basis], self.strengths)[0]), basis
        # The same update as with `soft_unit_columns` of the basis, and fewer numbers to scale.
        return between_columns(cores, column_scale(basis)) if norm == "columns" else cores, expert_factor, basis

    def unscaled(self) -> tuple[tuple[Tensor, Tensor, Tensor], FactorNorm | None]:
        """Return the factors, and the norm that their mixed cores still need."""
        own = parameters_by_name(self)
        cores, expert_factor, basis = own["cores"], own["expert_factor"], own["basis"]
        if self.spec.factor_norm != "frobenius":
            return (cores, expert_factor, basis), self.spec.factor_norm
        norms = torch.linalg.vector_norm(cores, dim=(1, 2, 3), keepdim=True)  # group by group
        return (cores / norms, expert_factor / expert_factor.norm(), basis / basis.norm()), None

    @property
    def strengths(self) -> tuple[Tensor, ...]:
        """The strength c () of the rotation, if there is one."""
        strength = buffers_by_name(self).get("strength")
        return () if strength is None else (strength,)

    @property
    def alpha(self) -> float:
        """The scale α of the update, as callers have changed it."""
        return self.spec.alpha * self.scale

    def forward(self, base: Tensor, x: Tensor, gates: Tensor, core: Tensor | None = None) -> Tensor:
        """Add the update of `x` (..., d) by gates (..., k, t) to `base` (..., d); `core` is what was made of them."""
        if self.drops:
            x = nn.functional.dropout(x, self.dropout)
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            laid = LaidOut(self, compute_dtype(x))
            if core is not None:
                laid.take(core, None if has_own_gates(x, gates) else gates)
            return laid.add_update(base, x, gates)
        if core is not None:
            own = parameters_by_name(self)
            if has_own_gates(x, gates):
                return add_own_update(base, x, own["basis"], core, own["expert_factor"], gates)
            return add_update(base, x, own["basis"], cast(core, compute_dtype(x)))
        (cores, expert_factor, basis), norm = self.unscaled()
        return add_gated_update(
            base, x, basis, cores, expert_factor, gates, alpha=self.alpha, norm=norm, strengths=self.strengths
        )

    @property
    def drops(self) -> bool:
        """Whether a call drops numbers of its input."""
        return bool(self.dropout) and self.training

    def is_at_rest(self) -> bool:
        """Tell whether no parameter is cut, moved or copied by an engine, or one of a transformation."""
        return all(map(_is_at_rest, parameters_by_name(self).values()))


def _is_at_rest(parameter: Tensor) -> bool:
    is_own = not vars(parameter) or not (is_in_pieces(parameter) or has_master_copy(parameter))
    return type(parameter) is nn.Parameter and is_own and not parameter.is_meta and not is_transformed(parameter)


def _holding_ones(like: Tensor) -> Tensor:
    """Draw an expert factor with orthonormal rows or columns that can give all experts the same weight."""
    experts, slices = like.shape
    drawn = torch.randn(experts, slices, device=like.device)
    drawn[:, 0] = 1.0
    columns: Tensor = torch.linalg.qr(drawn if slices <= experts else drawn.T).Q
    return columns if slices <= experts else columns.T


def adapt_rows(rows: Tensor, active: list[tuple[ExpertParts, Tensor]]) -> Tensor:
    """Add the updates of all active adapters, each with its gates, to a layer's input as rows (..., d)."""
    result = rows
    for parts, gates in active:
        result = parts(result, rows, gates)
    return result


class TuckerAdapter(nn.Module):
    r"""A frozen or trainable layer, with its input adapted by gated Tucker experts: :math:`y = f(x')`.

    The layer is called, and its weight looked at once, at the start, if it can be read: it may be quantised, sharded or
    hidden.

    Parameters
    ----------
    base_layer : Module
        A layer that maps the last axis, or a convolution, which is adapted along its channels.
    spec : TuckerSpec
        Sizes and options.
    in_features : int, optional
        Width of the input, for layers that do not tell it.
    init_weights : bool
        True for a start that equals `base_layer` bit for bit (with ``factor_norm="frobenius"``, the authors' start,
        whose update is random). False for a random update.

    Attributes
    ----------
    parts : Module
        The trainable ``cores`` (k, p, r, r), ``expert_factor`` (t, p) and ``basis`` (d, r). With
        ``factor_norm="rotation"`` also the buffer ``strength`` (), the c of `tucka.rotation_core`.

    Raises
    ------
    ConfigError
        If the layer cannot be adapted, is of another width than `in_features`, or is a convolution with token routing;
        if `spec` is no `TuckerSpec`, or its rank exceeds the layer's width.

    See Also
    --------
    Router : Makes the gates.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (5) and (9).

    Examples
    --------
    A mixture network of two adapted layers behind one router, which starts equal to the two layers alone:

    >>> from tucka.backends.torch import Router
    >>> class Mixture(nn.Module):
    ...     def __init__(self, spec):
    ...         super().__init__()
    ...         self.router = Router(spec, in_features=4)
    ...         self.up = TuckerAdapter(nn.Linear(4, 8).requires_grad_(False), spec)
    ...         self.down = TuckerAdapter(nn.Linear(8, 3).requires_grad_(False), spec)
    ...
    ...     def forward(self, x):
    ...         gates = self.router(x)
    ...         return self.down(torch.relu(self.up(x, gates)), gates)
    >>> for routing in ("batch", "sample", "token"):
    ...     mixture = Mixture(TuckerSpec(rank=2, groups=3, routing=routing))
    ...     x = torch.randn(5, 6, 4)
    ...     print(routing, tuple(mixture.router(x).shape), tuple(mixture(x).shape))
    batch (3, 2) (5, 6, 3)
    sample (5, 3, 2) (5, 6, 3)
    token (5, 6, 3, 2) (5, 6, 3)
    """

    if TYPE_CHECKING:  # calls of a module are Any to type checkers; layers that return something else are rare

        def __call__(self, x: Tensor, gates: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...

    def __init__(
        self, base_layer: nn.Module, spec: TuckerSpec, *, in_features: int | None = None, init_weights: bool = True
    ) -> None:
        super().__init__()
        where = type(self).__name__
        check_spec_type(spec, where)
        width = width_of(base_layer, where, in_features)
        check_fits_width(spec.rank, width, where)
        if spec.routing == "token" and is_convolution(base_layer):
            rule = "'batch' or 'sample' where a convolution is adapted"
            raise ConfigError(expected("spec.routing", rule, "'token'", where=where))
        self.base_layer = base_layer
        self.parts = ExpertParts(
            spec, width, init_weights=init_weights, gain=lambda: step_gain(base_layer, open_weight(base_layer, width))
        )
        self.spec = spec

    def forward(self, x: Tensor, gates: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Adapt the input and call the layer.

        Parameters
        ----------
        x : Tensor, shape (..., d) or (B, d, ...) for a convolution
            The layer's input.
        gates : Tensor, shape (k, t), (B, k, t), ...
            From a `Router`. Their leading axes align with those of `x` from the left, a convolution's channels left
            out.
        *args, **kwargs : object
            Further arguments of the layer.

        Returns
        -------
        object
            Whatever the layer returns.

        Raises
        ------
        ShapeError
            If the shapes do not fit.
        ArrayError
            If `x` or `gates` is no tensor, of a dtype that the layer refuses, or on another device.
        RouteError
            If gates per token are given to a convolution.
        """
        base, parts = self.base_layer, self.parts
        rows = checked_rows(base, x, [parts.basis], self._describe)
        self._check_gates(gates, rows)
        return base(from_rows(base, adapt_rows(rows, [(parts, gates)]), x), *args, **kwargs)

    def _check_gates(self, gates: Tensor, rows: Tensor) -> None:
        """Raise unless gates fit the spec, the layer and its input as rows (..., d)."""
        check_tensors(self._describe, x=rows, gates=gates)
        if gates.ndim > 3 and is_convolution(self.base_layer):
            rule = "batch or sample routing for a convolution"
            raise RouteError(expected("gates", rule, "token routing", where=self._describe()))
        check_gates(gates, self.spec.groups, self.spec.experts_per_group, self._describe)
        check_lead("gates", tuple(gates.shape[:-2]), rows, self._describe)

    def _describe(self) -> str:
        return f"{type(self).__name__} around {self.base_layer!r}"
