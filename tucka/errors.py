"""What tucka raises, and the one place where its messages are built."""

from __future__ import annotations

__all__ = [
    "ArrayError",
    "CheckpointError",
    "ConfigError",
    "KeywordError",
    "RouteError",
    "ShapeError",
    "TuckaError",
    "expected",
]


class TuckaError(ValueError):
    """Base of all errors that tucka raises for a wrong value; also a `ValueError`."""


class ArrayError(TuckaError, TypeError):
    """An array is of the wrong library, dtype or device; also a `TypeError`."""


class ShapeError(TuckaError):
    """An array has the wrong number of axes or the wrong size along one."""


class ConfigError(TuckaError):
    """A number or option is outside its rule."""


class KeywordError(ConfigError, TypeError):
    """A constructor does not have an argument that it was given; a `TypeError` too, as Python raises for it."""


class RouteError(TuckaError):
    """A layer needs a route that is missing, or that does not fit its input."""


class CheckpointError(TuckaError):
    """A file or state dict cannot be read as what it should be."""


def expected(name: str, rule: str, value: object, *, where: str = "", cure: str = "") -> str:
    """Build ``name: expected RULE, got VALUE (WHERE). CURE``; the cure is a sentence without its full stop."""
    message = f"{name}: expected {rule}, got {value}"
    if where:
        message += f" ({where})"
    if cure:
        message += f". {cure}"
    return message
