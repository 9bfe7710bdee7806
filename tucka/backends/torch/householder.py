"""Householder adaptation: products of reflections applied to activations as two thin products, never a d×d matrix."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.base_layers import checked_rows, from_rows, width_of
from tucka.backends.torch.checks import check_fits_width, check_tensors, check_thin
from tucka.backends.torch.thin import wide_dtype, without_autocast
from tucka.backends.torch.update import add_update
from tucka.checks import check_count, refuse_unknown_keywords
from tucka.errors import ShapeError, TuckaError, expected

__all__ = ["HouseholderAdapter", "householder_adapt", "householder_gamma"]


def householder_adapt(x: Tensor, vectors: Tensor) -> Tensor:
    r"""Multiply activations by reflections, :math:`x \prod_{i=1}^{r} (I - 2 u_i u_i^\top)`.

    Computed as :math:`x + ((x U)\, \Gamma)\, U^\top` with the Γ of `tucka.householder_gamma`. Reversing the columns
    gives the transposed product: a layer whose weight (out, in) is multiplied by the product, W Π, computes
    x Πᵀ Wᵀ and needs ``vectors.flip(1)``.

    Parameters
    ----------
    x : Tensor, shape (..., d)
        Activations; any layout, zero rows allowed.
    vectors : Tensor, shape (d, r)
        The columns u_i. The formula holds for any length; only unit columns make reflections and an orthogonal
        product.

    Returns
    -------
    Tensor, shape (..., d)
        In the dtype of `x`, or autocast's; Γ is computed in float32 at least.

    Raises
    ------
    ShapeError
        If the widths differ, or there are more columns than rows.
    ArrayError
        If an argument is no tensor or on another device, or `x` is not real floating-point.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (1) and (2).

    Examples
    --------
    >>> householder_adapt(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
    tensor([[-3.,  4.]])
    """
    where = "householder_adapt"
    check_tensors(where, x=x, vectors=vectors)
    check_thin("vectors", vectors, x, where)
    if vectors.shape[1] > vectors.shape[0]:
        rule = f"at most {vectors.shape[0]} columns"
        raise ShapeError(expected("vectors", rule, f"shape {tuple(vectors.shape)}", where=where))
    return _reflected(x, vectors)


def _reflected(x: Tensor, vectors: Tensor) -> Tensor:
    """Multiply `x` (..., d) by the product that columns (d, r) give."""
    return add_update(x, x, vectors, householder_gamma(vectors))


def householder_gamma(vectors: Tensor) -> Tensor:
    """Compute the Γ (r, r) of any columns (d, r), in float32 at least, as `tucka.householder_gamma` does."""
    # Not tucka's own function: this takes half its time, and a general solver would wait for a GPU.
    with without_autocast(vectors.device.type):
        wide = vectors.to(wide_dtype(vectors))
        identity = torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)
        # Γ⁻¹ = −(I/2 + striu(UᵀU)). Scaled by −2, its diagonal is one: the solver reads only what lies above it.
        inverse = 2.0 * (wide.t() @ wide)
        gamma: Tensor = torch.linalg.solve_triangular(inverse, -2.0 * identity, upper=True, unitriangular=True)
    return gamma


@refuse_unknown_keywords({"r": "rank"})
class HouseholderAdapter(nn.Module):
    r"""A layer whose input is multiplied by trainable reflections, :math:`y = f(x \prod_i (I - 2 u_i u_i^\top))`.

    The layer is only called, never opened, so its weight may be quantised, sharded or hidden.

    Parameters
    ----------
    base_layer : Module
        A layer that maps the last axis, or a convolution, which is adapted along its channels.
    rank : int
        Number of reflections (r). Even, so that the adapter can start as the identity.
    in_features : int, optional
        Width of the input, for layers that do not tell it.
    init_weights : bool
        True for pairs of equal reflections, whose product is the identity up to rounding; an odd last one is left
        over, and a warning says so. False for random directions.

    Attributes
    ----------
    vectors : Parameter, shape (d, r)
        The columns u_i; every forward divides them by their norms.

    Raises
    ------
    ConfigError
        If the layer cannot be adapted, or `rank` is not from 1 to its width.
    ShapeError, ArrayError
        In the forward, if the input does not fit the layer.
    TuckaError
        In the forward, if a column is zero; only on a CPU and not in compiled code, since elsewhere a look at values
        costs a wait for the device. There such a column gives NaN.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (1) and (2).

    Examples
    --------
    >>> layer = nn.Linear(4, 3)
    >>> adapter = HouseholderAdapter(layer, rank=2)
    >>> x = torch.randn(5, 4)
    >>> torch.allclose(adapter(x), layer(x), atol=1e-5)
    True
    """

    if TYPE_CHECKING:  # calls of a module are Any to type checkers; layers that return something else are rare

        def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...

    def __init__(
        self, base_layer: nn.Module, rank: int, *, in_features: int | None = None, init_weights: bool = True
    ) -> None:
        super().__init__()
        where = type(self).__name__
        width = width_of(base_layer, where, in_features)
        rank = check_count("rank", rank, where=where)
        check_fits_width(rank, width, where)
        self.base_layer = base_layer
        self.vectors = nn.Parameter(torch.empty(width, rank))
        if init_weights and rank % 2:
            rule, cure = "an even rank for a start as the identity", "Choose an even rank, or init_weights=False"
            warnings.warn(expected("rank", rule, rank, where=where, cure=cure), stacklevel=3)
        self.reset_parameters(init_weights=init_weights)

    @torch.no_grad()
    def reset_parameters(self, *, init_weights: bool = True) -> None:
        """Draw the columns anew, in equal pairs for a start as the identity."""
        if self.vectors.is_meta:
            return
        columns = torch.randn(self.vectors.shape, device=self.vectors.device)
        if init_weights:
            rank = columns.shape[1]
            columns[:, 1::2] = columns[:, : rank - rank % 2 : 2]
        self.vectors.copy_(columns)

    def extra_repr(self) -> str:
        """Describe the sizes in the module's line."""
        return f"in_features={self.vectors.shape[0]}, rank={self.vectors.shape[1]}"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Reflect the input (..., d), or (B, d, ...) of a convolution, and call the layer on it."""
        base = self.base_layer
        rows = checked_rows(base, x, [self.vectors], self._describe)
        return base(from_rows(base, _reflected(rows, self.unit_vectors()), x), *args, **kwargs)

    def unit_vectors(self) -> Tensor:
        """Return the columns (d, r) divided by their norms, in float32 at least."""
        wide = self.vectors.to(wide_dtype(self.vectors))
        # Squares of 1e25 overflow in float32, and those of 1e-25 vanish. The result does not depend on the number that
        # a column is divided by first, so no gradient goes through it.
        largest = torch.linalg.vector_norm(wide.detach(), ord=math.inf, dim=0)
        self._check_not_zero(largest)
        scaled = wide / largest
        unit: Tensor = scaled / torch.linalg.vector_norm(scaled, dim=0)
        return unit

    def _check_not_zero(self, largest: Tensor) -> None:
        """Raise if the largest entry (r,) of a column is zero, where looking at values costs no wait for a device."""
        if largest.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(largest.all()):
            rule, cure = "columns that are not zero", "Start them from random directions"
            zero = (largest == 0).nonzero().flatten().tolist()
            raise TuckaError(expected("vectors", rule, f"zero columns {zero}", where=self._describe(), cure=cure))

    def _describe(self) -> str:
        return f"{type(self).__name__} around {self.base_layer!r}"
