"""The adapted layer as PEFT sees it: any number of TuckA adapters around one base layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from torch import Tensor, nn

from tucka.backends.torch.base_layers import is_readable, step_gain, to_rows
from tucka.backends.torch.checks import check_activations, check_base_dtype
from tucka.backends.torch.modules import ExpertParts, adapt_input, width_of
from tucka.backends.torch.routing.router import Router
from tucka.backends.torch.routing.scope import RoutingScope
from tucka.peft.config import TuckAConfig
from tucka.peft.merging import Merging

__all__ = ["TuckALayer", "TuckALinear"]


class TuckALayer(Merging, nn.Module, BaseTunerLayer):
    """A base layer with TuckA adapters, of which the active ones adapt its input.

    Parameters
    ----------
    base_layer : Module
        The layer to adapt; called, and opened only to merge and, once, to see how large its weight is.
    scope : RoutingScope
        The object that all adapted layers of the model share.

    Attributes
    ----------
    tucka_experts : ModuleDict
        Adapter name to its cores, expert factor and basis.
    tucka_router : ModuleDict
        Adapter name to its router, on the one layer that owns it.
    tucka_scope : RoutingScope
        Where the route of the running forward is found.
    in_decoder : bool
        Whether the layer is in the decoder of an encoder-decoder.

    Raises
    ------
    ConfigError
        If the layer cannot be adapted.
    """

    # What BaseTunerLayer, which is not annotated, gives: without these, nn.Module's look-up hides it from the checker.
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]
    _get_base_layer_device_and_dtype: Callable[[Any], tuple[torch.device | None, torch.dtype | None]]

    adapter_layer_names = ("tucka_experts", "tucka_router")
    other_param_names = ("tucka_merged",)

    def __init__(self, base_layer: nn.Module, scope: RoutingScope) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.tucka_scope = scope
        self.in_decoder = False
        self.tucka_experts = nn.ModuleDict()
        self.tucka_router = nn.ModuleDict()
        self.tucka_merged: dict[str, tuple[Tensor, Tensor]] = {}
        self.in_features = width_of(self.get_base_layer(), "TuckALayer")
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}

    def update_layer(self, adapter: str, config: TuckAConfig, *, owns_router: bool) -> None:
        """Add an adapter, or make it anew.

        Parameters
        ----------
        adapter : str
            Its name.
        config : TuckAConfig
            Its configuration.
        owns_router : bool
            Whether this layer holds the adapter's router.

        Raises
        ------
        ConfigError
            If the rank exceeds the layer's width.
        """
        self.tucka_experts[adapter] = ExpertParts(
            config.spec, self.in_features, init_weights=config.init_weights, gain=self._gain
        )
        if owns_router:
            padded = config.route_tokens == "padded"
            self.tucka_router[adapter] = Router(
                config.spec, self.in_features, seed=config.router_seed, count_padding=padded
            )
        self._move_adapter_to_device_of_base_layer(adapter)
        self.take_base_dtype(adapter)
        if owns_router:
            self.tucka_scope.own(adapter, self)
        self.set_adapter(self.active_adapters or adapter, inference_mode=config.inference_mode)
        if owns_router and config.pinned_gates is not None:
            self.frozen_peft_weight_names[adapter] = ("tucka_router",)
            self.tucka_router[adapter].requires_grad_(False)

    def _gain(self) -> float | None:
        """Measure the base layer's gain, a quantised one's too if PEFT can read its weight."""
        base = self.get_base_layer()
        weight = self.open_weight()
        return step_gain(base, _dequantised(base, self.in_features) if weight is None else weight)

    def take_base_dtype(self, adapter: str) -> None:
        """Cast an adapter to the dtype of the base layer, if that computes in floating point.

        Parameters
        ----------
        adapter : str
            Its name.
        """
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        parts = [container[adapter] for container in (self.tucka_experts, self.tucka_router) if adapter in container]
        if dtype is not None and dtype.is_floating_point:
            for part in parts:
                if not any(parameter.is_meta for parameter in part.parameters()):
                    part.to(dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter, but leave its dtype: PEFT calls this after loading too, when a cast would round values."""
        target = self._base_device() if device is None else device
        for container in (self.tucka_experts, self.tucka_router):
            is_here = adapter_name in container and target is not None
            if is_here and not any(parameter.is_meta for parameter in container[adapter_name].parameters()):
                container[adapter_name].to(target)

    def _base_device(self) -> torch.device | None:
        """Find where the base layer is: a quantised one may have its numbers under any name."""
        base = self.get_base_layer()
        known = self._get_base_layer_device_and_dtype(base)[0]
        tensors = itertools.chain(base.parameters(), base.buffers())
        return next((tensor.device for tensor in tensors), None) if known is None else known

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and every trace of it.

        Parameters
        ----------
        adapter_name : str
            Its name.
        """
        super().delete_adapter(adapter_name)
        self.tucka_scope.forget(adapter_name)

    def drop(self, adapter_name: str) -> None:
        """Remove an adapter that is about to be made anew: which adapters are active stays as it is.

        Parameters
        ----------
        adapter_name : str
            Its name.
        """
        del self.tucka_experts[adapter_name]
        if adapter_name in self.tucka_router:
            del self.tucka_router[adapter_name]
        self.frozen_peft_weight_names.pop(adapter_name, None)
        self.tucka_scope.forget(adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Adapt the input by all active adapters and call the base layer.

        Parameters
        ----------
        x : Tensor, shape (..., d), or (B, d, ...) for a convolution
            The layer's input.
        *args, **kwargs : object
            Further arguments of the base layer.

        Returns
        -------
        object
            Whatever the base layer returns.

        Raises
        ------
        RouteError
            If there is no route, or it does not fit.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if not self.disable_adapters and not self.merged:
            x = adapt_input(self.get_base_layer(), x, self._active(x), where=self._path)
        return self.base_layer(x, *args, **kwargs)

    def _active(self, x: Tensor) -> list[tuple[ExpertParts, Tensor]]:
        """Pair the experts of each active adapter with its gates for this input."""
        names = [name for name in self.active_adapters if name in self.tucka_experts]
        if not names:
            return []
        base = self.get_base_layer()
        rows = to_rows(base, x)
        for name in names:  # before anything is routed on the input
            check_activations(rows, self.experts(name).basis, self._path)
        check_base_dtype(base, x, self._path)
        return [(self.experts(name), self.tucka_scope.gates(name, self, rows)) for name in names]

    def _path(self) -> str:
        return self.tucka_scope.path(self)

    def experts(self, adapter: str) -> ExpertParts:
        """Return the trainable parts of one adapter.

        Parameters
        ----------
        adapter : str
            Its name.

        Returns
        -------
        ExpertParts
            Cores, expert factor, basis.
        """
        return cast(ExpertParts, self.tucka_experts[adapter])

    def __repr__(self) -> str:
        """Show the layer as its base's class with the adapter's prefix."""
        return "tucka." + super().__repr__()


class TuckALinear(TuckALayer):
    """An adapted linear layer. PEFT's ``"all-linear"`` finds adapted layers by this word in their class's name."""


def _dequantised(layer: nn.Module, width: int) -> Tensor | None:
    """Return the numbers of a quantised weight if PEFT can read them, and change nothing."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) and not hasattr(layer, "W_q"):
        return None
    try:
        if get_bnb_param_type(weight):
            # Not PEFT's function for any module, which replaces the parameter of one on a CPU.
            numbers = dequantize_bnb_weight(weight, state=getattr(layer, "state", None))
        else:
            numbers = dequantize_module_weight(layer)
    except Exception:  # each library raises errors of its own; the start can do without
        return None
    return numbers if is_readable(numbers, layer, width) else None
