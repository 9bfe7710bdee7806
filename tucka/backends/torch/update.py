"""An adapter's update as nodes of torch's graph, with backward passes of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tucka.backends.torch.mixing import (
    between_columns,
    column_scale,
    core_gradient,
    mixed,
    mixed_by,
    mixed_gradients,
    of_one_sample,
    scaled,
    times_core,
    weights_of,
)
from tucka.backends.torch.private import are_transformations_on
from tucka.backends.torch.thin import FEW, cast, compute_dtype, into, rows_of, turned

__all__ = ["add_product", "add_update", "project"]

# Left to automatic differentiation, an update costs about twice what it needs: products with a basis the wrong way
# round, several passes over (N, d) numbers for one gradient, and a node of the graph for each of a dozen steps. What is
# kept for the backward is x as it was given, strided or to be cast: layers that read the same input keep one copy
# between them. A compiler and the transformations of `torch.func` see the plain products and make their own of them,
# and few rows cost less than our calls.


def add_update(
    base: Tensor,  # (..., d)
    x: Tensor,  # (..., d)
    basis: Tensor,  # (d, r)
    cores: Tensor,  # (k, p, r, r), or one that is mixed already (..., r, r)
    expert_factor: Tensor | None = None,  # (t, p)
    gates: Tensor | None = None,  # (..., k, t), aligned with x from the left
    *,
    alpha: float | Tensor = 1.0,
    is_bounded: bool = False,  # whether the basis enters with soft unit columns
) -> Tensor:
    """Add the update of `x` to `base` by one mixed core for all rows, or for each sample."""
    dtype = compute_dtype(x)
    if not isinstance(alpha, Tensor) and not _is_plain(x):
        if gates is None:
            cores, alpha = scaled(cores, alpha), 1.0
        start = None if base is x else base
        result: Tensor = _Update.apply(start, x, basis, cores, expert_factor, gates, alpha, dtype, is_bounded)[0]
        return result
    inner, rows = _projected(x, basis, dtype)
    # Scaled here, where there are r² numbers and not N·r or N·d.
    core = cores if gates is None or expert_factor is None else mixed(cores, expert_factor, gates)
    core = scaled(core, alpha)
    core = between_columns(core, column_scale(basis)) if is_bounded else core
    inner = times_core(inner, cast(core, dtype))
    rows = rows if base is x else rows_of(base, dtype)
    return torch.addmm(rows, inner, cast(basis, dtype).t()).reshape(base.shape)


def project(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x U`` (N, r) for `x` (..., d) and a basis U (d, r), and `x` itself as rows (N, d)."""
    # Use the returned rows where x would be added to something made from x U: both parts of the gradient then meet in
    # one backward, where the product's own kernel adds them without a further pass over (N, d) numbers.
    dtype = compute_dtype(x)
    if _is_plain(x):
        return _projected(x, basis, dtype)
    inner, rows = _Project.apply(x, basis, dtype)
    return inner, rows


def add_product(rows: Tensor, inner: Tensor, basis: Tensor) -> Tensor:
    """Return ``rows + inner Uᵀ`` for rows (N, d), `inner` (N, r) in their dtype, and a basis U (d, r)."""
    if _is_plain(rows):
        return torch.addmm(rows, inner, cast(basis, rows.dtype).t())
    return _AddProduct.apply(rows, inner, basis)  # type: ignore[no-any-return]


def _is_plain(x: Tensor) -> bool:
    """Tell whether to leave products of `x` (..., d) to torch's own differentiation."""
    if torch.compiler.is_compiling() or are_transformations_on():
        return True
    return torch.is_grad_enabled() and x.numel() <= FEW * x.shape[-1]


