"""What tucka raises, and the one place where its messages are built.

Every message reads ``name: expected RULE, got VALUE (WHERE)``, followed by the cure where one is known.
"""

from __future__ import annotations

__all__ = ["CheckpointError", "ConfigError", "RouteError", "ShapeError", "TuckaError", "expected"]


class TuckaError(ValueError):
    """Base of all errors that tucka raises for a wrong value; also a `ValueError`."""


class ShapeError(TuckaError):
    """An array has the wrong number of axes or the wrong size along one."""


class ConfigError(TuckaError):
    """A number or option is outside its rule."""


class RouteError(TuckaError):
    """A layer needs a route that is missing, or that does not fit its input."""


class CheckpointError(TuckaError):
    """A file or state dict cannot be read as what it should be."""


def expected(name: str, rule: str, value: object, *, where: str = "", cure: str = "") -> str:
    """Build a message of the one form that all of tucka's errors share.

    Parameters
    ----------
    name : str
        The argument at fault.
    rule : str
        What it should have been.
    value : object
        What it was; shown with ``str``.
    where : str
        The function or module, when the reader needs it.
    cure : str
        What to do about it: a whole sentence, without its full stop.

    Returns
    -------
    str
        The message.

    Examples
    --------
    >>> expected("mode", "an integer from 0 to 2", 5, where="mode_product")
    'mode: expected an integer from 0 to 2, got 5 (mode_product)'
    """
    message = f"{name}: expected {rule}, got {value}"
    if where:
        message += f" ({where})"
    if cure:
        message += f". {cure}"
    return message
