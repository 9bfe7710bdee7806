"""Putting a model back as it was when an adapter cannot be added."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tucka.backends.torch.routing.scope import RoutingScope

__all__ = ["unchanged_on_error"]

# What an attribute is, and a copy of what it holds where that can change in place.
_Attributes = dict[str, tuple[Any, Any]]


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Restore modules, hooks, adapters, modes and flags if the block raises; the block must not write to tensors."""
    owners: list[Any] = list(model.modules())
    found = (getattr(owner, "tucka_scope", None) for owner in owners)
    scopes = {id(scope): scope for scope in found if isinstance(scope, RoutingScope)}
    known = [(owner, _remember(owner)) for owner in [*owners, *scopes.values()]]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for owner, attributes in known:
            _put_back(owner, attributes)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def _remember(owner: nn.Module | RoutingScope) -> _Attributes:
    return {
        name: (value, copy.copy(value) if isinstance(value, (dict, list, set)) else None)
        for name, value in vars(owner).items()
    }


def _put_back(owner: nn.Module | RoutingScope, attributes: _Attributes) -> None:
    """Restore attributes; containers are refilled and not replaced, since hook handles refer to them."""
    for name in [name for name in vars(owner) if name not in attributes]:
        del vars(owner)[name]
    for name, (value, content) in attributes.items():
        if content is not None and _has_changed(value, content):
            if isinstance(value, list):
                value[:] = content
            else:
                value.clear()
                value.update(content)
        vars(owner)[name] = value


def _has_changed(value: Any, content: Any) -> bool:
    """Tell whether a container holds other objects than before; one that cannot be written to never does."""
    if isinstance(value, set):
        return bool(value != content)
    pairs = zip(value.items(), content.items(), strict=False) if isinstance(value, dict) else ()
    same = all(key == name and held is before for (key, held), (name, before) in pairs)
    if isinstance(value, list):
        same = all(held is before for held, before in zip(value, content, strict=False))
    return not same or len(value) != len(content)
