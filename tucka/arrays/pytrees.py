"""JAX looks inside a container only if its class is registered; this registers one without importing JAX for it."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["register_pytree"]

_registered: set[type] = set()
_registering = threading.Lock()


def register_pytree(kind: type, fields: Sequence[str]) -> None:
    """Let JAX's transformations look inside objects of a class, if JAX is imported by now; else do nothing.

    The class calls this whenever it makes an object, since JAX may be imported at any time. JAX also builds objects
    from placeholders that are no arrays, so they are rebuilt without their constructor and its checks.

    Parameters
    ----------
    kind : type
        The class.
    fields : sequence of str
        The attributes that hold its arrays; they must be all that it holds.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> class Pair(SimpleNamespace):
    ...     pass
    >>> register_pytree(Pair, ("first", "second"))
    """
    if kind in _registered or sys.modules.get("jax") is None:
        return
    tree_util = importlib.import_module("jax.tree_util")  # waits for another thread that is importing it

    def flatten(container: Any) -> tuple[tuple[Any, ...], None]:
        return tuple(getattr(container, field) for field in fields), None

    def flatten_with_keys(container: Any) -> tuple[tuple[Any, ...], None]:
        return tuple((tree_util.GetAttrKey(field), getattr(container, field)) for field in fields), None

    def unflatten(_: None, children: Iterable[Any]) -> Any:
        container: Any = object.__new__(kind)
        for field, child in zip(fields, children, strict=True):
            object.__setattr__(container, field, child)
        return container

    with _registering:
        if kind not in _registered:
            tree_util.register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)
            _registered.add(kind)


# As for the lookup of backends: a compiler runs this as Python instead of tracing it.
register_pytree._dynamo_marked_constant = True  # type: ignore[attr-defined]
