"""Tucker-structured expert adapters: the tensor algebra, on NumPy, PyTorch and JAX arrays."""

from tucka import backends as backends
from tucka._version import __version__
from tucka.core.balance import CollapseAlarm, load_entropy
from tucka.core.bases import soft_unit_columns
from tucka.core.centroids import balanced_centroids, data_aware_centroids, kaiming_centroids
from tucka.core.collapse import RoutingTrace, follow_routing, simulate_routing
from tucka.core.counts import (
    MethodCounts,
    compare_methods,
    count_activation_bytes,
    count_file_bytes,
    count_flops,
    count_parameters,
)
from tucka.core.counts.paper_tables import PaperCell, paper_counts
from tucka.core.experts import TuckerExperts
from tucka.core.fitting.decomposition import FittedExperts, compress, fit_experts
from tucka.core.householder import householder_experts, householder_gamma, householder_product
from tucka.core.modes import mode_product, multi_mode_product
from tucka.core.rotation import rotation_core
from tucka.core.routing import affinity_logits, routing_feature, select_gates
from tucka.errors import ArrayError, CheckpointError, ConfigError, RouteError, ShapeError, TuckaError
from tucka.spec import Affinity, Routing, TuckerSpec

__all__ = [
    "Affinity",
    "ArrayError",
    "CheckpointError",
    "CollapseAlarm",
    "ConfigError",
    "FittedExperts",
    "MethodCounts",
    "PaperCell",
    "RouteError",
    "Routing",
    "RoutingTrace",
    "ShapeError",
    "TuckaError",
    "TuckerExperts",
    "TuckerSpec",
    "__version__",
    "affinity_logits",
    "balanced_centroids",
    "compare_methods",
    "compress",
    "count_activation_bytes",
    "count_file_bytes",
    "count_flops",
    "count_parameters",
    "data_aware_centroids",
    "fit_experts",
    "follow_routing",
    "householder_experts",
    "householder_gamma",
    "householder_product",
    "kaiming_centroids",
    "load_entropy",
    "mode_product",
    "multi_mode_product",
    "paper_counts",
    "rotation_core",
    "routing_feature",
    "select_gates",
    "simulate_routing",
    "soft_unit_columns",
]
