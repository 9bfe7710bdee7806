"""The tuner: puts TuckA layers into a model and hands all of them one routing scope."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tucka.backends.torch.base_layers import width_of
from tucka.backends.torch.routing.parts import Anatomy, is_decoder_only
from tucka.backends.torch.routing.scope import RouteOptions, RoutingScope
from tucka.errors import CheckpointError, ConfigError, expected
from tucka.peft.adapters import unmerge_first
from tucka.peft.combining import check_combination, config_of_sum, sum_of_updates, write_sum
from tucka.peft.config import TuckAConfig
from tucka.peft.files.keys import PREFIX, check_names_survive, plain_name
from tucka.peft.files.loading import FileLoad, misfits, narrows_adapters, running_file_load
from tucka.peft.files.matching import checked_tensors, sizes_of
from tucka.peft.files.rollback import unchanged_on_error
from tucka.peft.layer import TuckALayer, TuckALinear
from tucka.peft.merging import check_merge, check_own_weights
from tucka.peft.registration import include_all_linear_layers
from tucka.peft.rows import adapters_of_rows
from tucka.peft.targets import (
    Place,
    base_of,
    check_adapter_name,
    check_experts_are_named,
    check_names,
    check_targets,
    no_targets,
    owners_of,
    place_of,
)

__all__ = ["TuckAModel"]


class TuckAModel(BaseTuner):
    """A model with TuckA adapters; `peft.get_peft_model` makes it from a `TuckAConfig`.

    Parameters
    ----------
    model : Module
        The base model; its target layers are replaced.
    peft_config : TuckAConfig, or dict of str to TuckAConfig
        What the adapters are.
    adapter_name : str
        The first adapter.
    low_cpu_mem_usage : bool
        Whether to make its tensors without memory, for values that are loaded afterwards.
    state_dict : dict of str to Tensor, optional
        Choose the layers by its keys instead of by the configuration.

    Raises
    ------
    ConfigError
        If a target, an option or the adapter's name does not fit. The model is as before then.

    See Also
    --------
    TuckALayer : An adapted layer.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), TuckAConfig(r=2, target_modules=["0"]))
    >>> type(model.base_model).__name__
    'TuckAModel'
    """

    prefix = "tucka_"
    tuner_layer_cls = TuckALayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # Adding adapters

    # What is kept while an adapter is added, since PEFT hands over the layers one by one.
    _places: dict[str, Place]
    _owners: set[str]
    _keys: list[str] | None = None  # of a state dict, by which PEFT chooses the layers
    _file_load: FileLoad | None = None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into a model, or leave the model as it was: all ways to add one come here."""
        given: TuckAConfig = self.peft_config[adapter_name]
        decoder_only = is_decoder_only(self.model)
        config = self.peft_config[adapter_name] = given.resolved(decoder_only=decoder_only)
        twins = [name for name, other in self.peft_config.items() if other is given and name != adapter_name]
        known = [layer for layer in self._layers() if adapter_name in layer.tucka_experts]
        try:
            check_adapter_name(adapter_name)
            unmerge_first(self.model)
            load = self._file_load = running_file_load()
            chosen_by = kwargs.get("state_dict")
            self._keys = None if chosen_by is None else list(chosen_by)
            with unchanged_on_error(self):
                with nullcontext() if load is None else misfits(load.where, passing=CheckpointError):
                    for layer in known:
                        layer.drop(adapter_name)
                    super().inject_adapter(model, adapter_name, *args, **kwargs)
                    self._scope().attach(self.model)
                    if load is not None:
                        load.check_file(self.model, config, adapter_name)
                check_names_survive(self.model, adapter_name, self.peft_config, self._remove_adapter_name_from_key)
        except BaseException:
            if not known:
                self.peft_config.pop(adapter_name, None)
            raise
        finally:
            self._file_load = self._keys = None
        if twins:
            self._take_measured(twins[0], adapter_name)
        _warn_of_a_router_that_cannot_learn(config)

    def _take_measured(self, known: str, new: str) -> None:
        """Let the routers of a new adapter, made by the configuration that another has, have the other's centre."""
        # TRL makes such adapters for its reference models, and then copies parameters alone. A start from data replaces
        # what is copied here, so it does no harm to an adapter that is not meant as a copy.
        routers = self._scope().routers(known)
        for part, router in self._scope().routers(new).items():
            if part in routers and not router.center.is_meta:
                router.take_measured(routers[part])

    def _prepare_adapter_config(self, peft_config: TuckAConfig, model_config: dict[str, Any]) -> TuckAConfig:
        """Take the usual targets of a known kind of model; say which names another one has."""
        if peft_config.target_modules is None and model_config.get("model_type") not in self.target_module_mapping:
            raise no_targets(self.model)
        prepared: TuckAConfig = super()._prepare_adapter_config(peft_config, model_config)
        return prepared

    def _prepare_model(self, peft_config: TuckAConfig, model: nn.Module) -> None:
        """Check every target before the first one is replaced, so that an error leaves the model as it was."""
        super()._prepare_model(peft_config, model)
        include_all_linear_layers(peft_config, model)
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        self._refuse_adapted_models(peft_config, model)
        targets = {
            name: module
            for name, module in model.named_modules()
            if name and not name.startswith(inside) and self._check_target_module_exists(peft_config, name)
        }
        if not targets and self._keys is None:
            check_names(peft_config, model)
        check_experts_are_named(peft_config, model)
        anatomy = Anatomy(model)
        self._places = {name: place_of(anatomy, name, peft_config) for name in targets}
        self._owners = owners_of(peft_config, self._places, model) if self._keys is None else _owners_in(self._keys)
        if self._file_load is not None:
            widths = {name: width_of(base_of(module), name) for name, module in targets.items()}
            specs = {name: peft_config.spec_for(name) for name in targets}
            self._file_load.check_sizes(sizes_of(specs, widths, self._owners))
        check_targets(peft_config, targets, self._places, model)

    def _refuse_adapted_models(self, config: TuckAConfig, model: nn.Module) -> None:
        """Refuse targets in an adapted model inside of this one: its layers have routes and adapters of their own."""
        inside = self._adapted_models_inside()
        for name, _ in model.named_modules():
            if inside and name.startswith(inside) and self._check_target_module_exists(config, name):
                rule, cure = (
                    "layers outside of adapted models inside of this one",
                    "Leave them out with exclude_modules",
                )
                raise ConfigError(expected("target_modules", rule, name, where="TuckAConfig", cure=cure))

    def _create_and_replace(
        self,
        peft_config: TuckAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_optional: Any,
    ) -> None:
        scope = self._scope()
        layer = (
            target if isinstance(target, TuckALayer) else self._wrap(target, parent, current_key, scope, peft_config)
        )
        owns_router = current_key in self._owners
        if peft_config.pinned_gates is not None:
            dtype = torch.promote_types(layer.base_dtype() or torch.float32, torch.float32)
            scope.pinned[adapter_name] = torch.tensor(peft_config.pinned_gates, dtype=dtype, device="cpu")
        scope.options[adapter_name] = RouteOptions(
            prompt_only=peft_config.route_tokens == "prompt",
            owner_only=peft_config.router_module is not None,
            synchronized=peft_config.sync_routing,
            samples_first=peft_config.samples_first,
            input_names=peft_config.input_names,
        )
        spec = peft_config.spec_for(current_key)
        layer.update_layer(adapter_name, peft_config, spec, owns_router=owns_router)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _wrap(
        self, target: nn.Module, parent: nn.Module, name: str, scope: RoutingScope, config: TuckAConfig
    ) -> TuckALayer:
        kind = TuckALinear if isinstance(base_of(target), (nn.Linear, Conv1D)) else TuckALayer
        layer = kind(target, scope)
        place = self._places.get(name) or place_of(Anatomy(self.model), name, config)
        layer.put_at(place.part, place.role, place.layout)
        if isinstance(parent, nn.TransformerEncoderLayer):
            # In evaluation torch's encoder layer reads its layers' weights and calls none, unless one has a hook.
            layer.register_forward_pre_hook(_no_change)
        return layer

    def _layers(self) -> Iterator[TuckALayer]:
        """Go through the adapted layers of this model, without those of adapted models inside of it."""
        inside = self._adapted_models_inside()
        for path, module in self.model.named_modules():
            is_layer = isinstance(module, TuckALayer) and not path.startswith(inside)
            if is_layer and module.tucka_scope.root in (None, self.model):
                yield module

    def _adapted_models_inside(self) -> tuple[str, ...]:
        return tuple(
            f"{path}." for path, module in self.model.named_modules() if path and isinstance(module, BaseTuner)
        )

    def _scope(self) -> RoutingScope:
        """Find the scope of the model's adapted layers, which another tuner may have made; or make it."""
        layer = next(self._layers(), None)
        return RoutingScope() if layer is None else layer.tucka_scope

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self._layers():
            if not autocast_adapter_dtype:
                layer.take_base_dtype(adapter_name)
            elif adapter_name in layer.tucka_experts:  # PEFT widens parameters only
                layer.experts(adapter_name).to(layer.experts(adapter_name).basis.dtype)
        for router in self._scope().routers(adapter_name).values() if autocast_adapter_dtype else ():
            router.to(router.centroids.dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        """Let each row have the adapter that is named for it; PEFT enters this around each call, with its arguments."""
        names = kwargs.pop("adapter_names", None)
        with nullcontext() if names is None else adapters_of_rows(self, self._scope(), names, kwargs):
            yield

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: TuckAConfig, adapter_name: str, state_dict: dict[str, Tensor], **others: Any
    ) -> dict[str, Tensor]:
        """Find what is to be saved, also where FSDP wraps inner modules: PEFT handles a wrapper of the whole only."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, **others)
        layers = (name for name, module in model.named_modules() if isinstance(module, TuckALayer))
        wrapped = tuple(f"{plain_name(name)}.tucka_" for name in layers if name != plain_name(name))
        return {**found, **{key: value for key, value in state_dict.items() if key.startswith(wrapped)}}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: TuckAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check what PEFT is about to load, before it writes the first tensor."""
        tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return checked_tensors(model, config, adapter_name, tensors, narrowed=narrows_adapters())

    # Combining, merging and unloading

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        **_options: Any,
    ) -> None:
        """Add an adapter whose update is the weighted sum of those of pinned ones, exactly; as PEFT's LoRA has it."""
        chosen = check_combination(self.peft_config, self._scope(), adapters, weights, adapter_name, combination_type)
        unmerge_first(self.model)
        sums = {
            path: sum_of_updates(layer, chosen)
            for path, layer in self.model.named_modules()
            if isinstance(layer, TuckALayer) and not chosen.keys().isdisjoint(layer.tucka_experts)
        }
        ranks = {path: basis.shape[1] for path, (_, basis) in sums.items()}
        self.peft_config[adapter_name] = config_of_sum(self.peft_config[adapters[0]], ranks)
        self.inject_adapter(self.model, adapter_name)
        for path, (core, basis) in sums.items():
            write_sum(self.model.get_submodule(path), adapter_name, core, basis)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, _child: nn.Module) -> None:
        """Put one module in the place of another; PEFT's own method reads weights, which the base may not have."""
        setattr(parent, child_name, new_module)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters, the active ones if None, into the base weights: in all layers, or in none on an error."""
        self._check_merge_allowed()
        self._check_merge(adapter_names, safe_merge=safe_merge)
        for layer in self._layers():
            with onload_layer(layer):
                layer.merge(adapter_names=adapter_names, safe_merge=safe_merge)
        pinned = self._scope().pinned
        merged = [layer for layer in self._layers() if layer.merged]
        active = {name for layer in merged for name in layer.active_adapters if name in layer.tucka_experts}
        routed = sorted(name for name in active if name not in pinned)
        if routed:
            rule = "no active adapter that is routed, since layers with a merged adapter compute with that one alone"
            cure = "These adapters are switched off until you unmerge. Pin and merge them too, or unmerge"
            warnings.warn(expected("adapter_names", rule, ", ".join(routed), cure=cure), stacklevel=2)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights again."""
        for layer in self._layers():
            with onload_layer(layer):
                layer.unmerge()

    def _check_merge(self, adapter_names: list[str] | None, *, safe_merge: bool) -> None:
        """Look at all layers before the first one is merged, so that an error leaves all of them as they were."""
        merging = []
        for layer in self._layers():
            names = layer.active_adapters if adapter_names is None else adapter_names
            names = [name for name in names if name in layer.tucka_experts and name not in layer.merged_adapters]
            check_merge(layer, names, safe_merge=safe_merge)
            merging += [layer] if names else []
        check_own_weights(self.model, merging)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        inside = [module for module in self.model.modules() if isinstance(module, TuckALayer)]
        scope = self._scope()
        if any(layer.tucka_scope is not scope for layer in inside):
            rule, got = "no adapted model inside of this one, since PEFT would unload that too", "one"
            raise ConfigError(expected("model", rule, got, where="TuckAModel", cure="Unload the inner model first"))
        if merge:
            self._check_merge(adapter_names, safe_merge=safe_merge)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        scope.detach()
        return model


def _owners_in(keys: list[str]) -> set[str]:
    """Return the layers that have a router in a state dict."""
    return {key.partition(".tucka_router.")[0].removeprefix(PREFIX) for key in keys if ".tucka_router." in key}


def _no_change(_module: nn.Module, _args: Any) -> None:
    """Do nothing."""


def _warn_of_a_router_that_cannot_learn(config: TuckAConfig) -> None:
    routed = config.has_router and config.pinned_gates is None and not config.inference_mode
    if routed and config.t == 1 and config.gate_norm:
        rule = "at least 2 where gates are normalised, since one expert's gate is always 1 and the router cannot learn"
        cure = "Use t >= 2 or gate_norm=False; as it is, the router gets no gradient and stays as it starts"
        warnings.warn(expected("t", rule, 1, where="TuckAConfig", cure=cure), stacklevel=3)
