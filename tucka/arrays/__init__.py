"""Arrays of any library: which backend made them, their dtypes, and the way to the host and back."""

from tucka.arrays.dispatch import Array, Backend, backend_of, register
from tucka.arrays.dtypes import cast, detach, floating_backend, is_half, widen
from tucka.arrays.host import Values, array_like, finite_values, host_numbers, host_values, placement

__all__ = [
    "Array",
    "Backend",
    "Values",
    "array_like",
    "backend_of",
    "cast",
    "detach",
    "finite_values",
    "floating_backend",
    "host_numbers",
    "host_values",
    "is_half",
    "placement",
    "register",
    "widen",
]
