"""How routing collapses: the dynamics of the paper's Theorem 1, simulated for many seeds at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from scipy.special import expit

from tucka.arrays import Array, Values, finite_values
from tucka.checks import check_choice, check_count, check_least, check_size
from tucka.core.balance import relative_entropy
from tucka.core.centroids import balanced_centroids, data_aware_centroids, kaiming_centroids
from tucka.errors import ConfigError, ShapeError, expected
from tucka.spec import CENTERED, Affinity

__all__ = [
    "CentroidStart",
    "RoutingTrace",
    "follow_routing",
    "gaussian_features",
    "simulate_routing",
    "starting_centroids",
]

CentroidStart = Literal["kaiming", "dai", "balanced"]

# Features that a start from data sees in each run, drawn apart from those that are routed.
_SAMPLES = 32


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
        """Count how often each group was chosen.

        Parameters
        ----------
        window : int, optional
            Steps that are counted together; all if None. The last window may be shorter.

        Returns
        -------
        numpy.ndarray of int, shape (seeds, windows, k)
            The counts.

        Examples
        --------
        >>> RoutingTrace(np.array([[0, 0, 1]]), groups=2, centroids=np.zeros((1, 2, 3))).load(2).tolist()
        [[[2, 0], [0, 1]]]
        """
        steps = self.chosen.shape[1]
        window = steps if window is None else check_count("window", window, where="RoutingTrace.load")
        is_chosen = self.chosen[..., None] == np.arange(self.groups)
        return np.add.reduceat(is_chosen.astype(np.int64), np.arange(0, steps, window), axis=1)

    def entropy(self, window: int | None = None) -> Values:
        """Measure how even the load of each window is, as `tucka.load_entropy`.

        Parameters
        ----------
        window : int, optional
            Steps that are counted together; all if None.

        Returns
        -------
        numpy.ndarray, shape (seeds, windows)
            From 0, one group for all, to 1, all groups alike.

        Examples
        --------
        >>> RoutingTrace(np.array([[0, 1, 1, 1]]), groups=2, centroids=np.zeros((1, 2, 3))).entropy(2).tolist()
        [[1.0, 0.0]]
        """
        return relative_entropy(self.load(window))

    def share_of_first(self) -> Values:
        """Measure which share of a run's later steps chose its first group again.

        Returns
        -------
        numpy.ndarray, shape (seeds,)
            The share; 1 for runs of one step.

        Examples
        --------
        >>> RoutingTrace(np.array([[0, 1, 0]]), groups=2, centroids=np.zeros((1, 2, 3))).share_of_first().tolist()
        [0.5]
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
    learning_rate: float = 1.0,
    scale: float = 1.0,
    seed: int = 0,
) -> RoutingTrace:
    """Draw features and centroids as Theorem 1 assumes them, and follow the routing.

    Parameters
    ----------
    start : {"kaiming", "dai", "balanced"} or array of shape (seeds, k, d)
        How the centroids start: by `tucka.kaiming_centroids`, `tucka.data_aware_centroids` or
        `tucka.balanced_centroids`, or given.
    mean : array, shape (d,)
        Mean m of the routing features. Affinities with a centre subtract it.
    covariance : float or array of shape (d,) or (d, d)
        Covariance of the routing features.
    steps : int
        Batches in each run.
    groups, seeds : int
        Groups and runs; needed with a name, and those of the array otherwise.
    affinity : {"dot", "group_norm", "centered", "directional"}
        How features are compared with centroids, as in `tucka.affinity_logits`.
    learning_rate : float
        As in `follow_routing`.
    scale : float
        The a of ``"dai"``.
    seed : int
        The same seed gives the same run.

    Returns
    -------
    RoutingTrace
        The choices, and the centroids at the end.

    Raises
    ------
    ShapeError, ConfigError
        If the shapes do not fit each other, or a number or an option is outside its rule.

    References
    ----------
    .. [1] arXiv:2511.06859, Theorem 1 in Section 3.4.

    Examples
    --------
    >>> setting = {"groups": 4, "seeds": 50, "steps": 50, "covariance": 0.01}
    >>> bool(simulate_routing("kaiming", mean=np.ones(16), **setting).share_of_first().mean() > 0.99)
    True
    >>> bool(simulate_routing("balanced", mean=np.ones(16), affinity="centered", **setting).entropy().mean() > 0.9)
    True
    """
    where = "simulate_routing"
    middle = _numbers("mean", mean, {1: "axes (d)"}, where)
    given = None
    if not isinstance(start, str):
        given = _given_centroids(start, {"seeds": seeds, "groups": groups, "mean": middle.size}, where)
        seeds = len(given)
    runs = check_count("seeds", seeds, where=where)
    features = gaussian_features(middle, covariance, seeds=runs, steps=steps, seed=seed)
    if given is None:
        count = check_count("groups", groups, where=where)
        apart = int(np.random.SeedSequence([seed, 2]).generate_state(1)[0])
        sample = gaussian_features(middle, covariance, seeds=runs, steps=_SAMPLES, seed=apart)
        given = starting_centroids(start, sample, groups=count, scale=scale, seed=seed)
    center = middle if affinity in CENTERED else None
    return follow_routing(features, given, affinity=affinity, center=center, learning_rate=learning_rate)


