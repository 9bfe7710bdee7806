"""The two thin products every adapter is made of, ``x U`` and ``y + m Uᵀ``, as a processor takes them best."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
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
    "is_token",
    "rows_of",
    "turned",
    "wide_dtype",
    "without_autocast",
]

# Up to this many rows, a turned copy of a basis (d, r), which calls share, makes the second product faster.
FEW = 15


def _processor() -> str:
    """Name the maker of the processor, as far as the operating system says it."""
    try:
        with Path("/proc/cpuinfo").open("rb") as told:  # of Linux
            return told.read(1024).decode("utf-8", "replace")
    except OSError:
        return platform.processor()


# On AMD's processors, torch's library multiplies slowly where a product has few columns. With both factors turned, the
# same product took a third of the time there from 16 rows on; on Intel's it takes up to four times as long. The maker
# decides, and no measurement, so that a machine always computes the same bits.
TURNS = "AuthenticAMD" in _processor()


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
    if TURNS and rows.shape[0] > FEW and rows.dtype in _TURNED and rows.is_cpu:
        return torch.mm(laid, rows.t()).t()
    return torch.mm(rows, laid.t())


_TURNED = (torch.float32, torch.float64)


def is_token(shape: tuple[int, ...]) -> bool:
    """Tell whether a shape is that of one token of each of few samples, (B, 1, d)."""
    # For these, torch's batched products take half of the time: they have less to find out, and need no views of rows.
    return len(shape) == 3 and shape[1] == 1 and 0 < shape[0] <= FEW


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """View `x` (..., d) as rows (N, d) of a dtype."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.dtype is dtype else rows.to(dtype)
