"""The setting of Theorem 1: Gaussian routing features, and for each run the centroids that it starts from."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from tucka.backends import Array, host_values
from tucka.core.checks import check_size
from tucka.core.initialization import balanced_centroids, data_aware_centroids, kaiming_centroids
from tucka.errors import ConfigError, ShapeError, expected
from tucka.spec import check_choice, check_count

__all__ = ["CentroidStart", "Values", "gaussian_features", "host_numbers", "starting_centroids"]

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
