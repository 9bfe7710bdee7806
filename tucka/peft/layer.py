"""The adapted layer as PEFT sees it: any number of TuckA adapters around one base layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from tucka.backends.torch.functional import mix_cores
from tucka.backends.torch.modules import ExpertParts, adapt_input, width_of
from tucka.backends.torch.routing import Router
from tucka.backends.torch.scope import RoutingScope
from tucka.errors import RouteError, TuckaError, expected
from tucka.peft.config import TuckAConfig

__all__ = ["TuckALayer"]


class TuckALayer(nn.Module, BaseTunerLayer):
    """A base layer with TuckA adapters, of which the active ones adapt its input.

    Parameters
    ----------
    base_layer : Module
        The layer to adapt; only called, never opened, except to merge.
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
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    adapter_layer_names = ("tucka_experts", "tucka_router")
    other_param_names = ("tucka_merged",)

    def __init__(self, base_layer: nn.Module, scope: RoutingScope) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.tucka_scope = scope
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
        self.tucka_experts[adapter] = ExpertParts(config.spec, self.in_features, init_weights=config.init_weights)
        if owns_router:
            self.tucka_router[adapter] = Router(config.spec, self.in_features, seed=config.router_seed)
            self.tucka_scope.owners[adapter] = self
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters or adapter, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and every trace of it.

        Parameters
        ----------
        adapter_name : str
            Its name.
        """
        super().delete_adapter(adapter_name)
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
            x = adapt_input(self.get_base_layer(), x, self._active(x))
        return self.base_layer(x, *args, **kwargs)

    def _active(self, x: Tensor) -> list[tuple[ExpertParts, Tensor]]:
        """Pair the experts of each active adapter with its gates for this input."""
        names = [name for name in self.active_adapters if name in self.tucka_experts]
        if not names:
            return []
        rows = x.movedim(1, -1) if isinstance(self.get_base_layer(), nn.modules.conv._ConvNd) else x
        return [(self.experts(name), self.tucka_scope.gates(name, self, rows)) for name in names]

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

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        r"""Write pinned adapters into the base weight, :math:`W' = (I + \sum_a \alpha_a U_a \bar G_a U_a^\top)\, W`.

        Parameters
        ----------
        safe_merge : bool
            Whether to look for NaN and infinity before anything is written.
        adapter_names : list of str, optional
            Which; the active ones if None.

        Raises
        ------
        RouteError
            If an adapter is not pinned: its update depends on the input, so no weight equals it.
        TuckaError
            If the weight is quantised.
        ValueError
            If `safe_merge` finds a number that is not finite.

        References
        ----------
        .. [1] arXiv:2511.06859, Eq. (4).
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.tucka_experts]
        weight = self._mergeable_weight(names)
        for name in names:
            left, right = self._weight_update(name, weight)
            update = self._from_rows((left @ right).to(weight.dtype))
            if safe_merge and not torch.isfinite(weight.data + update).all():
                # PEFT's own sentence: its users look for it.
                msg = f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                raise ValueError(msg)
            weight.data += update
            self.tucka_merged[name] = (left, right)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_layer().weight
        while self.merged_adapters:
            left, right = self.tucka_merged.pop(self.merged_adapters.pop())
            weight.data -= self._from_rows((left @ right).to(weight.dtype))

    def _mergeable_weight(self, names: list[str]) -> Tensor:
        for name in names:
            if name not in self.tucka_scope.pinned:
                rule = f"adapter {name!r} pinned, since the update of a routed one depends on the input"
                cure = "Pin it with tucka.peft.pin_route(model, ...) or set pinned_gates in its configuration"
                raise RouteError(
                    expected("merge", rule, "a routed adapter", where=self.tucka_scope.path(self), cure=cure)
                )
        weight = getattr(self.get_base_layer(), "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            kind = type(self.get_base_layer()).__name__
            cure = "Load the base in full precision to merge, or use tucka.peft.export_lora"
            raise TuckaError(
                expected("merge", "a base weight in floating point", kind, where=self.tucka_scope.path(self), cure=cure)
            )
        return weight

    @torch.no_grad()
    def _weight_update(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return thin factors of the update of the original weight, rows being outputs: α (W U) Ḡᵀ and Uᵀ."""
        parts = self.experts(name)
        cores, expert_factor, basis = parts.factors()
        mixed = mix_cores(cores, expert_factor, self.tucka_scope.pinned[name].to(cores.device))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        basis, mixed = basis.to(dtype), mixed.to(dtype)
        rows = self._to_rows(weight.data).to(dtype)
        reduced = rows @ basis
        for left, right in self.tucka_merged.values():  # what other adapters added is not part of the original
            reduced = reduced - left @ (right @ basis)
        return parts.spec.alpha * reduced @ mixed.t(), basis.t().contiguous()

    def _to_rows(self, weight: Tensor) -> Tensor:
        """View a weight as a matrix whose last axis is the adapted input axis."""
        if self._is_transposed():
            return weight.t()
        return weight if weight.ndim == 2 else weight.movedim(1, -1).reshape(-1, weight.shape[1])

    def _from_rows(self, rows: Tensor) -> Tensor:
        """Undo `_to_rows`."""
        if self._is_transposed():
            return rows.t()
        shape = self.get_base_layer().weight.shape
        if len(shape) == 2:
            return rows
        return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    def _is_transposed(self) -> bool:
        return type(self.get_base_layer()).__name__ == "Conv1D"

    def __repr__(self) -> str:
        """Show the layer as its base's class with the adapter's prefix."""
        return "tucka." + super().__repr__()
