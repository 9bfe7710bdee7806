"""The adapted layer as PEFT sees it: any number of TuckA adapters around one base layer."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight, get_bnb_param_type
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from tucka.backends.torch.base_layers import (
    checked_rows,
    from_rows,
    is_convolution,
    is_experts,
    is_readable,
    layer_dtype,
    layer_weight,
    output_width,
    step_gain,
    width_of,
)
from tucka.backends.torch.modules import ExpertParts
from tucka.backends.torch.private import called, is_called_alone, modules_by_name
from tucka.backends.torch.routing.layouts import Layout
from tucka.backends.torch.routing.router import Router
from tucka.backends.torch.routing.routes import AS_IT_IS
from tucka.backends.torch.routing.scope import RoutingScope
from tucka.checks import check_finite
from tucka.errors import ConfigError, RouteError, expected
from tucka.peft.config import TuckAConfig
from tucka.peft.files.sharded import whole_parameters
from tucka.peft.known import adapted_as_before, laid_out, note, shared_core
from tucka.peft.merging import merged_weight, readable_weight, unmerged_weight
from tucka.spec import TuckerSpec

__all__ = ["BASE", "TuckALayer", "TuckALinear"]

BASE = "__base__"  # PEFT's name, among those of adapters, for none of them


class TuckALayer(nn.Module, BaseTunerLayer):
    """A base layer with TuckA adapters, of which the active ones adapt its input.

    Parameters
    ----------
    base_layer : Module
        The layer to adapt. It is called; its weight is read once, to see how large it is, and for merging.
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
    tucka_part : str
        The part of the model that the layer's route is made in; "" for its body.
    tucka_role : str
        "encoder" or "decoder" in an encoder-decoder.
    tucka_layout : Layout
        What the rows of the layer's inputs are.

    Raises
    ------
    ConfigError
        If the layer cannot be adapted.

    Examples
    --------
    >>> layer = TuckALayer(nn.Linear(4, 3), RoutingScope())
    >>> layer(torch.ones(2, 4)).shape  # without an adapter, the base layer's output
    torch.Size([2, 3])
    """

    # BaseTunerLayer has these but is not annotated, so the type checker would take nn.Module's look-up for them.
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
        self.put_at("", "", Layout.SAMPLES_FIRST)
        self.tucka_experts = nn.ModuleDict()
        self.tucka_router = nn.ModuleDict()
        self.tucka_merged: dict[str, tuple[Tensor, Tensor]] = {}
        self.in_features = width_of(self.get_base_layer(), "TuckALayer")
        self.out_features = output_width(self.get_base_layer())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._checked: tuple[Any, ...] = ()

    def put_at(self, part: str, role: str, layout: Layout) -> None:
        """Say where in the model the layer is, and what the rows of its inputs are."""
        self.tucka_part, self.tucka_role, self.tucka_layout = part, role, layout
        # Layers of one place get one answer for one shape; None where the rows do not follow from a shape.
        follows = layout not in (Layout.AS_THE_PARENT_SAYS, Layout.CACHED_TOKENS)
        self.tucka_place = f"{part}, {role}, {layout}" if follows else None

    def update_layer(self, adapter: str, config: TuckAConfig, spec: TuckerSpec, *, owns_router: bool) -> None:
        """Add an adapter, or make it anew; `spec` is the configuration's."""
        self.tucka_experts[adapter] = ExpertParts(
            spec,
            self.in_features,
            init_weights=config.init_weights,
            gain=self._gain,
            dropout=config.dropout,
            starts_apart=config.routing == "given",
        )
        if owns_router:
            padded = config.route_tokens == "padded"
            self.tucka_router[adapter] = Router(spec, self.in_features, seed=config.router_seed, count_padding=padded)
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
        with whole_parameters(base, base, written=False):
            weight = readable_weight(self)
            return step_gain(base, _dequantised(base, self.in_features) if weight is None else weight)

    def base_dtype(self) -> torch.dtype | None:
        """Return the dtype that the base layer computes in, if that is floating point."""
        base = self.get_base_layer()
        weight = layer_weight(base)
        dtype = weight.dtype if is_experts(base) else self._get_base_layer_device_and_dtype(base)[1]
        return dtype if dtype is not None and dtype.is_floating_point else None

    def take_base_dtype(self, adapter: str) -> None:
        """Cast an adapter to the dtype of the base layer."""
        dtype = self.base_dtype()
        for container in (self.tucka_experts, self.tucka_router):
            if adapter in container and dtype is not None:
                container[adapter].to(dtype)

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
        """Remove an adapter and every trace of it."""
        super().delete_adapter(adapter_name)
        self.tucka_scope.forget(adapter_name)

    def drop(self, adapter_name: str) -> None:
        """Remove an adapter that is about to be made anew: which adapters are active stays as it is."""
        del self.tucka_experts[adapter_name]
        if adapter_name in self.tucka_router:
            del self.tucka_router[adapter_name]
        self.frozen_peft_weight_names.pop(adapter_name, None)
        self.tucka_scope.forget(adapter_name)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply an adapter's α by a factor; 1 gives it back. What has other adapters stays as it is."""
        if adapter in self.tucka_experts:
            self._rescale(adapter, check_finite("scale", scale, where="set_scale"))

    def scale_layer(self, scale: float) -> None:
        """Multiply the α of the active adapters by one more factor."""
        factor = check_finite("scale", scale, where="scale_layer")
        for name in self.active_adapters:
            if name in self.tucka_experts and factor != 1:
                self._rescale(name, self.experts(name).scale * factor)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the α of the active adapters by a factor; give them back if None."""
        factor = None if scale is None else check_finite("scale", scale, where="unscale_layer")
        if factor == 0:
            raise ConfigError(expected("scale", "None or a factor other than 0", scale, where="unscale_layer"))
        for name in self.active_adapters:
            if name in self.tucka_experts:
                self._rescale(name, 1.0 if factor is None else self.experts(name).scale / factor)

    def _rescale(self, adapter: str, scale: float) -> None:
        """Set the factor of an adapter's α, which a merged weight does not have."""
        if self.experts(adapter).scale == scale:
            return
        if self.merged:
            warnings.warn("The scale cannot be set when the layer is merged. Unmerging it first.", stacklevel=3)
            self.unmerge()
        self.experts(adapter).scale = scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write pinned adapters, the active ones if None, into the base weight (Eq. 4); `safe_merge` refuses NaN."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.tucka_experts]
        if not names:
            return
        merged, updates = merged_weight(self, names, safe_merge=safe_merge)
        layer_weight(self.get_base_layer()).data.copy_(merged)
        self.tucka_merged.update(updates)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        layer_weight(self.get_base_layer()).data.copy_(unmerged_weight(self))
        while self.merged_adapters:
            del self.tucka_merged[self.merged_adapters.pop()]

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Adapt the input, (..., d) or (B, d, ...) of a convolution, by all active adapters; call the base layer."""
        own = modules_by_name(self)
        if not is_dynamo_compiling() and adapter_names is None:
            adapted = adapted_as_before(self, x)
            if adapted is not None:
                base = own["base_layer"]
                return base(adapted, *args, **kwargs) if args or kwargs else called(base, adapted)
        if adapter_names is not None and not self._disable_adapters:
            x = self._adapted_by_row(x, adapter_names)
        elif self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
        elif not self.merged_adapters:
            x = self._adapted(x, modules_by_name(own["tucka_experts"]))
        return own["base_layer"](x, *args, **kwargs)

    def _adapted(self, x: Tensor, experts: dict[str, Any]) -> Tensor:
        """Add the updates of all active adapters to the layer's input."""
        active = self._active_adapter
        names = [active] if isinstance(active, str) else active
        if len(names) != 1 or names[0] not in experts:
            names = [name for name in names if name in experts]
        if not names:
            return x
        is_compiled = torch.compiler.is_compiling()
        # Checked before anything is routed on it, once for each kind of input. A new kind would compile anew.
        is_tensor = isinstance(x, Tensor)  # other arrays may have no device
        is_known = is_tensor and not is_compiled and self._checked == (x.dtype, x.shape[-1:], x.device, names)
        result = rows = x if is_known else self._checked_rows(x, names)
        is_lean = not is_compiled and not torch.is_grad_enabled()
        for name in names:
            fit = self.tucka_scope.fit(name, self, rows)
            parts, laid = experts[name], None
            is_plain = fit.view is AS_IT_IS
            viewed = rows if is_plain else fit.rows(rows)
            if is_compiled or type(parts) is not ExpertParts or not is_called_alone(parts):
                update = parts
            elif is_lean and not parts.drops:
                laid = laid_out(self, name, parts, viewed, fit.gates)
                update = laid.add_update
            else:  # a module's call takes as long as two products of few rows
                core = shared_core(self, name, parts, viewed, fit.gates)
                update = parts.forward if core is None else partial(parts.forward, core=core)
            if is_plain:
                result = update(result, rows, fit.gates)
            else:
                result = fit.back(update(fit.rows(result), viewed, fit.gates), rows)
            if not is_compiled and is_plain and rows is x and len(names) == 1:
                note(self, name, laid, fit.gates, x)
        return result if rows is x else from_rows(self.get_base_layer(), result, x)

    def _adapted_by_row(self, x: Tensor, names: list[str]) -> Tensor:
        """Add to each row of the layer's input (B, ..., d) the update of the adapter that is named for it."""
        known = [name for name in dict.fromkeys(names) if name in self.tucka_experts]
        if not known:
            return x
        if self.tucka_layout not in (Layout.SAMPLES_FIRST, Layout.OTHER_TOKENS):
            rule, got = "layers whose rows are samples, where adapters are named for rows", "other rows"
            cure = "Take the layer out with exclude_modules, or call each adapter by itself"
            raise RouteError(expected("adapter_names", rule, got, where=self._path(), cure=cure))
        rows = result = self._checked_rows(x, known)
        for name in known:
            fit = self.tucka_scope.fit(name, self, rows)
            mine = torch.tensor([each == name for each in names], device=x.device)
            mine = mine.reshape(len(names), *(1,) * max(2, fit.gates.ndim - 1))
            result = self.experts(name)(result, rows, fit.gates * mine.to(fit.gates.dtype))
        return result if rows is x else from_rows(self.get_base_layer(), result, x)

    def _checked_rows(self, x: Tensor, names: list[str]) -> Tensor:
        """View an input channels last, or raise where the layer or an adapter does not fit it."""
        base = self.get_base_layer()
        rows = checked_rows(base, x, [self.experts(name).basis for name in names], self._path)
        self._check_batch_axis(base, x, names)
        if rows is x and layer_dtype(base) == x.dtype and not torch.compiler.is_compiling():
            # autocast or not, an input of this kind fits
            self.__dict__["_checked"] = (x.dtype, x.shape[-1:], x.device, list(names))
        return rows

    def _check_batch_axis(self, base: nn.Module, x: Tensor, names: list[str]) -> None:
        """Raise where a convolution gets one sample without its axis: the first axis would be taken for samples."""
        is_one_sample = is_convolution(base) and x.ndim == 1 + len(base.kernel_size)
        if is_one_sample and any(name not in self.tucka_scope.pinned for name in names):
            rule, cure = "an input with axes (B, d, ...), since samples are routed", "Add a batch axis with x[None]"
            raise RouteError(expected("route", rule, f"shape {tuple(x.shape)}", where=self._path(), cure=cure))

    def _path(self) -> str:
        return self.tucka_scope.path(self)

    def experts(self, adapter: str) -> ExpertParts:
        """Return the trainable parts of one adapter."""
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
    except Exception:  # each library raises its own errors, and the start works without the gain
        return None
    return numbers if is_readable(numbers, layer, width) else None
