"""The costs of methods that multiply the weight by an orthogonal matrix."""

from __future__ import annotations

from tucka.core.counts.costs import Amount, Cost, Layer, Sizes

__all__ = ["boft_cost", "hra_cost", "oft_cost"]


def _full_blocks(layer: Layer, block: int) -> Cost:
    """Count d/b blocks of b×b numbers and a scale for each output, the blocks applied to activations.

    Forward: d·b for each token; backward: twice that, and b²·d for the Cayley transform, whose solves are not counted.
    Kept: x and the output before its scale, and once the blocks' system, its factors with d pivots, and its solution.
    """
    d, d_out = layer
    rotate = Amount(per_token=d * block)
    return Cost(
        d * block + d_out,
        forward=rotate,
        backward=2 * rotate + Amount(fixed=d * block * block),
        kept=Amount(fixed=3 * d * block + d, per_token=d + d_out),
    )


def oft_cost(layer: Layer, sizes: Sizes) -> Cost:
    r"""Count one layer's OFT, :math:`y = (x R) W` with R of d/b orthogonal blocks of size b.

    ``variant="peft"``, as PEFT 0.21 computes it (``OFTRotationModule`` of ``peft.tuners.oft.layer``). *Parameters*: a
    block is the Cayley transform of a skew-symmetric matrix, of which the b(b−1)/2 numbers above the diagonal are held:
    d(b−1)/2. *Forward*: the transform is a Neumann series of five terms, three batched products of d·b² multiply-adds,
    once; the rotation takes d·b for each token. *Backward*: twice. *Kept*: x for each token; once the skew-symmetric
    blocks, two of their powers and R, 4·d·b numbers.

    ``variant="paper"``, as the paper's table counts it: full blocks, of which only the skew-symmetric part matters,
    and one scale for each output, d·b + d'. *Forward* and *backward* as when the blocks are solved for and applied to
    activations; the solves are not counted.

    Parameters
    ----------
    layer : tuple of int
        Input and output width (d, d').
    sizes : mapping
        block_size, a divisor of d, and variant.

    Returns
    -------
    Cost
        Of one layer.

    References
    ----------
    .. [1] arXiv:2511.06859, column "# Par." of Tables 1 and 2, for the second variant.

    Examples
    --------
    >>> [oft_cost((768, 3072), {"block_size": 8, "variant": name}).parameters for name in ("peft", "paper")]
    [2688, 9216]
    """
    (d, _), block = layer, sizes["block_size"]
    if sizes["variant"] == "paper":
        return _full_blocks(layer, block)
    forward = Amount(fixed=3 * d * block * block, per_token=d * block)
    kept = Amount(fixed=4 * d * block, per_token=d)
    return Cost(d * (block - 1) // 2, forward=forward, backward=2 * forward, kept=kept)


def boft_cost(layer: Layer, sizes: Sizes) -> Cost:
    r"""Count one layer's BOFT with one butterfly factor, PEFT's default.

    *Parameters*: full blocks and one scale for each output, d·b + d' (``boft_R`` and ``boft_s`` of
    ``peft.tuners.boft.layer.Linear``), in both variants.

    ``variant="peft"``, as PEFT 0.21 computes it. *Forward*: PEFT writes the blocks into a d×d matrix and multiplies it
    with two d×d permutations, which are identities here, and with the identity: 3·d³ once; then x takes d² for each
    token. The Cayley transform's solves (about 4/3·d·b²) and PEFT's CUDA extension, which does that writing, are not
    counted. *Backward*: 3·d³ and d·b² once, 2·d² for each token. *Kept*: x and the output before its scale; once the
    blocks' system, its factors with d pivots and its solution, two d×d matrices and two vectors of d'.

    ``variant="paper"``: as OFT's, without any d×d matrix.

    Parameters
    ----------
    layer : tuple of int
        Input and output width (d, d').
    sizes : mapping
        block_size, a divisor of d, and variant.

    Returns
    -------
    Cost
        Of one layer.

    References
    ----------
    .. [1] arXiv:2511.06859, column "# Par." of Tables 1 and 2.

    Examples
    --------
    >>> boft_cost((768, 3072), {"block_size": 8, "variant": "peft"}).parameters
    9216
    """
    (d, d_out), block = layer, sizes["block_size"]
    blocks = _full_blocks(layer, block)
    if sizes["variant"] == "paper":
        return blocks
    return Cost(
        blocks.parameters,
        forward=Amount(fixed=3 * d**3, per_token=d * d),
        backward=Amount(fixed=3 * d**3 + d * block * block, per_token=2 * d * d),
        kept=blocks.kept + Amount(fixed=2 * d * d + 2 * d_out),
    )


def hra_cost(layer: Layer, sizes: Sizes) -> Cost:
    r"""Count one layer's HRA, :math:`y = x \prod_{i=1}^{r} (I - 2 u_i u_i^\top)\, W`, as PEFT 0.21 computes it.

    *Parameters*: the vectors, d·r (``hra_u`` of ``peft.tuners.hra.layer.HRALinear``).

    *Forward*: PEFT multiplies the d×d identity by one reflection after the other, 2·d² each, multiplies that with
    another identity, d³, and with the weight, d²·d'. All of it once a forward; a token costs nothing more than in the
    frozen layer. *Backward*: the same products' gradients, (4r − 1)·d² + d³ + d²·d', and for each token the gradient of
    the product weight, d·d'. *Kept*: x for each token; once r + 1 matrices of d×d, the product weight, 2·d·r + r
    numbers of the vectors.

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

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (1).

    Examples
    --------
    >>> hra_cost((768, 3072), {"r": 8}).parameters
    6144
    """
    (d, d_out), r = layer, sizes["r"]
    square, chain = d * d, d**3 + d * d * d_out
    return Cost(
        d * r,
        forward=Amount(fixed=2 * r * square + chain),
        backward=Amount(fixed=(4 * r - 1) * square + chain, per_token=d * d_out),
        kept=Amount(fixed=(r + 1) * square + d * d_out + 2 * d * r + r, per_token=d),
    )
