"""Routing: from hidden states to a gate tensor that is zero outside the chosen group."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from tucka.arrays import Array, Backend, backend_of, cast, floating_backend, placement, widen
from tucka.checks import check_axes, check_choice, check_positive, check_shapes
from tucka.core.norms import norms_of_rows, scaled_rows
from tucka.errors import ConfigError, ShapeError, expected
from tucka.spec import CENTERED, Affinity, Routing

__all__ = ["affinity_logits", "routing_feature", "select_gates"]


def routing_feature(hidden: Array, *, mask: Array | None = None, routing: Routing = "batch") -> Array:
    r"""Average hidden states into what the router looks at.

    A sample's feature is the mean over its unmasked tokens; the batch's feature :math:`\bar h` is the mean of the
    samples' features, so a long text counts as much as a short one.

    Parameters
    ----------
    hidden : array, shape (B, ..., d)
        Inputs of the first adapted layer: (B, S, d) for text, (B, d) for plain vectors.
    mask : array, shape (B, ...), optional
        True or non-zero where a token counts. All count if None.
    routing : {"batch", "sample", "token"}
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
        If there is no such routing.
    ArrayError
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
    handle = floating_backend(where=where, hidden=hidden)
    check_choice("routing", routing, get_args(Routing), where=where)
    check_axes("hidden", hidden, " ".join(["B", *(f"S{axis}" for axis in range(hidden.ndim - 2)), "d"]), where=where)
    if mask is not None:
        backend_of(hidden=hidden, mask=mask)
        if tuple(mask.shape) != tuple(hidden.shape[:-1]):
            rule = f"shape {tuple(hidden.shape[:-1])} to match hidden"
            raise ShapeError(expected("mask", rule, f"shape {tuple(mask.shape)}", where=where))
    if routing == "token":
        return hidden
    tokens = widen(hidden)
    tokens = handle.reshape(tokens, (tokens.shape[0], -1, tokens.shape[-1]))
    if mask is None:
        samples = handle.mean(tokens, axis=1)
        return cast(samples if routing == "sample" else handle.mean(samples, axis=0), hidden.dtype)
    kept = handle.reshape(mask, (tokens.shape[0], -1)) != 0
    samples, counts = _masked_mean(handle, tokens, kept)
    if routing == "batch":
        samples, _ = _masked_mean(handle, samples[None], (counts != 0)[None])
        samples = samples[0]
    return cast(samples, hidden.dtype)


def _masked_mean(handle: Backend, rows: Array, kept: Array) -> tuple[Array, Array]:
    """Average the rows (n, s, d) where `kept` (n, s) is true, and count them; the mean of none is 0."""
    # where and not a product: whatever padding holds (NaN included), it must not reach the mean.
    rows = handle.where(kept[..., None], rows, handle.zeros_like(rows))
    counts = handle.sum(cast(kept, rows.dtype), axis=1)
    return handle.sum(rows, axis=1) / handle.where(counts == 0, counts + 1, counts)[:, None], counts


