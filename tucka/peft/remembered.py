"""How adapted layers were, so that what was made of them is used only while they are so still."""

from __future__ import annotations

from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

from tucka.backends.torch.modules import ExpertParts
from tucka.backends.torch.private import buffers_by_name, modules_by_name, parameters_by_name

__all__ = ["Remembered"]

# Read by functions of the interpreter's own: a loop in Python over all layers would take as long as a product in each.
_STATE = attrgetter("_active_adapter", "_disable_adapters", "merged_adapters")
_OPTIONS = attrgetter("scale", "training", "dropout", "spec")
_PARAMETERS = itemgetter("cores", "expert_factor", "basis")


class Remembered:
    """How layers were when each made an update with one adapter."""

    def __init__(self) -> None:
        self._layers: list[Any] = []
        self._states: list[tuple[Any, ...]] = []
        self._experts: list[dict[str, Any]] = []
        self._adapters: list[str] = []
        self._parts: list[Any] = []
        self._options: list[tuple[Any, ...]] = []
        self._named: list[dict[str, Any]] = []
        self._parameters: list[Any] = []
        self._buffers: list[dict[str, Any]] = []
        self._strengths: list[Any] = []
        self._pinned: dict[str, tuple[dict[str, Any], Any]] = {}

    def add(self, layer: Any, adapter: str, parts: ExpertParts) -> None:
        """Remember one more layer."""
        active, disabled, merged = _STATE(layer)
        self._layers.append(layer)
        self._states.append((active if isinstance(active, str) else list(active), disabled, list(merged)))
        self._experts.append(modules_by_name(layer.tucka_experts))
        self._adapters.append(adapter)
        self._parts.append(parts)
        self._options.append(_OPTIONS(parts))
        self._named.append(parameters_by_name(parts))
        self._parameters += _PARAMETERS(parameters_by_name(parts))
        self._buffers.append(buffers_by_name(parts))
        self._strengths.append(buffers_by_name(parts).get("strength"))
        pinned = layer.tucka_scope.pinned
        self._pinned[adapter] = pinned, pinned.get(adapter)

    def is_as_it_was(self) -> bool:
        """Tell whether the next update of each layer would be made in the same way, of the same tensors."""
        # Moving a module keeps its parameters, but puts new tensors in the places of its buffers.
        try:
            return (
                list(map(_STATE, self._layers)) == self._states
                and all(map(is_, map(dict.get, self._experts, self._adapters), self._parts))
                and list(map(_OPTIONS, self._parts)) == self._options
                and all(map(is_, chain.from_iterable(map(_PARAMETERS, self._named)), self._parameters))
                and all(map(is_, map(dict.get, self._buffers, repeat("strength")), self._strengths))
                and all(pinned.get(name) is gates for name, (pinned, gates) in self._pinned.items())
            )
        except KeyError:  # a parameter was taken away
            return False
