"""The route that travels with a key-value cache: into its copies, and through operations on its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Travelling", "attach_routes", "cached_length", "routes_of"]

_NAME = "_tucka_routes"


class Travelling:
    """The routes of one scope in one cache, (k, t) or (B, k, t) each, and the keys that they belong to."""

    def __init__(self, routes: dict[str, Tensor], tokens: dict[str, Tensor], keys: Tensor | None) -> None:
        self.routes = routes
        self.tokens = tokens  # (B, L, k, t) each: the gates of all tokens so far, where layers see them again
        self.keys = keys  # of the first layer that has any: a copy of the cache copies both

    def select(self, rows: Tensor) -> None:
        """Follow a selection of rows."""
        self.tokens = {name: gates[rows.to(gates.device)] for name, gates in self.tokens.items()}
        self.routes = {
            name: gates if gates.ndim == 2 else gates[rows.to(gates.device)] for name, gates in self.routes.items()
        }

    def repeat(self, times: int) -> None:
        """Follow a repetition of rows."""
        self.tokens = {name: gates.repeat_interleave(times, dim=0) for name, gates in self.tokens.items()}
        self.routes = {
            name: gates if gates.ndim == 2 else gates.repeat_interleave(times, dim=0)
            for name, gates in self.routes.items()
        }


class _Followed:
    """One operation of a cache on its rows, which the routes take part in."""

    def __init__(self, cache: Any, name: str) -> None:
        self.cache = cache
        self.name = self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the cache's own operation, and let the routes follow."""
        result = getattr(type(self.cache), self.name)(self.cache, *args, **kwargs)
        for travelling in vars(self.cache).get(_NAME, {}).values():
            given = next(iter((*args, *kwargs.values())), None)
            if self.name in ("reorder_cache", "batch_select_indices"):
                travelling.select(given)
            elif self.name == "batch_repeat_interleave":
                travelling.repeat(given)
            travelling.keys = _keys_of(self.cache)
        if self.name == "reset":
            vars(self.cache).pop(_NAME, None)
        return result


_OPERATIONS = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop", "reset")


def cached_length(cache: Any) -> int:
    """Return how many tokens a cache holds; -1 where it holds some and does not count them."""
    layers = getattr(cache, "layers", None)
    if layers is not None and not any(_holds_something(layer) for layer in layers):
        return 0
    try:
        length = cache.get_seq_length()
    except ValueError:  # of states alone, which have no length
        return -1
    if isinstance(length, Tensor):
        return -1 if torch.compiler.is_compiling() else int(length)
    return int(length)


def _holds_something(layer: Any) -> bool:
    states = getattr(layer, "has_previous_state", None)
    if states and any(states.values()):
        return True
    return bool(getattr(layer, "is_initialized", True)) and hasattr(layer, "get_seq_length")


def _keys_of(cache: Any) -> Tensor | None:
    cache = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor):
            return keys
    return None


def attach_routes(cache: Any, key: str, routes: dict[str, Tensor], tokens: dict[str, Tensor]) -> None:
    """Let a cache carry the routes of one scope, and the gates of its tokens where layers see these again."""
    if not hasattr(cache, "__dict__"):
        return
    found = vars(cache).setdefault(_NAME, {})
    found[key] = Travelling(routes, tokens, _keys_of(cache))
    if torch.compiler.is_compiling():
        return
    for name in _OPERATIONS:
        if hasattr(type(cache), name) and name not in vars(cache):
            vars(cache)[name] = _Followed(cache, name)


def routes_of(cache: Any, key: str) -> Travelling | None:
    """Return the routes that a cache carries; None where there are none, or where its rows are no longer theirs."""
    travelling: Travelling | None = getattr(cache, _NAME, {}).get(key) if cache is not None else None
    if travelling is None:
        return None
    if not torch.compiler.is_compiling() and not _are_the_rows(travelling.keys, _keys_of(cache)):
        return None
    return travelling


def _are_the_rows(before: Tensor | None, now: Tensor | None) -> bool:
    """Tell whether keys are the same ones, or continue them row by row."""
    if before is now or before is None or now is None:
        return True
    length = min(before.shape[-2], now.shape[-2])
    if before.shape[:-2] != now.shape[:-2] or not length:
        return False
    return bool(torch.equal(before[..., :length, :], now[..., :length, :].to(before.device)))
