"""The costs of methods that add a matrix to the weight, as PEFT 0.21 computes them without dropout."""

from __future__ import annotations

from collections.abc import Sequence

from tucka.core.counts.costs import Amount, Cost, Layer, Sizes

__all__ = ["dora_cost", "full_cost", "lora_cost", "vera_cost", "vera_projection_cost"]


def lora_cost(layer: Layer, sizes: Sizes) -> Cost:
    """Count one layer's LoRA, y = x W + s (x A) B (``Linear`` of ``peft.tuners.lora.layer``)."""
    (d, d_out), r = layer, sizes["r"]
    both = r * (d + d_out)
    kept = Amount(per_token=d + r)  # x and x A
    return Cost(both, forward=Amount(per_token=both), backward=Amount(per_token=2 * both), kept=kept)


def dora_cost(layer: Layer, sizes: Sizes) -> Cost:
    """Count one layer's DoRA: LoRA and a trained magnitude for each output (``DoraLinearLayer`` of PEFT)."""
    (d, d_out), r = layer, sizes["r"]
    # PEFT sends the d×d identity through A and B to know the norms of W + s A B; the norms are not counted, and they
    # are detached, so the backward is LoRA's.
    forward = Amount(fixed=r * d * (d + d_out))
    kept = Amount(fixed=3 * d_out, per_token=2 * d_out)  # three vectors; the outputs of the frozen layer and of LoRA
    return lora_cost(layer, sizes) + Cost(d_out, forward=forward, kept=kept)


def vera_cost(layer: Layer, sizes: Sizes) -> Cost:
    """Count one layer's VeRA, y = x W + ((x A) Λ_d B) Λ_b, without the frozen random projections A and B."""
    (d, d_out), r = layer, sizes["r"]
    # The backward is one product each, since A and B have no gradients; the diagonals are element-wise.
    products = Amount(per_token=r * (d + d_out))
    return Cost(r + d_out, forward=products, backward=products, kept=Amount(per_token=r + d_out))


def vera_projection_cost(layers: Sequence[Layer], sizes: Sizes) -> Cost:
    """Count VeRA's random projections, one pair of the largest widths for the whole model."""
    # They are not trained, but PEFT's file holds them unless ``save_projection=False``.
    return Cost(buffers=sizes["r"] * (max(d for d, _ in layers) + max(d_out for _, d_out in layers)))


def full_cost(layer: Layer, sizes: Sizes) -> Cost:  # noqa: ARG001 - every formula has the same arguments
    """Count one layer's full fine-tuning: its own weight, without a bias."""
    d, d_out = layer
    # The forward is the layer's own. A frozen layer needs neither the weight's gradient nor x.
    return Cost(d * d_out, backward=Amount(per_token=d * d_out), kept=Amount(per_token=d))
