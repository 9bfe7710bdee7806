"""Adapters as modules: the trainable parts of one layer, and a wrapper for any layer that maps the last axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.base_layers import channel_axis, from_rows, open_weight, step_gain, to_rows, width_of
from tucka.backends.torch.checks import Where, check_base_dtype, named
from tucka.backends.torch.functional import add_gated_update
from tucka.checks import check_count
from tucka.errors import ConfigError, RouteError, expected
from tucka.spec import TuckerSpec

__all__ = ["ExpertParts", "TuckerAdapter", "adapt_input", "width_of"]

Gain = Callable[[], float | None]

# How strongly cores lead to the zero half at first, times √r and the layer's gain; chosen by accuracy on texts that no
# table uses. The gain stands for layers whose weight cannot be read.
_START, _TYPICAL_GAIN = 24.0, 2.0


class ExpertParts(nn.Module):
    r"""The trainable parts of one adapted layer: cores G, expert factor C and basis U.

    Parameters
    ----------
    spec : TuckerSpec
        Sizes and options.
    in_features : int
        Width of the layer's input (d).
    init_weights : bool
        True for an update that is exactly zero: one half of the basis is orthonormal and reads the input, the other
        half is zero and the cores lead to it, as LoRA's first factor leads to its zero factor. With r = 1, which has
        no halves, the cores are zero. With ``factor_norm="frobenius"``, the authors' start, whose update is random.
        False for a random start whose update is visible. The expert factor has orthonormal rows or columns.
    gain : callable, optional
        Measures how far the layer's outputs move for a step of its input, as `step_gain`
        does; called only if the start needs it. The cores lead to the zero half in inverse proportion to it, so that
        one learning rate suits layers and models of very different weights. None, or one that returns None, for that
        of a typical layer.

    Attributes
    ----------
    cores : Parameter, shape (k, p, r, r)
        G.
    expert_factor : Parameter, shape (t, p)
        C.
    basis : Parameter, shape (d, r)
        U.

    Raises
    ------
    ConfigError
        If the rank exceeds the width.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (5).

    Examples
    --------
    >>> parts = ExpertParts(TuckerSpec(rank=2, groups=3), in_features=4)
    >>> {name: tuple(p.shape) for name, p in parts.named_parameters()}
    {'cores': (3, 2, 2, 2), 'expert_factor': (2, 2), 'basis': (4, 2)}
    """

    def __init__(
        self, spec: TuckerSpec, in_features: int, *, init_weights: bool = True, gain: Gain | None = None
    ) -> None:
        super().__init__()
        check_count("in_features", in_features, where="ExpertParts")
        if spec.rank > in_features:
            cure = "Choose a smaller rank or exclude the layer"
            raise ConfigError(expected("rank", f"at most the layer's width {in_features}", spec.rank, cure=cure))
        self.spec = spec
        rank, slices = spec.rank, spec.expert_rank
        self.cores = nn.Parameter(torch.empty(spec.groups, slices, rank, rank))
        self.expert_factor = nn.Parameter(torch.empty(spec.experts_per_group, slices))
        self.basis = nn.Parameter(torch.empty(in_features, rank))
        self.reset_parameters(init_weights, gain)

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool = True, gain: Gain | None = None) -> None:
        """Start anew, see the class.

        Parameters
        ----------
        init_weights : bool
            Whether the update starts at zero.
        gain : callable, optional
            Of the layer.
        """
        if self.basis.is_meta:
            return
        # In float32: the decompositions behind these starts exist in no half precision.
        self.basis.copy_(nn.init.orthogonal_(torch.empty(self.basis.shape, device=self.basis.device)))
        if self.spec.factor_norm is not None:
            # One random slice, repeated: how the authors' code starts.
            first = nn.init.kaiming_uniform_(torch.empty_like(self.cores[0, 0], dtype=torch.float32))
            self.cores.copy_(first.expand_as(self.cores))
        else:
            self.cores.copy_(torch.randn(self.cores.shape, device=self.cores.device))
        self.expert_factor.copy_(_holding_ones(self.expert_factor))
        if init_weights and self.spec.factor_norm is None:
            self._start_at_base(gain)

    def _start_at_base(self, gain: Gain | None) -> None:
        """Make half of the basis zero, and the cores lead to it what the other half reads.

        The update is zero and its gradient reaches every direction of the zero half at once. Were the cores zero
        instead, their r² numbers alone would get a gradient at first.
        """
        rank = self.spec.rank
        written = rank // 2
        read = rank - written
        self.basis[:, read:] = 0.0
        self.cores.zero_()
        if not written:
            return
        measured = None if gain is None else gain()
        lead = _START / (rank**0.5 * (_TYPICAL_GAIN if measured is None else measured))
        # Weighted so that all experts start alike.
        weights = self.expert_factor.sum(dim=0)
        self.cores[:, :, range(written), range(read, rank)] = lead * weights[:, None]

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return cores, expert factor and basis as they enter the equations.

        Returns
        -------
        tuple of Tensor
            The parameters, divided by their norms if the spec says so (cores: group by group).
        """
        if self.spec.factor_norm is None:
            return self.cores, self.expert_factor, self.basis
        norms = torch.linalg.vector_norm(self.cores, dim=(1, 2, 3), keepdim=True)
        return self.cores / norms, self.expert_factor / self.expert_factor.norm(), self.basis / self.basis.norm()

    def forward(self, base: Tensor, x: Tensor, gates: Tensor, *, where: Where = "ExpertParts") -> Tensor:
        """Add the gated update of `x` to `base`.

        Parameters
        ----------
        base, x : Tensor, shape (..., d)
            What is added to, and the activations.
        gates : Tensor, shape (..., k, t)
            Aligned with `x` from the left.
        where : str or callable
            Who asks, for messages.

        Returns
        -------
        Tensor, shape (..., d)
            ``base + alpha * ((x U) Ḡ) Uᵀ``.
        """
        cores, expert_factor, basis = self.factors()
        return add_gated_update(base, x, basis, cores, expert_factor, gates, alpha=self.spec.alpha, where=where)


