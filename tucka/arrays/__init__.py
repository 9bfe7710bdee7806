"""Arrays of any library: which backend made them, and their dtypes."""

from tucka.arrays.dispatch import Array, Backend, backend_of, register
from tucka.arrays.dtypes import cast, host_values, is_half, widen

__all__ = ["Array", "Backend", "backend_of", "cast", "host_values", "is_half", "register", "widen"]
