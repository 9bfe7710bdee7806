"""The costs of methods that multiply the weight by an orthogonal matrix, as PEFT 0.21 computes them."""

from __future__ import annotations

from tucka.core.counts.costs import Amount, Cost, Layer, Sizes

__all__ = ["boft_cost", "hra_cost", "oft_cost"]


def _full_blocks(layer: Layer, block: int) -> Cost:
    """Count d/b blocks of b×b numbers and a scale for each output, the blocks applied to activations."""
    d, d_out = layer
    rotate = Amount(per_token=d * block)
    return Cost(
        d * block + d_out,
        forward=rotate,
        backward=2 * rotate + Amount(fixed=d * block * block),  # the Cayley transform; its solves are not counted
        # The blocks' system, its factors with d pivots and its solution; x and the output before its scale.
        kept=Amount(fixed=3 * d * block + d, per_token=d + d_out),
    )


def oft_cost(layer: Layer, sizes: Sizes) -> Cost:
    """Count one layer's OFT, y = (x R) W with R of d/b orthogonal blocks (``OFTRotationModule`` of PEFT)."""
    (d, _), block = layer, sizes["block_size"]
    if sizes["variant"] == "paper":
        # The column "# Par." of the paper's Tables 1 and 2: full blocks and a scale, d·b + d'.
        return _full_blocks(layer, block)
    # The Cayley transform is a Neumann series of five terms: three batched products of d·b². Then x R.
    forward = Amount(fixed=3 * d * block * block, per_token=d * block)
    kept = Amount(fixed=4 * d * block, per_token=d)  # skew-symmetric blocks, two of their powers, R; x
    # Of a skew-symmetric block, the b(b−1)/2 numbers above the diagonal are held.
    return Cost(d * (block - 1) // 2, forward=forward, backward=2 * forward, kept=kept)


def boft_cost(layer: Layer, sizes: Sizes) -> Cost:
    """Count one layer's BOFT with one butterfly factor, PEFT's default (``Linear`` of ``peft.tuners.boft.layer``)."""
    (d, d_out), block = layer, sizes["block_size"]
    blocks = _full_blocks(layer, block)
    if sizes["variant"] == "paper":
        return blocks
    return Cost(
        blocks.parameters,
        # The blocks stand in a d×d matrix, which meets two permutations (identities here) and the identity; then x R.
        # The solves, about 4/3·d·b², and PEFT's CUDA extension, which writes the matrix, are not counted.
        forward=Amount(fixed=3 * d**3, per_token=d * d),
        backward=Amount(fixed=3 * d**3 + d * block * block, per_token=2 * d * d),
        kept=blocks.kept + Amount(fixed=2 * d * d + 2 * d_out),  # two d×d matrices, two vectors
    )


def hra_cost(layer: Layer, sizes: Sizes) -> Cost:
    """Count one layer's HRA, y = x Π (I − 2 u uᵀ) W: Eq. (1) (``HRALinear`` of ``peft.tuners.hra.layer``)."""
    (d, d_out), r = layer, sizes["r"]
    # PEFT multiplies the d×d identity by one reflection after the other, 2·d² each, then by another identity and by
    # the weight. A token costs no more than in the frozen layer.
    square, chain = d * d, d**3 + d * d * d_out
    return Cost(
        d * r,
        forward=Amount(fixed=2 * r * square + chain),
        # The same products' gradients; for each token the gradient of the product weight.
        backward=Amount(fixed=(4 * r - 1) * square + chain, per_token=d * d_out),
        # r + 1 matrices of d×d, the product weight, what the vectors are made of; x.
        kept=Amount(fixed=(r + 1) * square + d * d_out + 2 * d * r + r, per_token=d),
    )
