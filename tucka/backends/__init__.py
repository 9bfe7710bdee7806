"""The array backends as users see them: which one made an array, and how to add one."""

from tucka.arrays import Array, backend_of, register

__all__ = ["Array", "backend_of", "register"]