def follow_routing(
    features: Array,
    centroids: Array,
    *,
    affinity: Affinity = "dot",
    center: Array | None = None,
    learning_rate: float = 1.0,
) -> RoutingTrace:
    r"""Route features one after the other, each time moving the chosen centroid.

    The setting is the theorem's: one expert in a group, scores without normalisation, and a loss that falls with the
    score of the chosen group. Each step chooses the group :math:`i^*` with the highest logit and moves its centroid
    alone,

    .. math:: e_{i^*} \leftarrow e_{i^*} + \eta\, s (1 - s)\, x, \qquad s = \mathrm{sigmoid}(x \cdot e_{i^*}),

    where x is the gradient of the logit: the feature h itself for the paper's dot product, and what
    `tucka.affinity_logits` makes of it otherwise. Where the features have a mean that is large beside their spread,
    each step raises all later logits of :math:`i^*`, so the group chosen first is chosen again.

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
    learning_rate : float
        η: the step's size, times that of the loss's slope :math:`\partial L / \partial s`; not negative.

    Returns
    -------
    RoutingTrace
        The choices, and the centroids at the end. Ties go to the first group.

    Raises
    ------
    ShapeError, ConfigError
        As `simulate_routing`.

    References
    ----------
    .. [1] arXiv:2511.06859, Theorem 1 in Section 3.4; the choice is Eq. (7).

    Examples
    --------
    >>> features = np.array([[[1.0, 0.0], [1.0, 0.0]]])
    >>> trace = follow_routing(features, np.array([[[0.0, 1.0], [0.0, 0.0]]]), learning_rate=4.0)
    >>> trace.chosen.tolist(), trace.centroids[0].round(2).tolist()
    ([[0, 0]], [[1.79, 1.0], [0.0, 0.0]])
    """
    where = "follow_routing"
    check_choice("affinity", affinity, get_args(Affinity), where=where)
    rate = check_least("learning_rate", learning_rate, 0, where=where)
    inputs = _numbers("features", features, {3: "axes (seeds, steps, d)"}, where)
    moving = _numbers("centroids", centroids, {3: "axes (seeds, k, d)"}, where).copy()
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
            highest = logits[runs, best]
            moving[runs, best] += (rate * expit(highest) * expit(-highest))[:, None] * x
    return RoutingTrace(chosen, moving.shape[1], moving)


