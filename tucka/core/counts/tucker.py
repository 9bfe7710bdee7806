"""The cost of Tucker experts."""

from __future__ import annotations

from collections.abc import Sequence

from tucka.core.counts.costs import Amount, Cost, Layer, Sizes

__all__ = ["router_cost", "tucker_cost"]


def _for_each_decision(count: int, sizes: Sizes) -> Amount:
    """Return `count` once for each route; a pinned route is one, whatever the routing."""
    if sizes["pinned"] or sizes["routing"] == "batch":
        return Amount(fixed=count)
    return Amount(per_sample=count) if sizes["routing"] == "sample" else Amount(per_token=count)


def tucker_cost(layer: Layer, sizes: Sizes) -> Cost:
    r"""Count one layer's Tucker experts, :math:`x' = x + \alpha\, ((x U) \bar G)\, U^\top`.

    *Parameters*: C has t·p, the cores k·p·r², U has d·r numbers. With t·p = (p/k)·M this is the paper's
    :math:`(p/k) M + k p r^2 + d r`. The output width does not enter: the frozen layer is only called.

    *Forward*, for each token: x U takes d·r, the product with Ḡ r², the one with Uᵀ d·r multiply-adds. Mixing
    :math:`\bar G = \sum (\gamma C)\, G` takes k·t·p for the weights γC and k·p·r² for their product with the cores,
    once (batch) or for each sample. Token routing forms no Ḡ: each token takes k·t·p for its weights, k·p·r for the
    outer product of weights and x U, and k·p·r² to multiply that with the stacked cores.

    *Backward*: each product C = A B has two gradients of the same cost, so twice the forward. A pinned route's gates
    are constant, which saves one k·t·p.

    *Kept*: x, x U and x U Ḡ for each token (d + 2r), and for each route Ḡ and γC (r² + k·p). Token routing keeps γC and
    the outer product for each token instead. x is counted in every layer, although layers that read the same input
    share one copy.

    Parameters
    ----------
    layer : tuple of int
        Input and output width (d, d').
    sizes : mapping
        r, k, t, p, routing, pinned.

    Returns
    -------
    Cost
        Of one layer, without the router.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (5) and (9), and "Expert Complexity" in Sec. 3.2.

    Examples
    --------
    >>> sizes = {"r": 8, "k": 2, "t": 2, "p": 2, "routing": "batch", "pinned": False}
    >>> tucker_cost((768, 3072), sizes).parameters
    6404
    """
    d, _ = layer
    r, k, t, p = (sizes[letter] for letter in "rktp")
    weights, mixing = k * t * p, k * p * r * r
    if sizes["routing"] == "token" and not sizes["pinned"]:
        forward = Amount(per_token=2 * d * r + weights + k * p * r + mixing)
        kept = Amount(per_token=d + 2 * r + k * p + k * p * r)
    else:
        forward = Amount(per_token=2 * d * r + r * r) + _for_each_decision(weights + mixing, sizes)
        kept = Amount(per_token=d + 2 * r) + _for_each_decision(r * r + k * p, sizes)
    backward = 2 * forward + Amount(fixed=-weights if sizes["pinned"] else 0)
    return Cost(t * p + k * p * r * r + d * r, forward=forward, backward=backward, kept=kept)


def router_cost(layers: Sequence[Layer], sizes: Sizes) -> Cost:
    r"""Count the router, one for the whole model; it sees the input of the first layer.

    *Parameters*: M = k·t centroids of the first layer's width, M·d₁. The file also holds the centre of the features,
    d₁ numbers, and a flag of one byte. A pinned route (`pinned`) has none of these.

    *Forward*: M·d₁ multiply-adds for the logits of each decision: one for a batch, one for each sample or each token.
    The mean over tokens, sigmoid and normalisation are element-wise and not counted.

    *Backward*: twice, for the centroids' and the feature's gradients, since the feature is not detached.

    *Kept* for each decision: the feature (d₁) and the gates (M), which all layers share.

    Parameters
    ----------
    layers : sequence of tuple of int
        All adapted layers, the one that runs first in front.
    sizes : mapping
        k, t, routing, pinned.

    Returns
    -------
    Cost
        Of the router; it does not depend on the number of layers.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (6), and Sec. 3.3, where the router has M·d₁ parameters.

    Examples
    --------
    >>> router_cost([(768, 768)] * 60, {"k": 2, "t": 2, "routing": "batch", "pinned": False}).parameters
    3072
    """
    if sizes["pinned"]:
        return Cost()
    width, experts = layers[0][0], sizes["k"] * sizes["t"]
    logits = _for_each_decision(experts * width, sizes)
    kept = _for_each_decision(width + experts, sizes)
    return Cost(experts * width, width, 1, forward=logits, backward=2 * logits, kept=kept)
