"""Tucker-structured expert adapters: the tensor algebra, on NumPy, PyTorch and JAX arrays.

Importing this package imports neither torch nor jax nor peft. The torch layers are in `tucka.backends.torch`, the PEFT
method is in `tucka.peft`.
"""

from tucka import backends as backends
from tucka._version import __version__
from tucka.core.balance import CollapseAlarm, load_entropy
from tucka.core.centroids import balanced_centroids, data_aware_centroids, kaiming_centroids
from tucka.core.counts import count_activation_bytes, count_file_bytes, count_flops, count_parameters
from tucka.core.counts.paper_tables import PaperCell, paper_counts
from tucka.core.experts import TuckerExperts
from tucka.core.fitting.decomposition import FittedExperts, compress, fit_experts
from tucka.core.householder import householder_experts, householder_gamma, householder_product
from tucka.core.modes import mode_product, multi_mode_product
from tucka.core.routing import affinity_logits, routing_feature, select_gates
from tucka.errors import CheckpointError, ConfigError, RouteError, ShapeError, TuckaError
from tucka.spec import TuckerSpec

__all__ = [
    "CheckpointError",
    "CollapseAlarm",
    "ConfigError",
    "FittedExperts",
    "PaperCell",
    "RouteError",
    "ShapeError",
    "TuckaError",
    "TuckerExperts",
    "TuckerSpec",
    "__version__",
    "affinity_logits",
    "balanced_centroids",
    "compress",
    "count_activation_bytes",
    "count_file_bytes",
    "count_flops",
    "count_parameters",
    "data_aware_centroids",
    "fit_experts",
    "householder_experts",
    "householder_gamma",
    "householder_product",
    "kaiming_centroids",
    "load_entropy",
    "mode_product",
    "multi_mode_product",
    "paper_counts",
    "routing_feature",
    "select_gates",
]
