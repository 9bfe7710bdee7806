"""Torch functions and modules for custom models; also what the PEFT method is built from."""

from tucka.extras import needs as _needs

with _needs("torch", "tucka.backends.torch"):
    from tucka.backends.torch.functional import mix_cores, tucker_adapt, tucker_adapt_gated
    from tucka.backends.torch.householder import HouseholderAdapter, householder_adapt
    from tucka.backends.torch.modules import TuckerAdapter
    from tucka.backends.torch.routing.router import Router
    from tucka.backends.torch.routing.scope import RoutingScope, routing_scope

__all__ = [
    "HouseholderAdapter",
    "Router",
    "RoutingScope",
    "TuckerAdapter",
    "householder_adapt",
    "mix_cores",
    "routing_scope",
    "tucker_adapt",
    "tucker_adapt_gated",
]
