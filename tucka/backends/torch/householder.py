"""Householder adaptation: products of reflections applied to activations as two thin products, never a d×d matrix."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.base_layers import from_rows, to_rows, width_of
from tucka.backends.torch.checks import Where, check_activations, check_base_dtype, named
from tucka.backends.torch.thin import add_product, project, without_autocast
from tucka.checks import check_count
from tucka.errors import ConfigError, ShapeError, TuckaError, expected

__all__ = ["HouseholderAdapter", "householder_adapt", "unit_columns"]


def householder_adapt(
    x: Tensor,
    vectors: Tensor,
    *,
    reverse: bool = False,
    orthonormal: bool = False,
    where: Where = "householder_adapt",
) -> Tensor:
    r"""Multiply activations by reflections, :math:`x \prod_{i=1}^{r} (I - 2 u_i u_i^\top)`.

    Computed as :math:`x + ((x U)\, \Gamma)\, U^\top`. Γ comes from one triangular solve in float32 at least,
    :math:`\Gamma^{-1} = -(\tfrac{1}{2} I + \mathrm{striu}(U^\top U))`. The equality holds for columns of any length;
    only unit ones make reflections, and the product orthogonal.

    Parameters
    ----------
    x : Tensor, shape (..., d)
        Activations; any layout, zero rows allowed.
    vectors : Tensor, shape (d, r)
        Unit columns, for instance from `unit_columns`.
    reverse : bool
        Whether to multiply in reversed order, which is the transposed product, Γᵀ in place of Γ. A layer whose weight
        (out, in) is multiplied by the product, W Π, computes x Πᵀ Wᵀ: it needs this.
    orthonormal : bool
        Whether the columns are known to be orthonormal: the order is no matter then, and Γ is −2 I.
    where : str or callable
        Who asks, for messages.

    Returns
    -------
    Tensor, shape (..., d)
        In the dtype of `x`, or autocast's.

    Raises
    ------
    ShapeError
        If the widths differ, or there are more columns than rows.
    TuckaError
        If `x` is not real floating-point, or the two are on different devices.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (1) and (2).

    Examples
    --------
    >>> householder_adapt(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
    tensor([[-3.,  4.]])
    """
    check_activations(x, vectors, where)
    if vectors.shape[1] > vectors.shape[0]:
        rule = f"at most {vectors.shape[0]} columns"
        raise ShapeError(expected("vectors", rule, f"shape {tuple(vectors.shape)}", where=named(where)))
    inner, rows = project(x, vectors)
    if orthonormal:
        inner = -2.0 * inner
    else:
        gamma = householder_gamma(vectors)
        inner = inner @ (gamma.t() if reverse else gamma).to(inner.dtype)
    return add_product(rows, inner, vectors).reshape(x.shape)


def householder_gamma(vectors: Tensor) -> Tensor:
    r"""Compute the Γ of `tucka.householder_gamma` by one triangular solve, whatever autocast says.

    Parameters
    ----------
    vectors : Tensor, shape (d, r)
        Any columns.

    Returns
    -------
    Tensor, shape (r, r)
        In float32 at least.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (1) and (2).

    Examples
    --------
    >>> householder_gamma(torch.tensor([[1.0], [0.0]]))
    tensor([[-2.]])
    """
    with without_autocast(vectors.device.type):
        wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        identity = torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)
        # Scaled by −2, the diagonal is one and needs no division.
        inverse = identity + torch.triu(2.0 * (wide.t() @ wide), diagonal=1)
        gamma: Tensor = torch.linalg.solve_triangular(inverse, -2.0 * identity, upper=True, unitriangular=True)
    return gamma


def unit_columns(vectors: Tensor) -> Tensor:
    """Divide each column by its norm.

    Parameters
    ----------
    vectors : Tensor, shape (d, r)
        Any columns but zero ones.

    Returns
    -------
    Tensor, shape (d, r)
        In float32 at least.

    Raises
    ------
    TuckaError
        If a column is zero, on a CPU. Elsewhere, where looking would cost a wait for the device, and in compiled code,
        such a column becomes NaN.

    Examples
    --------
    >>> unit_columns(torch.tensor([[3.0], [4.0]]))
    tensor([[0.6000],
            [0.8000]])
    """
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    norms: Tensor = torch.linalg.vector_norm(wide, dim=0)
    if vectors.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(norms.all()):
        zero = (norms == 0).nonzero().flatten().tolist()
        cure = "Start them from random directions"
        raise TuckaError(expected("vectors", "columns that are not zero", f"zero columns {zero}", cure=cure))
    return wide / norms


class HouseholderAdapter(nn.Module):
    r"""A layer whose input is multiplied by trainable reflections, :math:`y = f(x \prod_i (I - 2 u_i u_i^\top))`.

    The layer is only called, never opened, so its weight may be quantised, sharded or hidden.

    Parameters
    ----------
    base_layer : Module
        A layer that maps the last axis, or a convolution, which is adapted along its channels.
    r : int
        Number of reflections. Even, so that the adapter can start as the identity.
    in_features : int, optional
        Width of the input, for layers that do not tell it.
    init_weights : bool
        True for pairs of equal reflections, whose product is the identity up to rounding; an odd last one is left
        over, and warned of. False for random directions.

    Attributes
    ----------
    vectors : Parameter, shape (d, r)
        The columns u_i, divided by their norms in every forward.

    Raises
    ------
    ConfigError
        If the layer cannot be adapted, or `r` is not from 1 to its width.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (1) and (2).

    Examples
    --------
    >>> layer = nn.Linear(4, 3)
    >>> adapter = HouseholderAdapter(layer, r=2)
    >>> x = torch.randn(5, 4)
    >>> torch.allclose(adapter(x), layer(x), atol=1e-5)
    True
    """

    def __init__(
        self, base_layer: nn.Module, r: int, *, in_features: int | None = None, init_weights: bool = True
    ) -> None:
        super().__init__()
        width = width_of(base_layer, "HouseholderAdapter", in_features)
        check_count("in_features", width, where="HouseholderAdapter")
        check_count("r", r, where="HouseholderAdapter")
        if r > width:
            cure = "Choose a smaller r or exclude the layer"
            rule = f"at most the layer's width {width}"
            raise ConfigError(expected("r", rule, r, where="HouseholderAdapter", cure=cure))
        self.base_layer = base_layer
        self.vectors = nn.Parameter(torch.empty(width, r))
        self.reset_parameters(init_weights)

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool = True) -> None:
        """Start anew, see the class.

        Parameters
        ----------
        init_weights : bool
            Whether the product starts as the identity.
        """
        if self.vectors.is_meta:
            return
        columns = torch.randn(self.vectors.shape, device=self.vectors.device)
        if init_weights:
            r = columns.shape[1]
            columns[:, 1::2] = columns[:, : r - r % 2 : 2]
            if r % 2:
                rule, cure = "an even r for a start as the identity", "Choose an even r, or init_weights=False"
                warnings.warn(expected("r", rule, r, where="HouseholderAdapter", cure=cure), stacklevel=3)
        self.vectors.copy_(columns)

    def extra_repr(self) -> str:
        """Describe the adapter in its module's line.

        Returns
        -------
        str
            Sizes.
        """
        return f"in_features={self.vectors.shape[0]}, r={self.vectors.shape[1]}"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Reflect the input and call the layer.

        Parameters
        ----------
        x : Tensor, shape (..., d) or (B, d, ...) for a convolution
            The layer's input.
        *args, **kwargs : object
            Further arguments of the layer.

        Returns
        -------
        object
            Whatever the layer returns.

        Raises
        ------
        ShapeError
            If the widths differ.
        TuckaError
            If a column is zero, see `unit_columns`; if `x` does not fit the layer.
        """
        rows = to_rows(self.base_layer, x)
        check_activations(rows, self.vectors, self._describe)
        check_base_dtype(self.base_layer, x, self._describe)
        adapted = householder_adapt(rows, unit_columns(self.vectors), where=self._describe)
        return self.base_layer(from_rows(self.base_layer, adapted, x), *args, **kwargs)

    def _describe(self) -> str:
        return f"HouseholderAdapter around {self.base_layer!r}"
