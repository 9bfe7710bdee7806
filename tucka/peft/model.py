"""The tuner: puts TuckA layers into a model and hands all of them one routing scope."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from tucka.backends.torch.modules import width_of
from tucka.backends.torch.scope import RoutingScope
from tucka.errors import ConfigError, expected
from tucka.peft.config import TuckAConfig
from tucka.peft.layer import TuckALayer

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
        for name, module in targets.items():
            width = width_of(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, name)
            if peft_config.r > width:
                cure = "Choose a smaller r or exclude the layer"
                raise ConfigError(expected("r", f"at most the width {width}", peft_config.r, where=name, cure=cure))
            is_convolution = isinstance(module, nn.modules.conv._ConvNd)
            if is_convolution and peft_config.routing == "token":
                rule = "'batch' or 'sample' where a convolution is adapted"
                raise ConfigError(expected("routing", rule, "'token'", where=name))
        owner = peft_config.router_module
        if targets and owner is not None and not any(_names(owner, name) for name in targets):
            raise ConfigError(
                expected("router_module", "the name of an adapted layer", repr(owner), where="TuckAConfig")
            )

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
        layer = target
        if not isinstance(layer, TuckALayer):
            layer = TuckALayer(target, scope)
        owns_router = self._takes_router(peft_config, adapter_name, current_key, scope)
        if peft_config.pinned_gates is not None:
            scope.pinned[adapter_name] = torch.tensor(peft_config.pinned_gates, dtype=torch.get_default_dtype())
        if peft_config.route_tokens == "prompt":
            scope.prompt_only.add(adapter_name)
        layer.update_layer(adapter_name, peft_config, owns_router=owns_router)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    @staticmethod
    def _takes_router(config: TuckAConfig, adapter: str, name: str, scope: RoutingScope) -> bool:
        """Say whether this layer is to own the router: the first one, or the one that the user named."""
        if config.pinned_gates is not None or adapter in scope.owners:
            return False
        return config.router_module is None or _names(config.router_module, name)

    def _scope(self) -> RoutingScope:
        """Find the scope of the model's adapted layers, which another tuner may have made; or make it."""
        known = (module.tucka_scope for module in self.model.modules() if isinstance(module, TuckALayer))
        scope = next(known, None) or RoutingScope()
        scope.attach(self.model)
        return scope

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT opens this around one forward, and around a whole generation."""
        with self._scope_of_layers().session(**kwargs):
            yield

    def _scope_of_layers(self) -> RoutingScope:
        return next(module.tucka_scope for module in self.model.modules() if isinstance(module, TuckALayer))

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        scope = self._scope_of_layers()
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        scope.detach()
        return model


def _names(ending: str, name: str) -> bool:
    return name == ending or name.endswith("." + ending)