def _inputs(features: Values, affinity: Affinity, center: Array | None, where: str) -> Values:
    """Turn features into the vectors whose products with the centroids are the logits, and their gradients."""
    if center is not None:
        if affinity not in CENTERED:
            raise ConfigError(expected("center", f"None with affinity={affinity!r}", "an array", where=where))
        middle = _numbers("center", center, {1: "axes (d)"}, where)
        check_size("center", middle, 0, features.shape[2], matches="features", where=where)
        features = features - middle
    if affinity == "directional":
        norms = np.linalg.norm(features, axis=2, keepdims=True)
        features = features / np.where(norms == 0, 1.0, norms)
    return features


def starting_centroids(
    start: CentroidStart, features: Values, *, groups: int, scale: float = 1.0, seed: int = 0
) -> Values:
    """Draw the centroids (seeds, k, d) of each run from what its start sees, features (seeds, n, d)."""
    check_choice("start", start, get_args(CentroidStart), where="starting_centroids")
    check_count("seed", seed, least=0, where="starting_centroids")
    runs = []
    for run, sample in enumerate(features):
        own = int(np.random.SeedSequence([seed, 1, run]).generate_state(1)[0])
        if start == "kaiming":
            centroids = kaiming_centroids((groups, 1, sample.shape[1]), seed=own)
        elif start == "dai":
            centroids = data_aware_centroids(sample, groups=groups, experts_per_group=1, scale=scale, seed=own)
        else:
            centroids, _ = balanced_centroids(sample, groups=groups, experts_per_group=1, seed=own)
        runs.append(centroids[:, 0])
    return np.stack(runs)


def gaussian_features(mean: Array, covariance: Any, *, seeds: int, steps: int, seed: int) -> Values:
    """Draw the theorem's features (seeds, steps, d); the covariance is a number, (d,) variances or a (d, d) matrix."""
    where = "gaussian_features"
    seeds, steps = check_count("seeds", seeds, where=where), check_count("steps", steps, where=where)
    check_count("seed", seed, least=0, where=where)
    center = _numbers("mean", mean, {1: "axes (d)"}, where)
    axes = {0: "one number", 1: "axes (d)", 2: "axes (d, d)"}
    spread = _numbers("covariance", covariance, axes, where)
    for axis in range(spread.ndim):
        check_size("covariance", spread, axis, center.size, matches="mean", where=where)
    normal = np.random.default_rng([seed, 0]).standard_normal((seeds, steps, center.size))
    return np.asarray(center + (normal * _root(spread, where) if spread.ndim < 2 else normal @ _root(spread, where)))


def _root(covariance: Values, where: str) -> Values:
    """Return the symmetric square root, of each number or of the matrix."""
    matrix = covariance.ndim == 2
    if matrix and np.abs(covariance - covariance.T).max() > 1e-6 * np.abs(covariance).max():
        raise ConfigError(expected("covariance", "a symmetric matrix", "another one", where=where))
    variances, axes = np.linalg.eigh(covariance) if matrix else (covariance, np.eye(1))
    # Rounding makes the zeros of a singular covariance slightly negative.
    if variances.min() < -1e-6 * np.abs(variances).max():
        value = f"a smallest variance of {variances.min():.3g}"
        raise ConfigError(expected("covariance", "no negative variance", value, where=where))
    deviations = np.sqrt(np.clip(variances, 0.0, None))
    return np.asarray((axes * deviations) @ axes.T if matrix else deviations)


def _given_centroids(start: Array, sizes: dict[str, int | None], where: str) -> Values:
    """Check centroids against the sizes of their axes that other arguments tell."""
    given = _numbers("start", start, {3: "a name or axes (seeds, k, d)"}, where)
    for axis, (name, size) in enumerate(sizes.items()):
        if size is not None:
            check_size("start", given, axis, size, matches=name, where=where)
    return given


def _numbers(name: str, values: Any, shapes: dict[int, str], where: str) -> Values:
    """Return finite numbers, as NumPy float64, with a number of axes in `shapes`, which says what they are called."""
    numbers = finite_values(name, values, where=where)
    if numbers.ndim not in shapes or numbers.size == 0:
        raise ShapeError(expected(name, " or ".join(shapes.values()), f"shape {numbers.shape}", where=where))
    return numbers
