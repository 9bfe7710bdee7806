"""Registration of containers with JAX, which looks inside registered classes only, without importing JAX."""

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
    """Let JAX's transformations look inside objects of a class; `fields` are all attributes, and hold arrays."""
    # The class calls this whenever it makes an object: JAX may be imported at any time.
    if kind in _registered or sys.modules.get("jax") is None:
        return
    tree_util = importlib.import_module("jax.tree_util")  # waits for another thread that is importing it

    def flatten(container: Any) -> tuple[tuple[Any, ...], None]:
        return tuple(getattr(container, field) for field in fields), None

    def flatten_with_keys(container: Any) -> tuple[tuple[Any, ...], None]:
        return tuple((tree_util.GetAttrKey(field), getattr(container, field)) for field in fields), None

    def unflatten(_: None, children: Iterable[Any]) -> Any:
        # Without the constructor and its checks: JAX also builds objects from placeholders that are no arrays.
        container: Any = object.__new__(kind)
        for field, child in zip(fields, children, strict=True):
            object.__setattr__(container, field, child)
        return container

    with _registering:
        if kind not in _registered:
            tree_util.register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)
            _registered.add(kind)


# As in dispatch.py: a compiler runs this as Python and does not trace it.
register_pytree._dynamo_marked_constant = True  # type: ignore[attr-defined]
