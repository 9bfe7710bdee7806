"""Where the router's centroids start: at random, around the data, or along directions that split the data evenly."""

from __future__ import annotations

import math

import numpy as np

from tucka.arrays import Array, Values, array_like, finite_values, floating_backend
from tucka.checks import check_axes, check_choice, check_count, check_least, check_size
from tucka.errors import ShapeError, expected
from tucka.spec import CENTERED, Affinity

__all__ = ["balanced_centroids", "data_aware_centroids", "features_like_batches", "kaiming_centroids"]


def _checked(name: str, rows: Array, where: str) -> Values:
    """Check rows (n, d) of numbers and copy them to the host in float64."""
    floating_backend(where=where, **{name: rows})
    check_axes(name, rows, "n d", where=where)
    return finite_values(name, rows, where=where)


def _generator(seed: int, where: str) -> np.random.Generator:
    # NumPy draws for every backend, so a seed gives the same numbers on all of them.
    return np.random.default_rng(check_count("seed", seed, least=0, where=where))


def kaiming_centroids(shape: tuple[int, int, int], *, seed: int, like: Array | None = None) -> Array:
    r"""Draw centroids from Kaiming's uniform distribution, :math:`\mathcal{U}(-b, b)` with :math:`b = \sqrt{6/d}`.

    Parameters
    ----------
    shape : (int, int, int)
        (k, t, d): groups, experts in a group, width.
    seed : int
        The same seed gives the same numbers on every backend.
    like : array, optional
        Its backend, dtype and device are used; NumPy float64 if None.

    Returns
    -------
    array, shape (k, t, d)
        The centroids.

    Raises
    ------
    ShapeError, ConfigError
        If `shape` does not have three entries, one is no whole number of at least 1, or the seed is negative.
    ArrayError
        If `like` is no real floating-point array.

    References
    ----------
    .. [1] arXiv:2511.06859, Section 3.4, the start that Theorem 1 is about.

    Examples
    --------
    >>> kaiming_centroids((2, 3, 4), seed=0).shape
    (2, 3, 4)
    """
    where = "kaiming_centroids"
    if not isinstance(shape, (tuple, list)) or len(shape) != 3:
        raise ShapeError(expected("shape", "three sizes (k, t, d)", shape, where=where))
    if like is not None:
        floating_backend(where=where, like=like)
    sizes = [check_count(f"shape[{axis}]", size, where=where) for axis, size in enumerate(shape)]
    bound = math.sqrt(6.0 / sizes[2])
    return array_like(_generator(seed, where).uniform(-bound, bound, size=sizes), like)


def data_aware_centroids(features: Array, *, groups: int, experts_per_group: int, scale: float, seed: int) -> Array:
    r"""Place centroids around the mean of the data: :math:`[e, e+\epsilon_1, \ldots, e+\epsilon_{M-1}]`.

    :math:`e` is the mean of `features` and each component of :math:`\epsilon` is drawn from :math:`\mathcal{U}(-a, a)`.
    With the paper's dot products, :math:`h \cdot e` is common to all experts and cancels in the choice, so the spread
    a has no influence on the balance; see `balanced_centroids`.

    Parameters
    ----------
    features : array, shape (n, d)
        Routing features of some samples or batches.
    groups, experts_per_group : int
        k and t; M = k·t centroids are made.
    scale : float
        The paper's a; not negative.
    seed : int
        The same seed gives the same perturbations on every backend.

    Returns
    -------
    array, shape (k, t, d)
        Backend, dtype and device of `features`; not connected to it for gradients.

    Raises
    ------
    ShapeError, ArrayError
        If `features` is not a matrix of real floating-point numbers with at least one row.
    ConfigError
        If a size, the scale or the seed is outside its rule, or a feature is not finite.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (10).

    Examples
    --------
    >>> import numpy as np
    >>> data_aware_centroids(np.ones((5, 3)), groups=2, experts_per_group=1, scale=0.0, seed=0)[1, 0]
    array([1., 1., 1.])
    """
    where = "data_aware_centroids"
    values = _checked("features", features, where)
    groups = check_count("groups", groups, where=where)
    experts = check_count("experts_per_group", experts_per_group, where=where)
    scale = check_least("scale", scale, 0, where=where)
    center = values.mean(axis=0)
    noise = _generator(seed, where).uniform(-scale, scale, size=(groups * experts, center.size))
    noise[0] = 0.0
    return array_like((center + noise).reshape(groups, experts, center.size), features)


