"""The cost of Tucker experts."""

from __future__ import annotations

from collections.abc import Sequence

from tucka.core.counts.costs import Amount, Cost, Layer, Sizes
from tucka.spec import mixes_each_row

__all__ = ["router_cost", "tucker_cost"]


def _for_each_decision(count: int, sizes: Sizes) -> Amount:
    """Return `count` once for each route; a pinned route is one, whatever the routing."""
    if sizes["pinned"] or sizes["routing"] == "batch":
        return Amount(fixed=count)
    return Amount(per_sample=count) if sizes["routing"] == "sample" else Amount(per_token=count)


def tucker_cost(layer: Layer, sizes: Sizes) -> Cost:
    """Count one layer's Tucker experts, x' = x + α ((x U) Ḡ) Uᵀ: Eq. (5) and (9), "Expert Complexity" in Sec. 3.2."""
    # The output width does not enter: the frozen layer is only called.
    d, _ = layer
    r, k, t, p = (sizes[letter] for letter in "rktp")
    # Ḡ = Σ (γ C) G: the weights γ C, and their product with the cores, the common one of a rotation among them.
    slices = k * p + 1 if sizes["rotation"] else k * p
    weights, mixing = k * t * p, slices * r * r
    if sizes["routing"] == "token" and not sizes["pinned"]:
        # With no more experts than slices, the gates γ weigh the experts' cores, which are made once; else γ C weighs
        # slices. Each token has a Ḡ, which is multiplied by x U, or the outer product of weights and x U, times cores.
        weighs_experts = t <= p
        count = k * t if weighs_experts else slices
        own = r * r if mixes_each_row(r, count) else count * r
        forward = Amount(per_token=2 * d * r + own + count * r * r)
        # x, x U, (x U) Ḡ, Ḡ or the outer product, and the cores with their scale. Gates count with the router.
        kept = Amount(per_token=d + 2 * r + own, fixed=count * r * r)
        if weighs_experts:
            forward += Amount(fixed=k * t * p * r * r)
        else:
            forward, kept = forward + Amount(per_token=weights), kept + Amount(per_token=slices)
    else:
        forward = Amount(per_token=2 * d * r + r * r) + _for_each_decision(weights + mixing, sizes)
        # x counts in every layer, although layers that read the same input share one copy.
        kept = Amount(per_token=d + 2 * r) + _for_each_decision(r * r + slices, sizes)
    # Each product has two gradients of its own cost; a pinned route's gates are constant and need none.
    backward = 2 * forward + Amount(fixed=-weights if sizes["pinned"] else 0)
    if sizes["rotation"]:
        # UᵀU, and two products of r×r matrices; the gradient has as many.
        turning = Amount(fixed=d * r * r + 2 * r**3)
        forward, backward, kept = forward + turning, backward + turning, kept + Amount(fixed=r * r)
    # With t·p = (p/k)·M this is the paper's (p/k)·M + k·p·r² + d·r.
    # The file of a rotation also holds its strength.
    buffers = 1 if sizes["rotation"] else 0
    return Cost(t * p + k * p * r * r + d * r, buffers, forward=forward, backward=backward, kept=kept)


def router_cost(layers: Sequence[Layer], sizes: Sizes) -> Cost:
    """Count the router, one for the whole model, which sees the first layer's input: Eq. (6) and Sec. 3.3."""
    if sizes["pinned"]:
        return Cost()
    width, experts = layers[0][0], sizes["k"] * sizes["t"]
    # Mean over tokens, sigmoid and normalisation are element-wise and not counted.
    logits = _for_each_decision(experts * width, sizes)
    kept = _for_each_decision(width + experts, sizes)  # the feature and the gates, which all layers share
    # Backward: the gradients of the centroids and of the feature, which is not detached. The file also holds the
    # features' centre and a flag.
    return Cost(experts * width, width + 1, forward=logits, backward=2 * logits, kept=kept)
