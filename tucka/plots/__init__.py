"""Figures, one function each, drawn in the Axes that it is given or in a figure of its own."""

from tucka.extras import needs as _needs

with _needs("plots", "tucka.plots"):
    from tucka.plots.routes import group_by_label, load_bars, routing_map
    from tucka.plots.sizes import TradeoffPoint, parameter_scaling, tradeoff

__all__ = ["TradeoffPoint", "group_by_label", "load_bars", "parameter_scaling", "routing_map", "tradeoff"]