def features_like_batches(means: Array, deviations: Array, *, batch_size: float) -> Array:
    """Make rows (m + n, d) that vary as batch means, of which a few (m, d) were seen, with their deviations (n, d)."""
    # Batches that are drawn at random vary as their samples, by 1/√B; batches of alike samples (of one length, of one
    # source) vary by more along what they share. The covariance of the rows is the mean of two estimates: that of the
    # means seen, and that of the samples' deviations within their batches divided by B.
    where = "features_like_batches"
    seen, within = _checked("means", means, where), _checked("deviations", deviations, where)
    check_size("deviations", within, 1, seen.shape[1], matches="means", where=where)
    batch_size = check_least("batch_size", batch_size, 1, where=where)
    center, count = seen.mean(axis=0), len(seen) + len(within)
    between = (seen - center) * math.sqrt(count / (2 * len(seen)))
    rows = np.concatenate([between, within * math.sqrt(count / (2 * len(within) * batch_size))])
    return array_like(center + rows, means)


def balanced_centroids(
    features: Array, *, groups: int, experts_per_group: int, affinity: Affinity = "directional", seed: int
) -> tuple[Array, Array]:
    r"""Choose a centre and directions that split the data into parts of about the same size.

    The features are centred and whitened along their leading principal axes. The M = k·t corners of a regular simplex
    in that space, turned by a random rotation, are mutually alike, so whitened data falls to each about as often. The
    directions are those corners carried back: :math:`(h - \mu) \cdot e_{ij}` is the product in the whitened space,
    which has the variance 1. For ``"directional"``, which divides by :math:`\lVert h - \mu \rVert`, they are multiplied
    by the root of that norm's mean square. So the logits are of order 1, and the relative size of a training step does
    not depend on the scale of the features.

    Parameters
    ----------
    features : array, shape (n, d)
        Routing features of some samples or batches. Where they span fewer than M − 1 dimensions, random directions
        orthogonal to them fill the rest.
    groups, experts_per_group : int
        k and t.
    affinity : {"directional", "centered"}
        What they are for, see `tucka.affinity_logits`.
    seed : int
        Turns the simplex; the same seed gives the same result on every backend.

    Returns
    -------
    centroids : array, shape (k, t, d)
        One direction for each expert.
    center : array, shape (d,)
        The mean of the features. Both as in `data_aware_centroids`.

    Raises
    ------
    ShapeError, ArrayError, ConfigError
        As `data_aware_centroids`; also if the affinity has no centre.

    Examples
    --------
    >>> import numpy as np
    >>> features = np.random.default_rng(0).normal(size=(200, 5)) * [9, 3, 1, 1, 1] + 50
    >>> centroids, center = balanced_centroids(features, groups=2, experts_per_group=2, seed=0)
    >>> logits = np.einsum("nd,ktd->nkt", features - center, centroids)
    >>> bool(np.bincount(logits.reshape(200, 4).argmax(axis=1) // 2).min() > 60)
    True
    """
    where = "balanced_centroids"
    check_choice("affinity", affinity, CENTERED, where=where)
    values = _checked("features", features, where)
    groups = check_count("groups", groups, where=where)
    experts = check_count("experts_per_group", experts_per_group, where=where)
    rng = _generator(seed, where)
    center = values.mean(axis=0)
    # Corners that the width cannot hold as a simplex are projected into it.
    dims = min(max(groups * experts - 1, 1), values.shape[1])
    rounding = 1e-12 * float(np.abs(values).max())
    axes = _whitening_axes(values - center, dims, rounding, rng)
    corners = _turned_simplex(groups * experts, dims, rng)
    directions = (corners @ axes).reshape(groups, experts, values.shape[1])
    if affinity == "directional":
        spread = math.sqrt(float(np.mean(np.sum((values - center) ** 2, axis=1))))
        directions = directions * (spread if spread > rounding else 1.0)
    return array_like(directions, features), array_like(center, features)


def _whitening_axes(centred: Values, dims: int, rounding: float, rng: np.random.Generator) -> Values:
    """Return (dims, d) rows v_c / σ_c; random directions of the mean size where the data has no spread left."""
    count, width = centred.shape
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    spread = singular / math.sqrt(count)
    known = int(min((spread > max(1e-6 * spread.max(), rounding)).sum(), dims))
    scale = spread[:known].mean() if known else 1.0
    axes = np.empty((dims, width))
    axes[:known] = rows[:known] / spread[:known, None]
    if known < dims:
        extra = rng.standard_normal((width, dims - known))
        extra -= rows[:known].T @ (rows[:known] @ extra)
        axes[known:] = np.linalg.qr(extra)[0].T / scale
    return axes


def _turned_simplex(corners: int, dims: int, rng: np.random.Generator) -> Values:
    """Return (corners, dims) unit vectors: a regular simplex in a random position, if dims is corners - 1."""
    points = np.ones((1, 1))
    if corners > 1:
        points = np.linalg.svd(np.eye(corners) - 1.0 / corners)[0][:, : corners - 1]
    rotation, triangle = np.linalg.qr(rng.standard_normal((points.shape[1],) * 2))
    turned = (points @ (rotation * np.sign(np.diag(triangle))))[:, :dims]
    return np.asarray(turned / np.linalg.norm(turned, axis=1, keepdims=True))