def affinity_logits(
    feature: Array,
    centroids: Array,
    *,
    affinity: Affinity = "dot",
    center: Array | None = None,
    temperature: float = 1.0,
) -> Array:
    r"""Compare features with the experts' centroids.

    ==================  =====================================================================
    affinity            logit of expert j in group i
    ==================  =====================================================================
    ``"dot"``           :math:`h \cdot e_{ij}`, the paper's
    ``"group_norm"``    :math:`h \cdot e_{ij} / \lVert (h \cdot e_{im})_m \rVert_2`, the authors' code
    ``"centered"``      :math:`(h - \mu) \cdot e_{ij}`
    ``"directional"``   :math:`(h - \mu) \cdot e_{ij} / \lVert h - \mu \rVert_2`
    ==================  =====================================================================

    Each is divided by the temperature :math:`\tau`, which changes the gates and not the choice. ``"group_norm"`` and
    ``"directional"`` do not depend on the scale of the features (of h, or of h and μ together), ``"centered"`` and
    ``"directional"`` not on a shift of both. A norm of zero counts as one.

    Parameters
    ----------
    feature : array, shape (..., d)
        From `routing_feature`.
    centroids : array, shape (k, t, d)
        One vector for each expert.
    affinity : {"dot", "group_norm", "centered", "directional"}
        Which comparison.
    center : array, shape (d,), optional
        The centre μ of the features, for the last two affinities; zero if None.
    temperature : float
        τ, positive; divides the logits.

    Returns
    -------
    array, shape (..., k, t)
        The logits, before the sigmoid of Eq. (6). NaN and infinity propagate.

    Raises
    ------
    ShapeError
        If the widths differ.
    ConfigError
        If there is no such affinity, a centre is given to one without, or the temperature is not positive.
    ArrayError
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
    handle = floating_backend(where=where, **arrays)
    check_choice("affinity", affinity, get_args(Affinity), where=where)
    axes = {"feature": "... d", "centroids": "k t d", "center": "d"}
    check_shapes(where=where, **{name: (array, axes[name]) for name, array in arrays.items()})
    check_positive("temperature", temperature, where=where)
    if center is not None and affinity not in CENTERED:
        raise ConfigError(expected("center", f"None with affinity={affinity!r}", "an array", where=where))
    features = widen(feature) if center is None else widen(feature) - widen(center)
    logits = _LOGITS[affinity](handle, features, widen(centroids))
    return cast(logits if temperature == 1 else logits / temperature, feature.dtype)


def _dot(handle: Backend, feature: Array, centroids: Array) -> Array:
    return handle.tensordot(feature, centroids, axes=([-1], [2]))


def _group_norm(handle: Backend, feature: Array, centroids: Array) -> Array:
    logits = scaled_rows(_dot(handle, scaled_rows(feature), centroids))
    return logits / norms_of_rows(logits)[..., None]


def _directional(handle: Backend, feature: Array, centroids: Array) -> Array:
    scaled = scaled_rows(feature)
    return _dot(handle, scaled, centroids) / norms_of_rows(scaled)[..., None, None]


_LOGITS: dict[str, Callable[[Backend, Array, Array], Array]] = {
    "dot": _dot,
    "group_norm": _group_norm,
    "centered": _dot,
    "directional": _directional,
}


def select_gates(logits: Array, *, gate_norm: bool = True, bias: Array | None = None) -> Array:
    r"""Choose the group with the highest logit and gate its experts by their scores.

    :math:`s_{ij} = \mathrm{sigmoid}(\mathrm{logit}_{ij})`, :math:`(i_0, j_0) = \arg\max s_{ij}`,
    :math:`g_j = s_{i_0 j} / \sum_m s_{i_0 m}`. The choice compares logits, since scores saturate; ties go to the
    first group. Eq. (8) is computed as a softmax of log-sigmoids, so it stays finite when all scores underflow.
    With a bias, :math:`(i_0, j_0) = \arg\max (\mathrm{logit}_{ij} + b_i)`; the gates do not see it [2]_.

    Parameters
    ----------
    logits : array, shape (..., k, t)
        From `affinity_logits`.
    gate_norm : bool
        Whether the gates of the chosen group sum to one (Eq. 8); else they are its scores, as in the authors' code.
    bias : array, shape (k,), optional
        b, added to the logits of each group for the choice alone; gets no gradient.

    Returns
    -------
    array, shape (..., k, t)
        Gates, zero outside the chosen group. Differentiable; with t = 1 and `gate_norm` the gradient is zero. The
        first group with a NaN is chosen and gets NaN gates: all of them with `gate_norm`, else those of the NaN. A
        logit of −∞ gives a gate of zero, so it excludes an expert; excluding all of them gives NaN with `gate_norm`.

    Raises
    ------
    ShapeError
        If `logits` has fewer than two axes, or `bias` is not one number for each group.
    ConfigError
        If `gate_norm` is no boolean.
    ArrayError
        If an argument is no real floating-point array, or they differ in backend or dtype.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (6), (7), (8).
    .. [2] arXiv:2408.15664, balancing without an auxiliary loss; used by DeepSeek-V3, arXiv:2412.19437, Eq. (16).

    Examples
    --------
    >>> import numpy as np
    >>> select_gates(np.array([[0.0, 0.0], [9.0, 9.0]]))
    array([[0. , 0. ],
           [0.5, 0.5]])
    """
    where = "select_gates"
    given = {"logits": logits, **({} if bias is None else {"bias": bias})}
    handle = floating_backend(where=where, **given)
    axes = {"logits": "... k t", "bias": "k"}
    check_shapes(where=where, **{name: (array, axes[name]) for name, array in given.items()})
    check_choice("gate_norm", gate_norm, (True, False), where=where)
    groups, experts = logits.shape[-2:]
    wide = widen(logits)
    zeros = handle.zeros_like(wide)
    compared = wide if bias is None else wide + widen(bias)[:, None]
    chosen = handle.argmax(handle.reshape(compared, (*wide.shape[:-2], groups * experts)), axis=-1) // experts
    is_chosen = (_positions(handle, groups, wide) == chosen[..., None])[..., None]
    # What the other groups hold must not reach the gradient either: an infinity there would make it NaN.
    log_scores = _log_sigmoid(handle, handle.where(is_chosen, wide, zeros))
    if gate_norm:
        log_scores = log_scores - handle.logsumexp(log_scores, axis=-1)[..., None]
    return cast(handle.where(is_chosen, handle.exp(log_scores), zeros), logits.dtype)


def _log_sigmoid(handle: Backend, logits: Array) -> Array:
    """Compute log(1 / (1 + exp(-x))) without overflow, from -inf to inf."""
    return handle.minimum(logits, handle.zeros_like(logits)) - handle.log(1 + handle.exp(-handle.abs(logits)))


def _positions(handle: Backend, count: int, like: Array) -> Array:
    """Return 0, 1, ..., count - 1 on the device of `like`, where its backend knows of devices."""
    where = placement(like)
    return handle.arange(0, count, **({"device": where["device"]} if "device" in where else {}))
