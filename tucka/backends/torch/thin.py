"""The two thin products every adapter is made of, ``x U`` and ``y + m Uᵀ``, with backward passes of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from tucka.backends.torch.private import is_any_autocast_on

__all__ = ["add_product", "compute_dtype", "has_autocast", "project", "turned", "wide_dtype", "without_autocast"]

# Left to automatic differentiation, these products cost twice what they need. Here a basis is turned once in each pass
# (see `turned`), and the gradient of x is summed inside the product's own kernel (see `project`). What is kept for the
# backward is x as it was given, strided or to be cast: layers that read the same input keep one copy between them.
# A compiler sees the plain products and makes its own choices, and where x is small they cost less than our calls;
# without gradients nothing is recorded.


def has_autocast(device: str) -> bool:
    """Tell whether torch casts what it multiplies on a type of device."""
    return is_any_autocast_on() and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context in which products run in the dtype of what they multiply."""
    # Entering torch's context costs more than a small product, so it is entered only where autocast is on.
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the widest dtype of tensors, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which products of `x` run: autocast's where it is on, else that of `x`."""
    # Float64 stays float64 under autocast, as in torch's own products.
    if not is_any_autocast_on():
        return x.dtype
    if x.dtype != torch.float64 and has_autocast(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def project(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x U`` (N, r) for `x` (..., d) and a basis U (d, r), and `x` itself as rows (N, d)."""
    # Use the returned rows where x would be added to something made from x U: both parts of the gradient then meet in
    # one backward, where the product's own kernel adds them without a further pass over (N, d) numbers.
    dtype = compute_dtype(x)
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Project.forward(x, basis, dtype)
    if _is_plain(x, dtype):
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        return rows @ basis.to(dtype), rows
    inner, rows = _Project.apply(x, basis, dtype)
    return inner, rows


def add_product(rows: Tensor, inner: Tensor, basis: Tensor) -> Tensor:
    """Return ``rows + inner Uᵀ`` for rows (N, d), `inner` (N, r) in their dtype, and a basis U (d, r)."""
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _AddProduct.forward(rows, inner, basis)
    if _is_plain(rows, rows.dtype):
        return torch.addmm(rows, inner, basis.to(rows.dtype).t())
    return _AddProduct.apply(rows, inner, basis)  # type: ignore[no-any-return]


def _is_plain(x: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether to leave these products to automatic differentiation: for a compiler, or where x is small."""
    return torch.compiler.is_compiling() or (x.numel() <= _FEW and x.dtype is dtype and x.is_contiguous())


# Numbers in x up to which the calls of a backward of our own take longer than what it saves.
_FEW = 65536


def turned(basis: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Uᵀ (r, d), laid out for thin products."""
    # A (d, r) basis lies in memory the wrong way round for a CPU's matrix product. The turned copy is never kept.
    transposed = basis.to(dtype).t()
    return transposed.contiguous() if transposed.device.type == "cpu" else transposed


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _signed(function: _Function) -> _Function:
    """Store a function's signature on it: torch looks it up in each call, which on few rows takes measurable time."""
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return function


class _Project(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @_signed
    def forward(x: Tensor, basis: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        return rows @ turned(basis, dtype).t(), rows.view_as(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        x, basis, ctx.dtype = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, basis)
        ctx.save_for_forward(x, basis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # Differentiable itself: it reads only inputs, no intermediate, so second derivatives are right.
        x, basis = ctx.saved_tensors
        of_inner, of_rows = gradients
        of_x, of_basis = of_rows, None
        if of_inner is not None and ctx.needs_input_grad[0]:
            laid = turned(basis, ctx.dtype)
            of_x = of_inner @ laid if of_rows is None else torch.addmm(of_rows, of_inner, laid)
        if of_inner is not None and ctx.needs_input_grad[1]:
            rows = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
            of_basis = (of_inner.t() @ rows).t().to(basis.dtype)
        return of_x if of_x is None else of_x.reshape(x.shape).to(x.dtype), of_basis, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        x, basis = (saved.to(ctx.dtype) for saved in ctx.saved_tensors)
        of_x, of_basis = (None if tangent is None else tangent.to(ctx.dtype) for tangent in tangents[:2])
        rows = torch.zeros_like(x) if of_x is None else of_x
        rows, x = rows.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1])
        inner = rows @ basis
        return inner if of_basis is None else inner + x @ of_basis, rows.view_as(rows)


class _AddProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @_signed
    def forward(rows: Tensor, inner: Tensor, basis: Tensor) -> Tensor:
        return torch.addmm(rows, inner, turned(basis, rows.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        _, inner, basis = inputs
        ctx.save_for_backward(inner, basis)
        ctx.save_for_forward(inner, basis)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inner, basis = ctx.saved_tensors
        (gradient,) = gradients
        of_inner = of_basis = None
        if ctx.needs_input_grad[1]:
            of_inner = gradient @ turned(basis, gradient.dtype).t()
        if ctx.needs_input_grad[2]:
            of_basis = (inner.t() @ gradient).t().to(basis.dtype)
        return gradient, of_inner, of_basis

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        inner, basis = ctx.saved_tensors
        of_rows, of_inner, of_basis = tangents
        result = torch.zeros(inner.shape[0], basis.shape[0], dtype=inner.dtype, device=inner.device)
        result = result if of_rows is None else result + of_rows
        result = result if of_inner is None else torch.addmm(result, of_inner, basis.to(inner.dtype).t())
        return result if of_basis is None else torch.addmm(result, inner, of_basis.to(inner.dtype).t())
