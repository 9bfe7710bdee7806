"""TuckA as a PEFT method. Importing this module registers it; loading a saved adapter needs that first."""

from tucka.peft.callbacks import RouterCallback
from tucka.peft.config import TuckAConfig
from tucka.peft.layer import TuckALayer
from tucka.peft.model import TuckAModel
from tucka.peft.registration import register
from tucka.peft.routes import (
    AdaptedModule,
    adapted_modules,
    expert_load,
    initialize_router,
    last_route,
    pin_route,
    unpin_route,
)

__all__ = [
    "AdaptedModule",
    "RouterCallback",
    "TuckAConfig",
    "TuckALayer",
    "TuckAModel",
    "adapted_modules",
    "expert_load",
    "initialize_router",
    "last_route",
    "pin_route",
    "unpin_route",
]

register(TuckAConfig, TuckAModel)
