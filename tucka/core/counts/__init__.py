"""What adapters cost, before any is built: integers in, integers out, no tensors."""

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
