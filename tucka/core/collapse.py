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
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from tucka.arrays import Array, host_values
from tucka.checks import check_choice, check_count, check_finite, check_size
from tucka.core.balance import load_entropy
from tucka.core.centroids import balanced_centroids, data_aware_centroids, kaiming_centroids
from tucka.errors import ConfigError, ShapeError, expected
from tucka.spec import Affinity

__all__ = [
    "CentroidStart",
    "RoutingTrace",
    "Values",
    "follow_routing",
    "gaussian_features",
    "host_numbers",
    "simulate_routing",
    "starting_centroids",
]

CentroidStart = Literal["kaiming", "dai", "balanced"]
Values: TypeAlias = np.ndarray[Any, Any]


def host_numbers(name: str, values: Any, shapes: dict[int, str], *, where: str) -> Values:
    """Return finite numbers with one of the given numbers of axes, as NumPy float64.

    Parameters
    ----------
    name : str
        The argument's name, for the message.
    values : float, sequence or array
        The numbers.
    shapes : dict
        From a number of axes to what they are called.
    where : str
        The caller, for the message.

    Returns
    -------
    numpy.ndarray
        The numbers.

    Raises
    ------
    ShapeError
        If the number of axes is another one, or an axis is empty.
    ConfigError
        If a number is not finite.
    TypeError
        If these are no numbers.

    Examples
    --------
    >>> host_numbers("mean", [1, 2], {1: "axes (d)"}, where="example")
    array([1., 2.])
    """
    try:
        numbers = np.asarray(values, dtype=np.float64) if isinstance(values, _PLAIN) else host_values(values)
    except (TypeError, ValueError) as error:
        raise TypeError(expected(name, "numbers", repr(values), where=where)) from error
    if numbers.ndim not in shapes or numbers.size == 0:
        raise ShapeError(expected(name, " or ".join(shapes.values()), f"shape {numbers.shape}", where=where))
    if not np.isfinite(numbers).all():
        raise ConfigError(expected(name, "finite numbers", "NaN or infinity", where=where))
    return numbers


_PLAIN = (int, float, list, tuple)


def gaussian_features(mean: Array, covariance: Any, *, seeds: int, steps: int, seed: int) -> Values:
    """Draw the theorem's routing features.

    Parameters
    ----------
    mean : array, shape (d,)
        Their mean m.
    covariance : float or array of shape (d,) or (d, d)
        A variance for all components, one for each, or a covariance matrix.
    seeds, steps : int
        Independent runs, and features in each.
    seed : int
        The same seed gives the same numbers.

    Returns
    -------
    numpy.ndarray, shape (seeds, steps, d)
        The features.

    Raises
    ------
    ShapeError
        If the shapes do not fit each other.
    ConfigError
        If a number is outside its rule or `covariance` is not positive semi-definite.

    Examples
    --------
    >>> gaussian_features(np.ones(3), 0.0, seeds=1, steps=2, seed=0).tolist()
    [[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]
    """
    where = "gaussian_features"
    seeds, steps = check_count("seeds", seeds, where=where), check_count("steps", steps, where=where)
    check_count("seed", seed, least=0, where=where)
    center = host_numbers("mean", mean, {1: "axes (d)"}, where=where)
    axes = {0: "one number", 1: "axes (d)", 2: "axes (d, d)"}
    spread = host_numbers("covariance", covariance, axes, where=where)
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


def starting_centroids(
    start: CentroidStart, features: Values, *, groups: int, scale: float = 1.0, seed: int = 0
) -> Values:
    """Draw one set of centroids for each run by one of the initialisations that tucka has.

    Parameters
    ----------
    start : {"kaiming", "dai", "balanced"}
        `tucka.kaiming_centroids`, `tucka.data_aware_centroids` or `tucka.balanced_centroids`.
    features : numpy.ndarray, shape (seeds, n, d)
        The sample that each run's initialisation sees; ``"kaiming"`` uses only its shape.
    groups : int
        Number of groups (k), with one expert each.
    scale : float
        The a of the data-aware initialisation.
    seed : int
        The same seed gives the same numbers; each run gets its own.

    Returns
    -------
    numpy.ndarray, shape (seeds, k, d)
        The centroids.

    Raises
    ------
    ConfigError
        If there is no such start, or a number is outside its rule.

    Examples
    --------
    >>> starting_centroids("kaiming", np.zeros((5, 1, 3)), groups=2).shape
    (5, 2, 3)
    """
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
