"""The costs of methods that add a matrix to the weight, as PEFT 0.21 computes them without dropout."""

from __future__ import annotations

from collections.abc import Sequence

from tucka.core.counts.costs import Amount, Cost, Layer, Sizes

__all__ = ["dora_cost", "full_cost", "lora_cost", "vera_cost", "vera_projection_cost"]


def lora_cost(layer: Layer, sizes: Sizes) -> Cost:
    r"""Count one layer's LoRA, :math:`y = x W + s\,(x A) B`.

    *Parameters*: A has d·r and B r·d' numbers (``lora_A`` and ``lora_B`` of ``peft.tuners.lora.layer.Linear``).

    *Forward*, for each token: r·(d + d'). *Backward*: twice that. *Kept* for each token: x and x A, d + r numbers.

    Parameters
    ----------
    layer : tuple of int
        Input and output width (d, d').
    sizes : mapping
        r.

    Returns
    -------
    Cost
        Of one layer.

    Examples
    --------
    >>> lora_cost((768, 3072), {"r": 8}).parameters
    30720
    """
    (d, d_out), r = layer, sizes["r"]
    both = r * (d + d_out)
    return Cost(both, forward=Amount(per_token=both), backward=Amount(per_token=2 * both), kept=Amount(per_token=d + r))


def dora_cost(layer: Layer, sizes: Sizes) -> Cost:
    r"""Count one layer's DoRA: LoRA with one trained magnitude for each output.

    *Parameters*: LoRA's and d' magnitudes (``DoraLinearLayer`` of ``peft.tuners.lora.dora``).

    *Forward*: LoRA's r·(d + d') for each token, and once r·d·(d + d'): PEFT forms A B by sending the d×d identity
    through both, to know the norms of W + s A B. The norms themselves are not counted. *Backward*: LoRA's; the norms
    are detached. *Kept*: x, x A, the frozen layer's output and LoRA's (d + r + 2d') for each token, and once three
    vectors of d'.

    Parameters
    ----------
    layer : tuple of int
        Input and output width (d, d').
    sizes : mapping
        r.

    Returns
    -------
    Cost
        Of one layer.

    Examples
    --------
    >>> dora_cost((768, 3072), {"r": 8}).parameters
    33792
    """
    (d, d_out), r = layer, sizes["r"]
    magnitudes = Cost(d_out, forward=Amount(fixed=r * d * (d + d_out)), kept=Amount(3 * d_out, 0, 2 * d_out))
    return lora_cost(layer, sizes) + magnitudes


def vera_cost(layer: Layer, sizes: Sizes) -> Cost:
    r"""Count one layer's VeRA, :math:`y = x W + ((x A) \Lambda_d B) \Lambda_b` with frozen random A and B.

    *Parameters*: the two diagonals, r + d' (``vera_lambda_d`` and ``vera_lambda_b`` of
    ``peft.tuners.vera.layer.Linear``).

    *Forward*, for each token: r·(d + d'); the diagonals are element-wise. *Backward*: the same, since A and B have no
    gradients. *Kept* for each token: what the diagonals multiply, r + d' numbers.

    Parameters
    ----------
    layer : tuple of int
        Input and output width (d, d').
    sizes : mapping
        r.

    Returns
    -------
    Cost
        Of one layer, without the projections A and B.

    Examples
    --------
    >>> vera_cost((768, 3072), {"r": 256}).parameters
    3328
    """
    (d, d_out), r = layer, sizes["r"]
    products = Amount(per_token=r * (d + d_out))
    return Cost(r + d_out, forward=products, backward=products, kept=Amount(per_token=r + d_out))


def vera_projection_cost(layers: Sequence[Layer], sizes: Sizes) -> Cost:
    """Count VeRA's random projections, one pair for the whole model.

    They are not trained, but PEFT's file holds them unless ``save_projection=False``: r·(d + d') numbers with the
    largest widths of all layers.

    Parameters
    ----------
    layers : sequence of tuple of int
        All adapted layers.
    sizes : mapping
        r.

    Returns
    -------
    Cost
        Only numbers in the file.

    Examples
    --------
    >>> vera_projection_cost([(768, 768), (768, 3072), (3072, 768)], {"r": 256}).buffers
    1572864
    """
    return Cost(buffers=sizes["r"] * (max(d for d, _ in layers) + max(d_out for _, d_out in layers)))


def full_cost(layer: Layer, sizes: Sizes) -> Cost:  # noqa: ARG001 - every formula has the same arguments
    r"""Count one layer's full fine-tuning: its own weight, without a bias.

    *Parameters*: d·d'. *Forward*: nothing beyond the layer's own. *Backward*: the weight's gradient, d·d' for each
    token. *Kept*: x, d for each token, which a frozen layer does not need.

    Parameters
    ----------
    layer : tuple of int
        Input and output width (d, d').
    sizes : mapping
        Empty.

    Returns
    -------
    Cost
        Of one layer.

    Examples
    --------
    >>> full_cost((768, 3072), {}).parameters
    2359296
    """
    d, d_out = layer
    return Cost(d * d_out, backward=Amount(per_token=d * d_out), kept=Amount(per_token=d))
