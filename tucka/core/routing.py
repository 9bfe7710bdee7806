"""Routing: from hidden states to a gate tensor that is zero outside the chosen group."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np

from tucka.backends import Array, Backend, backend_of, cast
from tucka.core.checks import check_axes, check_floating, check_size, is_half
from tucka.errors import ConfigError, ShapeError, expected
from tucka.spec import Affinity, Routing, check_choice, check_finite

__all__ = ["affinity_logits", "load_entropy", "routing_feature", "select_gates"]


def _wide(array: Array) -> Array:
    """Routing numbers are few: compute them in float32 where the input is in half precision."""
    return cast(array, backend_of(array=array).float32) if is_half(array) else array


def routing_feature(hidden: Array, *, mask: Array | None = None, granularity: Routing = "batch") -> Array:
    r"""Average hidden states into what the router looks at.

    A sample's feature is the mean over its unmasked tokens; the batch's feature :math:`\bar h` is the mean of the
    samples' features, so a long text counts as much as a short one.

    Parameters
    ----------
    hidden : array, shape (B, ..., d)
        Inputs of the first adapted layer: (B, S, d) for text, (B, d) for plain vectors.
    mask : array, shape (B, ...), optional
        True or non-zero where a token counts. All count if None.
    granularity : {"batch", "sample", "token"}
        What one routing decision is made for.

    Returns
    -------
    array, shape (d,), (B, d) or (B, ..., d)
        For batch, sample and token. Differentiable. A sample whose tokens are all masked has the feature 0 and
        does not count in the batch's mean. NaN and infinity in unmasked places propagate; masked places have no
        influence, whatever they hold.

    Raises
    ------
    ShapeError
        If there is no sample or no token, or `mask` does not have the shape of `hidden` without its last axis.
    ConfigError
        If there is no such granularity.
    TypeError
        If `hidden` is no real floating-point array or `mask` is of another backend.

    References
    ----------
    .. [1] arXiv:2511.06859, the definition above Eq. (6).

    Examples
    --------
    >>> import numpy as np
    >>> hidden = np.array([[[1.0], [3.0]], [[5.0], [0.0]]])
    >>> routing_feature(hidden, mask=np.array([[1, 1], [1, 0]]))
    array([3.5])
    """
    where = "routing_feature"
    handle = backend_of(hidden=hidden) if mask is None else backend_of(hidden=hidden, mask=mask)
    check_floating(where=where, hidden=hidden)
    check_choice("granularity", granularity, get_args(Routing), where=where)
    check_axes("hidden", hidden, " ".join(["B", *(f"S{axis}" for axis in range(hidden.ndim - 2)), "d"]), where=where)
    if mask is not None and tuple(mask.shape) != tuple(hidden.shape[:-1]):
        rule = f"shape {tuple(hidden.shape[:-1])} to match hidden"
        raise ShapeError(expected("mask", rule, f"shape {tuple(mask.shape)}", where=where))
    if granularity == "token":
        return hidden
    tokens = _wide(hidden)
    tokens = handle.reshape(tokens, (tokens.shape[0], -1, tokens.shape[-1]))
    if mask is None:
        samples = handle.mean(tokens, axis=1)
        feature = samples if granularity == "sample" else handle.mean(samples, axis=0)
        return cast(feature, hidden.dtype)
    kept = handle.reshape(mask, (tokens.shape[0], -1)) != 0
    # where and not a product: whatever padding holds (NaN included), it must not reach the mean.
    tokens = handle.where(kept[..., None], tokens, handle.zeros_like(tokens))
    weights = cast(kept, tokens.dtype)
    counts = handle.sum(weights, axis=1)
    samples = handle.sum(tokens, axis=1) / _at_least_one(handle, counts)[:, None]
    if granularity == "sample":
        return cast(samples, hidden.dtype)
    present = handle.sum(cast(counts != 0, tokens.dtype), axis=0)
    return cast(handle.sum(samples, axis=0) / _at_least_one(handle, present), hidden.dtype)


def _at_least_one(handle: Backend, counts: Array) -> Array:
    return handle.where(counts == 0, counts + 1, counts)


def affinity_logits(
    feature: Array,
    centroids: Array,
    *,
    kind: Affinity = "dot",
    center: Array | None = None,
    temperature: float = 1.0,
) -> Array:
    r"""Compare features with the experts' centroids.

    ==================  =====================================================================
    kind                logit of expert j in group i
    ==================  =====================================================================
    ``"dot"``           :math:`h \cdot e_{ij}`, the paper's
    ``"group_norm"``    :math:`h \cdot e_{ij} / \lVert (h \cdot e_{im})_m \rVert_2`, the authors' code
    ``"centered"``      :math:`(h - \mu) \cdot e_{ij}`
    ``"directional"``   :math:`(h - \mu) \cdot e_{ij} / \lVert h - \mu \rVert_2`
    ==================  =====================================================================

    ``"group_norm"`` and ``"directional"`` do not depend on the scale of the features. A norm of zero counts as one.

    Parameters
    ----------
    feature : array, shape (..., d)
        From `routing_feature`.
    centroids : array, shape (k, t, d)
        One vector for each expert.
    kind : {"dot", "group_norm", "centered", "directional"}
        Which comparison.
    center : array, shape (d,), optional
        The centre μ of the features, for the last two kinds; zero if None.
    temperature : float
        Positive; divides the logits.

    Returns
    -------
    array, shape (..., k, t)
        The logits, before the sigmoid of Eq. (6). NaN and infinity propagate.

    Raises
    ------
    ShapeError
        If the widths differ.
    ConfigError
        If there is no such kind, a centre is given to a kind without one, or the temperature is not positive.
    TypeError
        If the arrays differ in backend or dtype.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (6), inside the sigmoid.

    Examples
    --------
    >>> import numpy as np
    >>> affinity_logits(np.array([1.0, 2.0]), np.array([[[1.0, 0.0]], [[0.0, 1.0]]]))
    array([[1.],
           [2.]])
    """
    where = "affinity_logits"
    arrays = {"feature": feature, "centroids": centroids, **({} if center is None else {"center": center})}
    backend_of(**arrays)
    check_floating(where=where, **arrays)
    check_choice("kind", kind, get_args(Affinity), where=where)
    check_axes("feature", feature, "... d", where=where)
    check_axes("centroids", centroids, "k t d", where=where)
    check_size("centroids", centroids, 2, feature.shape[-1], matches="the last axis of feature", where=where)
    if check_finite("temperature", temperature, where=where) <= 0:
        raise ConfigError(expected("temperature", "a positive number", repr(temperature), where=where))
    if center is not None:
        if kind not in ("centered", "directional"):
            raise ConfigError(expected("center", f"None with kind={kind!r}", "an array", where=where))
        check_axes("center", center, "d", where=where)
        check_size("center", center, 0, feature.shape[-1], matches="the last axis of feature", where=where)
    features = _wide(feature) if center is None else _wide(feature) - _wide(center)
    logits = _LOGITS[kind](backend_of(**arrays), features, _wide(centroids))
    return cast(logits / temperature, feature.dtype)


def _dot(handle: Backend, feature: Array, centroids: Array) -> Array:
    return handle.einsum("...d,ktd->...kt", feature, centroids)


def _group_norm(handle: Backend, feature: Array, centroids: Array) -> Array:
    return _unit(handle, _dot(handle, feature, centroids))


def _directional(handle: Backend, feature: Array, centroids: Array) -> Array:
    return _dot(handle, _unit(handle, feature), centroids)


def _unit(handle: Backend, vectors: Array) -> Array:
    """Divide by the norm along the last axis; a zero vector stays zero, with a zero gradient instead of NaN."""
    squares = handle.sum(vectors * vectors, axis=-1)
    norms = handle.sqrt(handle.where(squares == 0, squares + 1, squares))
    return vectors / norms[..., None]


_LOGITS: dict[str, Callable[[Backend, Array, Array], Array]] = {
    "dot": _dot,
    "group_norm": _group_norm,
    "centered": _dot,
    "directional": _directional,
}


def select_gates(logits: Array, *, normalize: bool = True) -> Array:
    r"""Choose the group with the highest logit and gate its experts by their scores.

    :math:`s_{ij} = \mathrm{sigmoid}(\mathrm{logit}_{ij})`, :math:`(i_0, j_0) = \arg\max s_{ij}`,
    :math:`g_j = s_{i_0 j} / \sum_m s_{i_0 m}`. The choice compares logits, since scores saturate; ties go to the
    first group. Eq. (8) is computed as a softmax of log-sigmoids, so it stays finite when all scores underflow.

    Parameters
    ----------
    logits : array, shape (..., k, t)
        From `affinity_logits`.
    normalize : bool
        Whether the gates of the chosen group sum to one (Eq. 8); else they are its scores, as in the authors' code.

    Returns
    -------
    array, shape (..., k, t)
        Gates, zero outside the chosen group. Differentiable; with t = 1 and `normalize` the gradient is zero. A NaN
        logit gives NaN gates in the group that is chosen.

    Raises
    ------
    ShapeError
        If `logits` has fewer than two axes.
    TypeError
        If `logits` is no real floating-point array.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (6), (7), (8).

    Examples
    --------
    >>> import numpy as np
    >>> select_gates(np.array([[0.0, 0.0], [9.0, 9.0]]))
    array([[0. , 0. ],
           [0.5, 0.5]])
    """
    where = "select_gates"
    handle = backend_of(logits=logits)
    check_floating(where=where, logits=logits)
    check_axes("logits", logits, "... k t", where=where)
    check_choice("normalize", normalize, (True, False), where=where)
    groups, experts = logits.shape[-2:]
    wide = _wide(logits)
    flat = handle.reshape(wide, (*wide.shape[:-2], groups * experts))
    chosen = handle.argmax(flat, axis=-1) // experts
    log_scores = -handle.logsumexp(handle.stack([handle.zeros_like(wide), -wide], axis=-1), axis=-1)
    if normalize:
        log_scores = log_scores - handle.logsumexp(log_scores, axis=-1)[..., None]
    is_chosen = _indices_like(chosen, groups) == chosen[..., None]
    return cast(handle.where(is_chosen[..., None], handle.exp(log_scores), handle.zeros_like(wide)), logits.dtype)


def _indices_like(array: Array, count: int) -> Array:
    """Return 0, 1, ..., count - 1 on the device of `array`."""
    device = {"device": array.device} if backend_of(array=array).backend_name == "pytorch" else {}
    return backend_of(array=array).arange(0, count, **device)


def load_entropy(load: Array) -> float:
    r"""Measure how evenly groups are used: :math:`-\sum_i p_i \log p_i / \log k` with :math:`p` the shares.

    Parameters
    ----------
    load : array_like, shape (k,)
        Counts or weights of the groups; not negative, not all zero.

    Returns
    -------
    float
        1 if all groups are used alike, 0 if one takes everything. One group alone is balanced: 1.

    Raises
    ------
    ShapeError
        If `load` is not a vector.
    ConfigError
        If an entry is negative or not finite, or all are zero.

    Examples
    --------
    >>> load_entropy([10, 10]), load_entropy([20, 0])
    (1.0, 0.0)
    """
    host = load.detach().cpu() if hasattr(load, "detach") else load
    counts = np.asarray(host, dtype=np.float64)
    if counts.ndim != 1 or counts.size == 0:
        raise ShapeError(expected("load", "axes (k)", f"shape {counts.shape}", where="load_entropy"))
    if not np.all(np.isfinite(counts)) or counts.min() < 0 or counts.sum() == 0:
        rule = "finite counts, none negative, not all zero"
        raise ConfigError(expected("load", rule, counts.tolist(), where="load_entropy"))
    if counts.size == 1:
        return 1.0
    shares = counts[counts > 0] / counts.sum()
    return float(abs(np.sum(shares * np.log(shares))) / np.log(counts.size))
