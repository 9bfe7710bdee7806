"""The one error of the demo."""

from __future__ import annotations

__all__ = ["DemoError"]


class DemoError(RuntimeError):
    r"""The demo cannot go on; the message names the cure.

    Parameters
    ----------
    message : str
        Put on one line, whatever it quotes.

    Examples
    --------
    >>> str(DemoError("pip said:\n  no"))
    'pip said: no'
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
