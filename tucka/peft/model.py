"""The tuner: puts TuckA layers into a model and hands all of them one routing scope."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tucka.backends.torch.routing.generation import decoder_path
from tucka.backends.torch.routing.scope import RouteOptions, RoutingScope
from tucka.errors import CheckpointError, ConfigError, expected
from tucka.peft.config import TuckAConfig
from tucka.peft.files.matching import check_heads, checked_tensors
from tucka.peft.files.rollback import is_misfit, misfit, unchanged_on_error
from tucka.peft.files.sharded import plain_name
from tucka.peft.layer import TuckALayer, TuckALinear
from tucka.peft.merging import check_merge, unmerge_for_a_new_adapter
from tucka.peft.targets import check_adapter_name, check_targets, names

__all__ = ["TuckAModel"]


class TuckAModel(BaseTuner):
    """A model with TuckA adapters; made by `peft.get_peft_model` from a `TuckAConfig`.

    See Also
    --------
    tucka.peft.TuckAConfig : What the adapters are.
    """

    prefix = "tucka_"
    tuner_layer_cls = TuckALayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # Adding adapters

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into a model: all ways to add one come here.

        Parameters
        ----------
        model : Module
            The model.
        adapter_name : str
            The adapter's name; one that exists is made anew.
        *args, **kwargs : object
            PEFT's further options.

        Raises
        ------
        ConfigError
            If the name or a target does not fit. The model is as it was then.
        """
        check_adapter_name(adapter_name)
        unmerge_for_a_new_adapter(self.model)
        config = self.peft_config[adapter_name]
        known = [layer for layer in self._layers() if adapter_name in layer.tucka_experts]
        try:
            with unchanged_on_error(self) as memory:
                for layer in known:
                    layer.drop(adapter_name)
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                self._scope().attach(self.model)
                if config.loading is not None:
                    check_heads(self.model, adapter_name, config.loading.keys)
        except BaseException as error:
            if not known:
                self.peft_config.pop(adapter_name, None)
            if config.loading is not None and is_misfit(error):
                raise misfit(error, where=f"adapter {adapter_name!r}") from error
            raise
        if config.loading is not None:
            parts = (layer.experts(adapter_name) for layer in self._layers() if adapter_name in layer.tucka_experts)
            config.loading.begin(memory, (parameter for part in parts for parameter in part.parameters()))
        _warn_of_a_router_that_cannot_learn(config)

    def _prepare_model(self, peft_config: TuckAConfig, model: nn.Module) -> None:
        """Check every target before the first one is replaced, so that an error leaves the model as it was."""
        super()._prepare_model(peft_config, model)
        _maybe_include_all_linear_layers(peft_config, model)
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        targets = {
            name: module
            for name, module in model.named_modules()
            if name and not name.startswith(inside) and self._check_target_module_exists(peft_config, name)
        }
        check_targets(peft_config, targets, model)

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
        layer = target if isinstance(target, TuckALayer) else self._wrap(target, parent, current_key, scope)
        owns_router = self._takes_router(peft_config, adapter_name, current_key, scope)
        if peft_config.pinned_gates is not None:
            gates = torch.tensor(peft_config.pinned_gates, dtype=torch.get_default_dtype(), device="cpu")
            scope.pinned[adapter_name] = gates
        scope.options[adapter_name] = RouteOptions(
            prompt_only=peft_config.route_tokens == "prompt",
            owner_only=peft_config.router_module is not None,
            synchronized=peft_config.sync_routing,
        )
        layer.update_layer(adapter_name, peft_config, owns_router=owns_router)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _wrap(self, target: nn.Module, parent: nn.Module, name: str, scope: RoutingScope) -> TuckALayer:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer = (TuckALinear if isinstance(base, (nn.Linear, Conv1D)) else TuckALayer)(target, scope)
        decoder = decoder_path(self.model)
        layer.in_decoder = decoder is not None and name.startswith(decoder + ".")
        if isinstance(parent, nn.TransformerEncoderLayer):
            # In evaluation torch reads this parent's weights past its layers, unless one of them has a hook.
            layer.register_forward_pre_hook(_no_change)
        return layer

    @staticmethod
    def _takes_router(config: TuckAConfig, adapter: str, name: str, scope: RoutingScope) -> bool:
        """Say whether this layer is to own the router: the first one, or the one that the user named."""
        if adapter in scope.owners or (config.pinned_gates is not None and not config.keeps_router):
            return False
        return config.router_module is None or names(config.router_module, name)

    def _layers(self) -> Iterator[TuckALayer]:
        return (module for module in self.model.modules() if isinstance(module, TuckALayer))

    def _scope(self) -> RoutingScope:
        """Find the scope of the model's adapted layers, which another tuner may have made; or make it."""
        layer = next(self._layers(), None)
        return RoutingScope() if layer is None else layer.tucka_scope

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        router = self._scope().router(adapter_name)
        if not autocast_adapter_dtype:
            for layer in self._layers():
                layer.take_base_dtype(adapter_name)
        elif router is not None:
            # PEFT widens parameters only.
            router.center = router.center.to(router.centroids.dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT opens this around a call and hands it what only some methods know."""
        if kwargs.get("adapter_names") is not None:
            rule, cure = "None, since one call has one set of active adapters", "Call set_adapter before each call"
            raise ConfigError(expected("adapter_names", rule, kwargs["adapter_names"], where="TuckAModel", cure=cure))
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: TuckAConfig, adapter_name: str, state_dict: dict[str, Tensor], **others: Any
    ) -> dict[str, Tensor]:
        """Find what is to be saved, also where FSDP wraps inner modules: PEFT knows only of a wrapper of the whole."""
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
        loading, config.loading = config.loading, None
        try:
            return checked_tensors(model, config, adapter_name, tensors)
        except CheckpointError:
            if loading is not None:
                loading.undo(model, adapter_name)
            raise

    # Merging and unloading

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, _child: nn.Module) -> None:
        """Put one module in the place of another. PEFT's own looks at weights, which the base may not have."""
        setattr(parent, child_name, new_module)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights: all layers, or none where one cannot be merged.

        Parameters
        ----------
        adapter_names : list of str, optional
            Which; the active ones if None.
        safe_merge : bool
            Whether to look for NaN and infinity before anything is written.
        """
        check_merge(self.model, adapter_names, safe_merge=safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            check_merge(self.model, adapter_names, safe_merge=safe_merge)
        scope = self._scope()
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        scope.detach()
        return model


def _no_change(_module: nn.Module, _args: Any) -> None:
    """Only be there."""


def _warn_of_a_router_that_cannot_learn(config: TuckAConfig) -> None:
    routed = config.pinned_gates is None and not config.inference_mode
    if routed and config.t == 1 and config.gate_norm:
        rule = "at least 2 where gates are normalised, since one expert's gate is always 1 and the router cannot learn"
        cure = "Use t >= 2 or gate_norm=False; as it is, the router gets no gradient and stays as it starts"
        warnings.warn(expected("t", rule, 1, where="TuckAConfig", cure=cure), stacklevel=3)