def _holding_ones(like: Tensor) -> Tensor:
    """Draw an expert factor with orthonormal rows or columns that can give all experts the same weight."""
    experts, slices = like.shape
    drawn = torch.randn(experts, slices, device=like.device)
    drawn[:, 0] = 1.0
    columns: Tensor = torch.linalg.qr(drawn if slices <= experts else drawn.T).Q
    return columns if slices <= experts else columns.T


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
        Whether the adapted layer starts equal to `base_layer`.

    Raises
    ------
    ConfigError
        If the layer cannot be adapted or the rank exceeds its width.

    See Also
    --------
    Router : Makes the gates.

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

    def __init__(
        self, base_layer: nn.Module, spec: TuckerSpec, *, in_features: int | None = None, init_weights: bool = True
    ) -> None:
        super().__init__()
        width = width_of(base_layer, "TuckerAdapter", in_features)
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
            From a `Router`.
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
        """
        adapted = adapt_input(self.base_layer, x, [(self.parts, gates)], where=self._describe)
        return self.base_layer(adapted, *args, **kwargs)

    def _describe(self) -> str:
        return f"TuckerAdapter around {self.base_layer!r}"


def adapt_input(
    layer: nn.Module, x: Tensor, active: list[tuple[ExpertParts, Tensor]], *, where: Where = "adapt_input"
) -> Tensor:
    """Add the updates of all active adapters to a layer's input.

    Parameters
    ----------
    layer : Module
        The layer whose input it is; tells on which axis to work.
    x : Tensor
        The layer's input.
    active : list of (ExpertParts, Tensor)
        Parts and gates of each adapter.
    where : str or callable
        The layer's name, or what finds it, for messages.

    Returns
    -------
    Tensor
        Same shape as `x`.

    Raises
    ------
    RouteError
        If gates per token are given to a convolution.
    ShapeError
        If the shapes do not fit.
    TuckaError
        If `x` is not real floating-point, of another dtype than the layer's weight, or on another device than the
        adapters.

    Examples
    --------
    >>> layer = nn.Linear(4, 3)
    >>> x = torch.ones(2, 4)
    >>> adapt_input(layer, x, []) is x
    True
    """
    if not active:
        return x
    if channel_axis(layer) != -1 and any(gates.ndim > 3 for _, gates in active):
        rule = "batch or sample routing for a convolution"
        raise RouteError(expected("gates", rule, "token routing", where=named(where)))
    check_base_dtype(layer, x, where)
    rows = to_rows(layer, x)
    result = rows
    for parts, gates in active:
        result = parts(result, rows, gates, where=where)
    return from_rows(layer, result, x)
