"""The route that travels with a key-value cache: into its copies, and through operations on its rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tucka.backends.torch.private import assert_later, version_of
from tucka.errors import expected

__all__ = ["Travelling", "attach_routes", "cached_length", "check_empty", "routes_of"]

_NAME = "_tucka_routes"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Travelling:
    """The routes of one scope in one cache, (k, t) or (B, k, t) each, and the rows that they belong to."""

    def __init__(self, routes: dict[str, Tensor], tokens: dict[str, Tensor], cache: Any) -> None:
        self.routes = routes
        self.tokens = tokens  # (B, L, k, t) each: the gates of all tokens so far, where layers see them again
        self.belong_to(cache)

    def belong_to(self, cache: Any) -> None:
        """Note what the rows of a cache hold now."""
        # A tensor of its first layer that holds any: a copy of the cache copies this one too, and they stay the same.
        self.rows = rows = _rows_in(cache)
        self.version = 0 if rows is None or torch.compiler.is_compiling() else version_of(rows)
        # A compiled call cannot read versions, and torch counts none in inference mode.
        self.sums = None if rows is None else _sums_of(rows)

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
            travelling.belong_to(self.cache)
        if self.name == "reset":
            vars(self.cache).pop(_NAME, None)
        return result


_OPERATIONS = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop", "reset")


def cached_length(cache: Any) -> int:
    """Return how many tokens a cache holds; -1 where it may hold some and does not count them."""
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


def check_empty(cache: Any, message: str) -> bool:
    """Let a compiled call fail, once it runs, if a cache that counts its tokens in a tensor holds any."""
    length = cache.get_seq_length() if torch.compiler.is_compiling() and cache is not None else None
    if not isinstance(length, Tensor):
        return False
    assert_later(length == 0, message)
    return True


def _holds_something(layer: Any) -> bool:
    states = getattr(layer, "has_previous_state", None)
    if states and any(states.values()):
        return True
    return bool(getattr(layer, "is_initialized", True)) and hasattr(layer, "get_seq_length")


def _rows_in(cache: Any) -> Tensor | None:
    """Return the keys (B, h, L, d), or states (B, ...), of the first layer of a cache that has any."""
    cache = getattr(cache, "self_attention_cache", cache)
    for layer in getattr(cache, "layers", ()):
        states = (getattr(layer, name, None) for name in ("recurrent_states", "conv_states"))
        found = (state for each in states if isinstance(each, dict) for state in each.values())
        for rows in (getattr(layer, "keys", None), *found):
            if isinstance(rows, Tensor):
                return rows
    return None


def _sums_of(rows: Tensor) -> Tensor:
    """Add up each row's numbers as whole ones, shape (B,): exact, in whatever order a compiler adds."""
    return rows.view(_INTEGERS[rows.element_size()]).flatten(1).sum(dim=1)


def attach_routes(cache: Any, key: str, routes: dict[str, Tensor], tokens: dict[str, Tensor]) -> None:
    """Let a cache carry the routes of one scope, and the gates of its tokens where layers see these again."""
    if not hasattr(cache, "__dict__"):
        return
    found = vars(cache).setdefault(_NAME, {})
    found[key] = Travelling(routes, tokens, cache)
    for name in _OPERATIONS:
        if hasattr(type(cache), name) and name not in vars(cache):
            vars(cache)[name] = _Followed(cache, name)


def routes_of(cache: Any, key: str) -> Travelling | None:
    """Return the routes that a cache carries; None where there are none, or where its rows are no longer theirs."""
    travelling: Travelling | None = getattr(cache, _NAME, {}).get(key) if cache is not None else None
    if travelling is None or not _has_the_rows(cache, travelling):
        return None
    return travelling


def _has_the_rows(cache: Any, travelling: Travelling) -> bool:
    """Tell whether the rows of a cache are those that its routes belong to."""
    before, now, sums = travelling.rows, _rows_in(cache), travelling.sums
    if before is None or now is None or sums is None:
        return before is now
    if before is now and torch.compiler.is_compiling():
        message = expected("route", "a cache whose rows are those that were routed", "rows that have been moved")
        assert_later((sums == _sums_of(now)).all(), message)
        return True
    if before is now:
        is_untouched = not now.is_inference() and version_of(now) == travelling.version
        return is_untouched or torch.equal(sums, _sums_of(now))  # a copy has versions of its own
    if torch.compiler.is_compiling():
        return False
    length = min(before.shape[-2], now.shape[-2])
    if before.shape[:-2] != now.shape[:-2] or before.shape[-1] != now.shape[-1] or not length:
        return False
    return bool(torch.equal(before[..., :length, :], now[..., :length, :].to(before.device)))
