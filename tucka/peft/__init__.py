"""TuckA as a PEFT method. Importing this module registers it; loading a saved adapter needs that first."""

from tucka.extras import needs as _needs

with _needs("peft", "tucka.peft"):
    from tucka.peft.adapters import AdaptedModule, adapted_modules
    from tucka.peft.config import TuckAConfig
    from tucka.peft.files.loading import load_adapter
    from tucka.peft.files.lora import export_lora
    from tucka.peft.files.official import load_official_checkpoint
    from tucka.peft.hra import accelerate_hra, restore_hra
    from tucka.peft.layer import TuckALayer
    from tucka.peft.model import TuckAModel
    from tucka.peft.registration import register
    from tucka.peft.routes.callback import RouterCallback
    from tucka.peft.routes.given import add_group, given_route
    from tucka.peft.routes.inspection import expert_load, last_route
    from tucka.peft.routes.pinning import pin_route, unpin_route
    from tucka.peft.routes.start import balance_router, initialize_router, set_routing_group

__all__ = [
    "AdaptedModule",
    "RouterCallback",
    "TuckAConfig",
    "TuckALayer",
    "TuckAModel",
    "accelerate_hra",
    "adapted_modules",
    "add_group",
    "balance_router",
    "expert_load",
    "export_lora",
    "given_route",
    "initialize_router",
    "last_route",
    "load_adapter",
    "load_official_checkpoint",
    "pin_route",
    "restore_hra",
    "set_routing_group",
    "unpin_route",
]

register(TuckAConfig, TuckAModel)
