"""How an adapted layer was, so that a generation notices what changes in it between two tokens."""

from __future__ import annotations

from typing import Any

from tucka.backends.torch.modules import ExpertParts
from tucka.backends.torch.private import modules_by_name, parameters_by_name

__all__ = ["Remembered"]


class Remembered:
    """How a layer was when it made an update with one active adapter."""

    __slots__ = ("_active", "_adapter", "_alpha", "_experts", "_layer", "_named", "_parts", "_pinned", "_training")

    def __init__(self, layer: Any, adapter: str, parts: ExpertParts) -> None:
        self._layer, self._adapter, self._parts = layer, adapter, parts
        self._active = layer._active_adapter
        self._experts = modules_by_name(layer.tucka_experts)
        self._named = dict(parameters_by_name(parts))
        self._alpha, self._training = parts.scale, parts.training
        self._pinned = layer.tucka_scope.pinned.get(adapter)

    def is_as_it_was(self) -> bool:
        """Tell whether the next update would be made in the same way."""
        layer, parts, known = self._layer, self._parts, self._named
        now = parameters_by_name(parts)
        return (
            layer._active_adapter is self._active
            and not layer._disable_adapters
            and not layer.merged_adapters
            and self._experts.get(self._adapter) is parts
            and parts.scale == self._alpha
            and parts.training is self._training
            and now["cores"] is known["cores"]
            and now["expert_factor"] is known["expert_factor"]
            and now["basis"] is known["basis"]
            and layer.tucka_scope.pinned.get(self._adapter) is self._pinned
        )