def _projected(x: Tensor, basis: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = rows_of(x, dtype)
    return torch.mm(rows, cast(basis, dtype)), rows


# Differentiable themselves: backward passes read only inputs and outputs, so second derivatives are right.


class _Update(torch.autograd.Function):
    """``base + ((x U) αḠ) Uᵀ``; its other outputs are the factors of its products, which the backward needs."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor | None,
        x: Tensor,
        basis: Tensor,
        cores: Tensor,
        expert_factor: Tensor | None,
        gates: Tensor | None,
        alpha: float,
        dtype: torch.dtype,
        is_bounded: bool,
    ) -> tuple[Tensor, ...]:
        rows = rows_of(x, dtype)
        laid = turned(basis, dtype, rows.shape[0])
        inner = into(rows, laid)
        core = cores
        if gates is not None and expert_factor is not None:
            weights = weights_of(expert_factor, gates)
            core = scaled(mixed_by(weights, cores), alpha).reshape(*gates.shape[:-2], *cores.shape[2:])
        if is_bounded:
            scale = column_scale(basis)
            core = between_columns(core, scale)
        core = of_one_sample(cast(core, dtype))
        product = times_core(inner, core)
        made = (inner, product) if gates is None else (inner, product, core, weights)
        made = (*made, scale) if is_bounded else made
        start = rows if base is None else rows_of(base, dtype)
        result = torch.addmm(start, product, laid).view(x.shape)
        ctx.is_bounded = is_bounded
        ctx.alpha, ctx.dtype, ctx.base = alpha, dtype, None if base is None else (base.shape, base.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, basis, cores, expert_factor, gates, *made)
        return result, *made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, basis, cores, expert_factor, gates, inner, product, *made = ctx.saved_tensors
        of_result, of_inner, of_product, *of_made = gradients
        core, of_core = (made[0], of_made[0]) if made else (of_one_sample(cast(cores, ctx.dtype)), None)
        need_base, need_x, need_basis, *needed = ctx.needs_input_grad[:6]
        rows = rows_of(x, ctx.dtype)
        laid = turned(basis, ctx.dtype, rows.shape[0])
        of_rows = of_base = of_x = None
        if of_result is not None:
            of_rows = of_result.reshape(rows.shape)
            of_product = _sum(of_product, into(of_rows, laid))
            if need_base:
                of_base = cast(of_rows.reshape(ctx.base[0]), ctx.base[1])
        if of_product is not None:
            of_inner = _sum(of_inner, times_core(of_product, core.mT))
            if True in needed or (ctx.is_bounded and need_basis):
                of_core = _sum(of_core, core_gradient(inner, of_product, core))
        if of_inner is not None and need_x:
            added = of_rows if ctx.base is None else None
            of_x = torch.mm(of_inner, laid) if added is None else torch.addmm(added, of_inner, laid)
            of_x = cast(of_x.view(x.shape), x.dtype)
        of_laid = None
        if of_inner is not None and need_basis:
            of_laid = torch.mm(of_inner.t(), rows)
            of_laid = of_laid if of_rows is None else torch.addmm(of_laid, product.t(), of_rows)
        if ctx.is_bounded:
            if need_basis:
                of_laid = _less(of_laid, laid, _pull(of_core, core, made[2], of_made[2]))
            if of_core is not None:
                of_core = between_columns(cast(of_core, made[2].dtype), made[2])
        of_basis = None if of_laid is None else cast(of_laid.t(), basis.dtype)
        of_parts: tuple[Tensor | None, ...] = (None, None, None)
        if gates is None and of_core is not None:
            of_parts = (cast(of_core.reshape(cores.shape), cores.dtype), None, None)
        elif gates is not None:
            of_parts = mixed_gradients(of_core, of_made[1], made[1], cores, expert_factor, gates, ctx.alpha, needed)
        return of_base, of_x, of_basis, *of_parts, None, None, None


def _pull(of_core: Tensor | None, core: Tensor, scale: Tensor, of_scale: Tensor | None) -> Tensor | None:
    """Return by how much of each column (r,) the scale of columns lowers the gradient of a basis."""
    # With s = 1/√(‖u‖² + c), ds/du = -s³ u, and the core is s_i s_j times one that does not depend on u.
    pull = None if of_scale is None else of_scale * scale**3
    if of_core is None:
        return pull
    share = cast(of_core, scale.dtype) * cast(core, scale.dtype)
    share = share.flatten(0, -3).sum(0) if share.ndim > 2 else share
    return _sum(pull, (share.sum(0) + share.sum(1)) * scale * scale)


def _less(of_laid: Tensor | None, laid: Tensor, pull: Tensor | None) -> Tensor | None:
    """Subtract the share of the columns themselves from a gradient (r, d)."""
    if pull is None:
        return of_laid
    columns = cast(pull, laid.dtype)[:, None]
    return -laid * columns if of_laid is None else torch.addcmul(of_laid, laid, columns, value=-1)


def _sum(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first + second


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
