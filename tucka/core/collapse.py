r"""How routing collapses: the dynamics of the paper's Theorem 1, simulated for many seeds at once.

The setting is the theorem's: one expert in a group, scores without normalisation, and a loss that falls with the score
of whoever is chosen. So every step chooses the group :math:`i^*` with the highest logit and moves its centroid alone,

.. math:: e_{i^*} \leftarrow e_{i^*} + \eta\, \lvert \partial L / \partial s \rvert\, s (1 - s)\, x,
          \qquad s = \mathrm{sigmoid}(x \cdot e_{i^*}),

where x is the gradient of the logit: the feature h itself for the paper's dot product, and what `tucka.affinity_logits`
makes of it otherwise. Where features have a mean that is large beside their spread, all later logits of :math:`i^*`
rise with it: the one chosen first is chosen again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from tucka.backends import Array
from tucka.core.checks import check_size
from tucka.core.collapse_setting import CentroidStart, Values, gaussian_features, host_numbers, starting_centroids
from tucka.core.load import load_entropy
from tucka.errors import ConfigError, expected
from tucka.spec import Affinity, check_choice, check_count, check_finite

__all__ = ["RoutingTrace", "follow_routing", "gaussian_features", "simulate_routing", "starting_centroids"]


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """What was chosen, step by step, in each of several runs.

    Parameters
    ----------
    chosen : numpy.ndarray of int, shape (seeds, steps)
        The group chosen.
    groups : int
        Number of groups (k).
    centroids : numpy.ndarray, shape (seeds, k, d)
        The centroids after the last step.

    Examples
    --------
    >>> trace = RoutingTrace(np.array([[0, 0, 1, 1]]), groups=2, centroids=np.zeros((1, 2, 3)))
    >>> trace.load(2).tolist(), trace.entropy().tolist(), trace.share_of_first().round(2).tolist()
    ([[[2, 0], [0, 2]]], [[1.0]], [0.33])
    """

    chosen: Values
    groups: int
    centroids: Values

    def load(self, window: int | None = None) -> Values:
        """Count how often each group was chosen in consecutive windows.

        Parameters
        ----------
        window : int, optional
            Steps in a window; the last one may have fewer. All steps are one window if None.

        Returns
        -------
        numpy.ndarray of int, shape (seeds, windows, k)
            The counts. A window of 1 gives the load of every step.

        Raises
        ------
        ConfigError
            If `window` is not a whole number of at least 1.
        """
        steps = self.chosen.shape[1]
        window = steps if window is None else check_count("window", window, where="RoutingTrace.load")
        is_chosen = self.chosen[..., None] == np.arange(self.groups)
        return np.add.reduceat(is_chosen.astype(np.int64), np.arange(0, steps, window), axis=1)

    def entropy(self, window: int | None = None) -> Values:
        """Measure how even the load of each window is.

        Parameters
        ----------
        window : int, optional
            As in `load`.

        Returns
        -------
        numpy.ndarray, shape (seeds, windows)
            1 where all groups are used alike, 0 where one takes everything. A window shorter than k cannot reach 1.

        Raises
        ------
        ConfigError
            If `window` is not a whole number of at least 1.
        """
        return np.apply_along_axis(load_entropy, -1, self.load(window))

    def share_of_first(self) -> Values:
        """Measure how faithful a run stays to its first choice.

        Returns
        -------
        numpy.ndarray, shape (seeds,)
            The share of the steps after the first that chose the same group again; 1 for runs of one step.
        """
        if self.chosen.shape[1] == 1:
            return np.ones(len(self.chosen))
        return np.asarray((self.chosen[:, 1:] == self.chosen[:, :1]).mean(axis=1))


def simulate_routing(
    start: CentroidStart | Array,
    *,
    mean: Array,
    covariance: Any = 1.0,
    steps: int,
    groups: int | None = None,
    seeds: int | None = None,
    affinity: Affinity = "dot",
    center: Array | None = None,
    learning_rate: float = 1.0,
    slope: float = 1.0,
    scale: float = 1.0,
    samples: int = 32,
    seed: int = 0,
) -> RoutingTrace:
    """Draw features and centroids as Theorem 1 assumes them, and follow the routing.

    Parameters
    ----------
    start : {"kaiming", "dai", "balanced"} or array of shape (seeds, k, d)
        How the centroids start; see `starting_centroids` for the names.
    mean : array, shape (d,)
        Mean m of the routing features.
    covariance : float or array of shape (d,) or (d, d)
        Covariance of the routing features.
    steps : int
        Batches in each run.
    groups, seeds : int
        Groups and runs; needed with a name, and those of the array otherwise.
    affinity : {"dot", "group_norm", "centered", "directional"}
        How features are compared with centroids, as in `tucka.affinity_logits`.
    center : array, shape (d,), optional
        The centre μ for the last two; `mean` if None.
    learning_rate : float
        η; not negative.
    slope : float
        The size of ∂L/∂s, which is negative; the same in all steps.
    scale : float
        The a of ``"dai"``.
    samples : int
        Features that ``"dai"`` and ``"balanced"`` see, drawn apart from the others.
    seed : int
        The same seed gives the same run.

    Returns
    -------
    RoutingTrace
        The choices, and the centroids at the end.

    Raises
    ------
    ShapeError
        If the shapes do not fit each other.
    ConfigError
        If a number or an option is outside its rule.

    References
    ----------
    .. [1] arXiv:2511.06859, Theorem 1 in Section 3.4.

    Examples
    --------
    >>> setting = {"groups": 4, "seeds": 50, "steps": 50, "covariance": 0.01}
    >>> simulate_routing("kaiming", mean=np.ones(16), **setting).share_of_first().mean() > 0.99
    np.True_
    >>> simulate_routing("balanced", mean=np.ones(16), affinity="centered", **setting).entropy().mean() > 0.9
    np.True_
    """
    where = "simulate_routing"
    middle = host_numbers("mean", mean, {1: "axes (d)"}, where=where)
    given = (
        None
        if isinstance(start, str)
        else _centroids(start, {"seeds": seeds, "groups": groups, "mean": middle.size}, where)
    )
    if given is not None:
        seeds = len(given)
    runs = check_count("seeds", seeds, where=where)
    features = gaussian_features(middle, covariance, seeds=runs, steps=steps, seed=seed)
    if given is None:
        count = check_count("groups", groups, where=where)
        apart = int(np.random.SeedSequence([seed, 2]).generate_state(1)[0])
        sample = gaussian_features(middle, covariance, seeds=runs, steps=samples, seed=apart)
        given = starting_centroids(start, sample, groups=count, scale=scale, seed=seed)
    if center is None and affinity in ("centered", "directional"):
        center = middle
    return follow_routing(features, given, affinity=affinity, center=center, learning_rate=learning_rate, slope=slope)


def _centroids(start: Array, sizes: dict[str, int | None], where: str) -> Values:
    """Check centroids against the sizes of their axes that other arguments tell."""
    given = host_numbers("start", start, {3: "a name or axes (seeds, k, d)"}, where=where)
    for axis, (name, size) in enumerate(sizes.items()):
        if size is not None:
            check_size("start", given, axis, size, matches=name, where=where)
    return given


def follow_routing(
    features: Array,
    centroids: Array,
    *,
    affinity: Affinity = "dot",
    center: Array | None = None,
    learning_rate: float = 1.0,
    slope: float = 1.0,
) -> RoutingTrace:
    r"""Route features one after the other, each time moving the chosen centroid.

    Parameters
    ----------
    features : array, shape (seeds, steps, d)
        The routing features of each run.
    centroids : array, shape (seeds, k, d)
        Where each run starts.
    affinity : {"dot", "group_norm", "centered", "directional"}
        How features are compared with centroids. With one expert in a group, ``"group_norm"`` leaves only the sign of
        the dot product: its gradient is zero, so nothing moves, and of the groups with a positive product the first
        is chosen.
    center : array, shape (d,), optional
        The centre μ for the last two; zero if None.
    learning_rate, slope : float
        η and the size of ∂L/∂s; neither is negative.

    Returns
    -------
    RoutingTrace
        The choices, and the centroids at the end. Ties go to the first group.

    Raises
    ------
    ShapeError
        If the shapes do not fit each other.
    ConfigError
        If a number or an option is outside its rule.

    Examples
    --------
    >>> features = np.array([[[1.0, 0.0], [1.0, 0.0]]])
    >>> trace = follow_routing(features, np.array([[[0.0, 1.0], [0.0, 0.0]]]), learning_rate=4.0)
    >>> trace.chosen.tolist(), trace.centroids[0].round(2).tolist()
    ([[0, 0]], [[1.79, 1.0], [0.0, 0.0]])
    """
    where = "follow_routing"
    check_choice("affinity", affinity, get_args(Affinity), where=where)
    rate = _not_negative("learning_rate", learning_rate, where) * _not_negative("slope", slope, where)
    inputs = host_numbers("features", features, {3: "axes (seeds, steps, d)"}, where=where)
    moving = host_numbers("centroids", centroids, {3: "axes (seeds, k, d)"}, where=where).copy()
    for axis in (0, 2):
        check_size("centroids", moving, axis, inputs.shape[axis], matches="features", where=where)
    inputs = _inputs(inputs, affinity, center, where)
    runs = np.arange(len(inputs))
    chosen = np.empty(inputs.shape[:2], dtype=np.int64)
    for step in range(inputs.shape[1]):
        x = inputs[:, step]
        logits = np.einsum("nd,nkd->nk", x, moving)
        if affinity == "group_norm":
            logits = np.sign(logits)
        chosen[:, step] = best = logits.argmax(axis=1)
        if affinity != "group_norm":
            moving[runs, best] += (rate * _sigmoid_slope(logits[runs, best]))[:, None] * x
    return RoutingTrace(chosen, moving.shape[1], moving)


def _inputs(features: Values, affinity: Affinity, center: Array | None, where: str) -> Values:
    """Turn features into the vectors whose products with the centroids are the logits, and their gradients."""
    if center is not None:
        if affinity not in ("centered", "directional"):
            raise ConfigError(expected("center", f"None with affinity={affinity!r}", "an array", where=where))
        middle = host_numbers("center", center, {1: "axes (d)"}, where=where)
        check_size("center", middle, 0, features.shape[2], matches="features", where=where)
        features = features - middle
    if affinity == "directional":
        norms = np.linalg.norm(features, axis=2, keepdims=True)
        features = features / np.where(norms == 0, 1.0, norms)
    return features


def _sigmoid_slope(logits: Values) -> Values:
    """Compute s (1 - s) without overflow."""
    tail = np.exp(-np.abs(logits))
    return np.asarray(tail / (1.0 + tail) ** 2)


def _not_negative(name: str, value: float, where: str) -> float:
    if check_finite(name, value, where=where) < 0:
        raise ConfigError(expected(name, "a number that is not negative", repr(value), where=where))
    return float(value)
