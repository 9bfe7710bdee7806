"""Figures, one function each: accuracy against size, the load of the expert groups, which group serves what.

Each takes matplotlib Axes to draw in, or makes a figure of its own (``axes.figure.savefig(...)`` writes it), and
returns the Axes. No function touches matplotlib's global state; under a dark style such as ``dark_background`` the
colours are those for it. Colours are told apart by readers of any colour vision, and what they tell, a marker, a number
or a position tells too.
"""

from tucka.plots.routes import expert_load, group_by_label, routing_map
from tucka.plots.sizes import TradeoffPoint, parameter_scaling, tradeoff

__all__ = ["TradeoffPoint", "expert_load", "group_by_label", "parameter_scaling", "routing_map", "tradeoff"]
