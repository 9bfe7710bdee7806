"""Starting a router's centroids from features of data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.private import is_of_deepspeed
from tucka.backends.torch.routing.ranks import broadcast_from_first, gather_rows, has_ranks, shard_like
from tucka.backends.torch.routing.router import Router
from tucka.core.centroids import balanced_centroids, data_aware_centroids, features_like_batches, kaiming_centroids
from tucka.core.routing import routing_feature
from tucka.spec import Routing

__all__ = ["MOST_FEATURES", "FirstBatches", "can_start_inside", "features_of", "like_batches", "start_router"]

# Enough to find a few principal axes; bounds memory and time, of token routing above all.
MOST_FEATURES = 2048
# Fewer do not tell how samples and batches vary: a batch that is its own centre would be routed by rounding errors.
_BATCHES, _ROWS_PER_EXPERT = 8, 4


def features_of(router: Router, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return what a router looks at in inputs (B, ..., d): rows (n, d) of tokens, or of samples that have any."""
    # Of samples for batch routing too: there are too few batches to tell from them alone how batches vary.
    mask = None if router.count_padding else mask
    routing: Routing = "token" if router.spec.routing == "token" else "sample"
    feature: Tensor = routing_feature(hidden.float(), mask=mask, routing=routing)
    if mask is not None:
        kept = mask != 0 if routing == "token" else (mask != 0).flatten(1).any(dim=1)
        feature = feature[kept]
    return feature.reshape(-1, hidden.shape[-1])


def like_batches(means: Tensor, deviations: Tensor, *, batch_size: float) -> Tensor:
    """Make features (n, d) that vary as the means of batches do, from means (m, d) and deviations from them."""
    features: Tensor = features_like_batches(means, deviations, batch_size=max(1.0, batch_size))
    return features


def start_router(router: Router, features: Tensor, *, scale: float | None = None, group: Any = None) -> None:
    """Set a router's centroids and centre from features (n, d), alike on all ranks."""
    spec, seed = router.spec, router.seed
    sizes: dict[str, Any] = {"groups": spec.groups, "experts_per_group": spec.experts_per_group, "seed": seed}
    center = features.mean(dim=0) if spec.has_center else torch.zeros_like(features[0])
    if spec.initialization == "balanced":
        centroids, center = balanced_centroids(features, affinity=spec.affinity, **sizes)
    elif spec.initialization == "dai":
        if scale is None:
            # The spread of the features themselves: with the authors' a = 10 the scores saturate.
            scale = max(float(features.std(dim=0, correction=0).mean()), 1e-3)
        # Seen from the centre, as the features are.
        centroids = data_aware_centroids(features - center, scale=scale, **sizes)
    else:
        shape = (spec.groups, spec.experts_per_group, features.shape[1])
        centroids = kaiming_centroids(shape, seed=seed, like=features)
    device = router.center.device
    centroids, center = centroids.to(device), center.to(device)
    broadcast_from_first(centroids, center, group=group)
    router.initialize(shard_like(centroids, router.centroids), center)


class FirstBatches:
    """The features of a router's first batches in training, until there are enough of them to start it."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    @torch.no_grad()
    def start(self, router: Router, hidden: Tensor, mask: Tensor | None, group: Any = None) -> bool:
        """Add the inputs (B, ..., d) of one batch, put together over the ranks; say whether they have started it."""
        rows = gather_rows(features_of(router, hidden.detach(), mask), group)
        if len(rows):
            self.batches.append(rows[:: -(-len(rows) // MOST_FEATURES)])
        count = sum(map(len, self.batches))
        by_batch = router.spec.routing == "batch"
        wanted = _ROWS_PER_EXPERT * router.spec.groups * router.spec.experts_per_group
        if count < wanted or (by_batch and len(self.batches) < _BATCHES):
            return False
        rows = torch.cat(self.batches)
        if by_batch:
            means = torch.stack([batch.mean(dim=0) for batch in self.batches])
            deviations = torch.cat([batch - mean for batch, mean in zip(self.batches, means, strict=True)])
            rows = like_batches(means, deviations, batch_size=count / len(self.batches))
        start_router(router, rows, group=group)
        return True


def can_start_inside(router: Router, root: nn.Module | None, group: Any) -> bool:
    """Tell whether what a forward writes to a router's parameters stays: no engine has copied or cut them."""
    parameter = router.centroids
    if not isinstance(parameter, nn.Parameter) or parameter.is_meta or type(parameter.data) is not Tensor:
        return False
    if is_of_deepspeed(parameter):
        return False
    if has_ranks() and group is None:  # ranks, but not by DDP
        return False
    modules = root.modules() if root is not None else ()
    return not any(type(module).__name__.startswith(("FSDP", "FullySharded")) for module in modules)
