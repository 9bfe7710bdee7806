"""What adapters cost, before any is built: integers in, integers out, no tensors.

`costs` says what a cost is made of; `tucker`, `low_rank` and `orthogonal` hold one formula for each method, `methods`
is the table of them all, `counting` asks it, and `comparison` asks it for several methods at once.
"""

from tucka.core.counts.comparison import MethodCounts, compare_methods
from tucka.core.counts.counting import count_activation_bytes, count_file_bytes, count_flops, count_parameters

__all__ = [
    "MethodCounts",
    "compare_methods",
    "count_activation_bytes",
    "count_file_bytes",
    "count_flops",
    "count_parameters",
]
