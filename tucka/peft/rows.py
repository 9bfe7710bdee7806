"""One batch with several adapters: each row of a call has the adapter that its caller names, or none."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from tucka.backends.torch.routing.scope import RoutingScope
from tucka.errors import ConfigError, expected
from tucka.peft.layer import BASE, TuckALayer

__all__ = ["adapters_of_rows"]

_WHERE = "TuckAModel"


@contextmanager
def adapters_of_rows(
    model: nn.Module, scope: RoutingScope, names: Sequence[str], options: dict[str, Any]
) -> Iterator[None]:
    """Let each layer know the adapters of its rows inside; `options` are the call's, of which generation reads some."""
    _check_names(model, scope, names)
    hook = _Hook(list(names), _repeats(model, options))
    counts = {name: {part: load.clone() for part, load in parts.items()} for name, parts in scope.load.items()}
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, (TuckALayer, AuxiliaryTrainingWrapper)):
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
    scope.load.update(counts)  # a router has seen the rows of other adapters too


class _Hook:
    """Hands the names for the rows of a module's input to the module, in the thread that made the call."""

    def __init__(self, names: list[str], repeats: int) -> None:
        self.names, self.repeats = names, repeats
        self.thread = threading.get_ident()

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return None
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return args, {**kwargs, "adapter_names": self._for(given.shape[0])}

    def _for(self, rows: int) -> list[str]:
        """Return a name for each row; generation repeats rows for its beams, and not those of an encoder."""
        if rows == len(self.names):
            return self.names
        if rows == len(self.names) * self.repeats:
            return [name for name in self.names for _ in range(self.repeats)]
        rule = f"a name for each of the {rows} rows"
        raise ConfigError(expected("adapter_names", rule, f"{len(self.names)} names", where=_WHERE))


def _check_names(model: nn.Module, scope: RoutingScope, names: Sequence[str]) -> None:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        rule = f"a list with the name of an adapter, or {BASE!r}, for each row"
        raise ConfigError(expected("adapter_names", rule, repr(names), where=_WHERE))
    if model.training:
        cure = "Call model.eval(), or train one adapter at a time"
        raise ConfigError(expected("adapter_names", "None in training", list(names), where=_WHERE, cure=cure))
    layers = [module for module in model.modules() if isinstance(module, TuckALayer)]
    known = {name for layer in layers for name in layer.tucka_experts}
    unknown = sorted({name for name in names if name != BASE} - known)
    if unknown:
        rule = f"names of adapters, {sorted(known)}, or {BASE!r}"
        raise ConfigError(expected("adapter_names", rule, ", ".join(unknown), where=_WHERE))
    if any(layer.merged for layer in layers):
        cure = "Call model.unmerge_adapter() first"
        raise ConfigError(
            expected("adapter_names", "None while adapters are merged", list(names), where=_WHERE, cure=cure)
        )
    for name in known.intersection(names) - set(scope.pinned):
        if any(router.spec.routing == "batch" for router in scope.routers(name).values()):
            rule, cure = "adapters that are not routed by batch, which all rows share", "Pin it, or give the route"
            raise ConfigError(expected("adapter_names", rule, repr(name), where=_WHERE, cure=cure))


def _repeats(model: nn.Module, options: dict[str, Any]) -> int:
    """Return how often generation repeats each row, which is 1 in other calls."""
    settings = options.get("generation_config") or getattr(model, "generation_config", None)
    found = [options.get(name) or getattr(settings, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    return max(found)
