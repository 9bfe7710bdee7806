"""The two thin products every adapter is made of, ``x U`` and ``y + m Uᵀ``, as a processor takes them best."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tucka.backends.torch.private import is_any_autocast_on

__all__ = [
    "FEW",
    "cast",
    "compute_dtype",
    "has_autocast",
    "into",
    "rows_of",
    "turned",
    "wide_dtype",
    "without_autocast",
]

# A basis (d, r) lies in memory the wrong way round for a CPU's product with few columns. Both factors turned, the same
# product takes a third of the time, so that the basis need not be copied. Up to this many rows it does not, and a
# turned copy is the faster way.
FEW = 15


def has_autocast(device: str) -> bool:
    """Tell whether torch casts what it multiplies on a type of device."""
    return is_any_autocast_on() and _may_have_autocast(device) and torch.is_autocast_enabled(device)


def _is_available(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


# A constant to compilers, for which torch before 2.12 cannot trace it: a full graph would fail there.
_may_have_autocast: Callable[[str], bool] = torch.compiler.assume_constant_result(_is_available)


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


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor that is not of a dtype yet: torch takes longer to find that out than Python."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def turned(basis: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """Return Uᵀ (r, d) of a basis (d, r) in a dtype, laid out for products with a number of rows."""
    transposed = (basis if basis.dtype is dtype else basis.to(dtype)).t()
    is_copied = (rows <= FEW or dtype is torch.float16) and transposed.is_cpu
    return transposed.contiguous() if is_copied else transposed


def into(rows: Tensor, laid: Tensor) -> Tensor:
    """Return ``x U`` (N, r) for rows (N, d) and Uᵀ (r, d) from `turned`."""
    if rows.shape[0] > FEW and rows.dtype in _TURNS and rows.is_cpu:
        return torch.mm(laid, rows.t()).t()
    return torch.mm(rows, laid.t())


_TURNS = (torch.float32, torch.float64)


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """View `x` (..., d) as rows (N, d) of a dtype."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.dtype is dtype else rows.to(dtype)
