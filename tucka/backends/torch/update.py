"""An adapter's update as nodes of torch's graph, with backward passes of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tucka.backends.torch.mixing import core_gradient, of_one_sample, scaled, times_core
from tucka.backends.torch.private import are_transformations_on
from tucka.backends.torch.thin import cast, compute_dtype, into, rows_of, turned

__all__ = ["add_product", "add_update", "is_plain", "project"]

# Left to automatic differentiation, an update costs about twice what it needs: products with a basis the wrong way
# round, several passes over (N, d) numbers for one gradient, and a node of the graph for each of a dozen steps. What is
# kept for the backward is x as it was given, strided or to be cast: layers that read the same input keep one copy
# between them. A compiler and the transformations of `torch.func` see the plain products and make their own of them.
# So does torch where rows are few: what it does too much then costs less than our calls of Python.
_FEW = 128


def add_update(
    base: Tensor,  # (..., d)
    x: Tensor,  # (..., d)
    basis: Tensor,  # (d, r)
    core: Tensor,  # (r, r), or that of each sample (B, ..., r, r)
    *,
    alpha: float | Tensor = 1.0,
) -> Tensor:
    """Add the update of `x` to `base` by one core for all rows, or for each sample."""
    dtype = compute_dtype(x)
    # Scaled here, where there are r² numbers and not N·r or N·d.
    core = cast(of_one_sample(scaled(core, alpha)), dtype)
    if not is_plain(x):
        result: Tensor = _Update.apply(None if base is x else base, x, basis, core, dtype)
        return result
    inner, rows = _projected(x, basis, dtype)
    rows = rows if base is x else rows_of(base, dtype)
    return torch.addmm(rows, times_core(inner, core), cast(basis, dtype).t()).reshape(base.shape)


def project(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x U`` (N, r) for `x` (..., d) and a basis U (d, r), and `x` itself as rows (N, d)."""
    # Use the returned rows where x would be added to something made from x U: both parts of the gradient then meet in
    # one backward, where the product's own kernel adds them without a further pass over (N, d) numbers.
    dtype = compute_dtype(x)
    if is_plain(x):
        return _projected(x, basis, dtype)
    inner, rows = _Project.apply(x, basis, dtype)
    return inner, rows


def add_product(rows: Tensor, inner: Tensor, basis: Tensor) -> Tensor:
    """Return ``rows + inner Uᵀ`` for rows (N, d), `inner` (N, r) in their dtype, and a basis U (d, r)."""
    if is_plain(rows):
        return torch.addmm(rows, inner, cast(basis, rows.dtype).t())
    return _AddProduct.apply(rows, inner, basis)  # type: ignore[no-any-return]


def is_plain(x: Tensor) -> bool:
    """Tell whether to leave products of `x` (..., d) to torch's own differentiation."""
    if torch.compiler.is_compiling() or are_transformations_on():
        return True
    return torch.is_grad_enabled() and x.numel() <= _FEW * x.shape[-1]


def _projected(x: Tensor, basis: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = rows_of(x, dtype)
    return torch.mm(rows, cast(basis, dtype)), rows


class _Update(torch.autograd.Function):
    """``base + ((x U) G) Uᵀ``, where `base` is x if it is None."""

    @staticmethod
    def forward(ctx: Any, base: Tensor | None, x: Tensor, basis: Tensor, core: Tensor, dtype: torch.dtype) -> Tensor:
        rows = rows_of(x, dtype)
        laid = turned(basis, dtype, rows.shape[0])
        inner = into(rows, laid)
        product = times_core(inner, core)
        ctx.dtype, ctx.base = dtype, None if base is None else (base.shape, base.dtype)
        ctx.save_for_backward(x, basis, core, inner, product)
        return torch.addmm(rows if base is None else rows_of(base, dtype), product, laid).view(x.shape)

    @staticmethod
    def backward(ctx: Any, of_result: Tensor) -> tuple[Tensor | None, ...]:
        x, basis, core, inner, product = ctx.saved_tensors
        need_base, need_x, need_basis, need_core, _ = ctx.needs_input_grad
        rows = rows_of(x, ctx.dtype)
        laid = turned(basis, ctx.dtype, rows.shape[0])
        if torch.is_grad_enabled():  # for second derivatives, with a graph of their own
            inner = into(rows, laid)
            product = times_core(inner, core)
        of_rows = of_result.reshape(rows.shape)
        of_product = into(of_rows, laid)
        of_inner = times_core(of_product, core.mT)
        of_base = of_x = of_basis = None
        if need_base:
            of_base = cast(of_rows.reshape(ctx.base[0]), ctx.base[1])
        if need_x:
            of_x = torch.addmm(of_rows, of_inner, laid) if ctx.base is None else torch.mm(of_inner, laid)
            of_x = cast(of_x.view(x.shape), x.dtype)
        if need_basis:
            of_laid = torch.addmm(torch.mm(of_inner.t(), rows), product.t(), of_rows)
            # Laid out as the parameter: else torch adds to it at a stride, and copies it.
            of_basis = cast(of_laid.t().contiguous(), basis.dtype)
        return of_base, of_x, of_basis, core_gradient(inner, of_product, core) if need_core else None, None


# Differentiable themselves: their backward passes read only inputs and outputs, so second derivatives are right.


class _Project(torch.autograd.Function):
    """``x U``, and x itself as rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, basis: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows = rows_of(x, dtype)
        ctx.dtype = dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, basis)
        return into(rows, turned(basis, dtype, rows.shape[0])), rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, basis = ctx.saved_tensors
        of_inner, of_rows = gradients
        of_x, of_basis = of_rows, None
        if of_inner is not None and ctx.needs_input_grad[0]:
            laid = turned(basis, ctx.dtype, of_inner.shape[0])
            of_x = torch.mm(of_inner, laid) if of_rows is None else torch.addmm(of_rows, of_inner, laid)
        if of_inner is not None and ctx.needs_input_grad[1]:
            of_basis = cast(torch.mm(of_inner.t(), rows_of(x, ctx.dtype)).t(), basis.dtype)
        return of_x if of_x is None else cast(of_x.reshape(x.shape), x.dtype), of_basis, None


class _AddProduct(torch.autograd.Function):
    """``rows + inner Uᵀ``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, inner: Tensor, basis: Tensor) -> Tensor:
        ctx.save_for_backward(inner, basis)
        return torch.addmm(rows, inner, turned(basis, rows.dtype, rows.shape[0]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inner, basis = ctx.saved_tensors
        (gradient,) = gradients
        of_inner = of_basis = None
        if ctx.needs_input_grad[1]:
            of_inner = into(gradient, turned(basis, gradient.dtype, gradient.shape[0]))
        if ctx.needs_input_grad[2]:
            of_basis = cast(torch.mm(inner.t(), gradient).t(), basis.dtype)
        return gradient, of_inner, of_basis
