"""Where centroids start."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tucka
from support.close import assert_close
from support.refusals import refused
from support.strategies import arrays, seeds
from tucka import reference

sizes = st.integers(1, 4)


@given(shape=st.tuples(sizes, sizes, sizes), seed=seeds)
def test_kaiming_centroids_fill_kaimings_interval(shape, seed):
    centroids = tucka.kaiming_centroids(shape, seed=seed)
    assert centroids.shape == shape
    assert np.abs(centroids).max() <= np.sqrt(6 / shape[-1])


def test_kaiming_centroids_are_spread_evenly_over_the_interval():
    centroids = tucka.kaiming_centroids((10, 10, 600), seed=0)
    # Of U(-b, b) with b = 0.1: variance b²/3, and mean 0 within five standard errors.
    assert centroids.var() == pytest.approx(0.01 / 3, rel=0.02)
    assert abs(centroids.mean()) < 5 * 0.1 / np.sqrt(3 * centroids.size)


@given(seed=seeds)
def test_a_seed_gives_the_same_centroids_on_every_backend(library, seed):
    plain = tucka.kaiming_centroids((2, 3, 4), seed=seed)
    like = library.from_numpy(np.zeros(1))
    assert_close(library.to_numpy(tucka.kaiming_centroids((2, 3, 4), seed=seed, like=like)), plain, eps=library.eps)


@given(data=st.data(), seed=seeds, scale=st.sampled_from([0.0, 0.5, 10.0]))
def test_data_aware_centroids_equal_the_reference_for_their_noise(library, data, seed, scale):
    groups, experts, width = 2, 3, data.draw(st.sampled_from([1, 4]))
    features = data.draw(arrays(5, width))
    options = {"groups": groups, "experts_per_group": experts, "scale": scale, "seed": seed}
    centroids = library.to_numpy(tucka.data_aware_centroids(library.from_numpy(features), **options))
    # Around features of zero the centroids are the noise, which does not depend on the features.
    noise = tucka.data_aware_centroids(np.zeros((1, width)), **options).reshape(-1, width)
    assert np.all(noise[0] == 0)
    assert np.abs(noise).max() <= scale
    desired = reference.data_aware_centroids(features, noise[1:]).reshape(groups, experts, width)
    assert_close(centroids, desired, eps=library.eps, scale=20)


@given(seed=st.integers(0, 1000))
def test_balanced_centroids_split_skewed_data_evenly(seed):
    rng = np.random.default_rng(seed)
    count, width, groups, experts = 1000, 8, 3, 2
    features = 50 + rng.standard_normal((count, width)) * rng.uniform(0.01, 100, width)
    for affinity in ("centered", "directional"):
        options = {"groups": groups, "experts_per_group": experts, "seed": seed, "affinity": affinity}
        centroids, center = tucka.balanced_centroids(features, **options)
        np.testing.assert_allclose(center, features.mean(axis=0))
        gates = tucka.select_gates(tucka.affinity_logits(features, centroids, affinity=affinity, center=center))
        shares = (gates.sum(axis=-1) > 0).mean(axis=0)
        # 1/3 within five standard errors of 1000 draws.
        np.testing.assert_allclose(shares, 1 / groups, atol=5 * np.sqrt(2 / 9 / count))


@given(seed=seeds)
def test_the_corners_of_balanced_centroids_are_mutually_alike(seed):
    features = np.random.default_rng(seed).standard_normal((50, 6)) @ np.diag([9, 3, 2, 1, 1, 1])
    options = {"groups": 2, "experts_per_group": 2, "seed": seed}
    centroids, center = tucka.balanced_centroids(features, affinity="centered", **options)
    whitened = (features - center) @ centroids.reshape(4, 6).T
    # A regular simplex of 4 unit corners: products 1 with itself, -1/3 with another.
    np.testing.assert_allclose(np.cov(whitened.T, bias=True), np.eye(4) * 4 / 3 - 1 / 3, atol=1e-9)


@given(seed=seeds, scale=st.sampled_from([1e-3, 40.0]), shift=st.sampled_from([0.0, 100.0]))
def test_balanced_logits_are_of_order_one_whatever_the_scale_and_shift_of_the_features(seed, scale, shift):
    plain = np.random.default_rng(seed).standard_normal((50, 6)) @ np.diag([9, 3, 2, 1, 1, 1])
    options = {"groups": 2, "experts_per_group": 2, "seed": seed}
    for affinity in ("centered", "directional"):
        logits = []
        for features in (plain, scale * plain + shift):
            centroids, center = tucka.balanced_centroids(features, affinity=affinity, **options)
            logits.append(tucka.affinity_logits(features, centroids, affinity=affinity, center=center))
        np.testing.assert_allclose(logits[1], logits[0], rtol=1e-4, atol=1e-4)
        assert 0.3 < logits[0].std() < 3
    # A training step moves them alike then, relative to their size.
    first, second = (tucka.balanced_centroids(each, **options)[0] for each in (plain, scale * plain + shift))
    np.testing.assert_allclose(second, first, rtol=1e-4, atol=1e-4)


@given(seed=seeds, width=st.sampled_from([1, 4]))
def test_features_like_batches_have_the_mean_of_the_two_covariances(library, seed, width):
    batches = np.random.default_rng(seed).standard_normal((6, 5, width)).astype(np.float32).astype(np.float64)
    means, deviations = batches.mean(axis=1), (batches - batches.mean(axis=1, keepdims=True)).reshape(-1, width)
    made = tucka.core.centroids.features_like_batches(
        library.from_numpy(means), library.from_numpy(deviations), batch_size=5
    )
    rows = library.to_numpy(made).astype(np.float64)
    assert_close(rows.mean(axis=0), means.mean(axis=0), eps=library.eps, terms=40, scale=10)
    covariance = np.atleast_2d(np.cov(rows.T, bias=True))
    desired = (np.cov(means.T, bias=True) + deviations.T @ deviations / len(deviations) / 5) / 2
    assert_close(covariance, np.atleast_2d(desired), eps=library.eps, terms=40, scale=10)


def test_balanced_centroids_need_an_affinity_with_a_centre():
    with refused(tucka.ConfigError, "affinity", "'centered' | 'directional' | 'dot'"):
        tucka.balanced_centroids(np.ones((3, 2)), groups=2, experts_per_group=1, seed=0, affinity="dot")


@given(seed=seeds)
def test_a_seed_gives_the_same_balanced_centroids_on_every_backend(library, seed):
    features = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32).astype(np.float64)
    plain = tucka.balanced_centroids(features, groups=2, experts_per_group=2, seed=seed)
    there = tucka.balanced_centroids(library.from_numpy(features), groups=2, experts_per_group=2, seed=seed)
    for actual, desired in zip(there, plain, strict=True):
        assert_close(library.to_numpy(actual), desired, eps=library.eps)


DEGENERATE = {
    "one feature": np.ones((1, 5)),
    "equal features": np.tile(np.linspace(0.1, 0.7, 5), (9, 1)),
    "features on a line": np.linspace(-1, 1, 9)[:, None] * np.ones(5),
    "fewer dimensions than corners": np.random.default_rng(0).standard_normal((9, 2)),
    "one dimension": np.random.default_rng(0).standard_normal((9, 1)),
    "zeros": np.zeros((3, 5)),
}


@pytest.mark.parametrize("features", DEGENERATE.values(), ids=list(DEGENERATE))
@pytest.mark.parametrize("sizes", [(3, 2), (1, 1)], ids=["six experts", "one expert"])
@given(seed=seeds)
def test_balanced_centroids_of_degenerate_data_are_finite_and_of_moderate_size(features, sizes, seed):
    groups, experts = sizes
    centroids, center = tucka.balanced_centroids(features, groups=groups, experts_per_group=experts, seed=seed)
    assert centroids.shape == (*sizes, features.shape[1])
    norms = np.linalg.norm(centroids, axis=-1)
    assert np.all(norms > 1e-6)
    assert np.all(norms < 1e3)
    assert np.isfinite(center).all()


@pytest.mark.parametrize("affinity", ["centered", "directional"])
def test_balanced_centroids_of_features_that_do_not_vary_have_length_one(affinity):
    options = {"groups": 2, "experts_per_group": 2, "affinity": affinity, "seed": 0}
    centroids, _ = tucka.balanced_centroids(DEGENERATE["equal features"], **options)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=-1), 1)


@given(seed=seeds)
def test_another_seed_gives_other_centroids(seed):
    features = np.random.default_rng(0).standard_normal((9, 4))
    options = {"groups": 2, "experts_per_group": 2}
    first, second = (tucka.kaiming_centroids((2, 2, 4), seed=each) for each in (seed, seed + 1))
    assert not np.array_equal(first, second)
    first, second = (tucka.data_aware_centroids(features, scale=1.0, seed=each, **options) for each in (seed, seed + 1))
    assert not np.array_equal(first, second)
    first, second = (tucka.balanced_centroids(features, seed=each, **options)[0] for each in (seed, seed + 1))
    assert not np.array_equal(first, second)


def test_centroids_are_not_connected_to_the_features_for_gradients():
    features = pytest.importorskip("torch").randn(5, 3, requires_grad=True)
    aware = tucka.data_aware_centroids(features, groups=2, experts_per_group=1, scale=1.0, seed=0)
    balanced, center = tucka.balanced_centroids(features, groups=2, experts_per_group=1, seed=0)
    assert not any(array.requires_grad for array in (aware, balanced, center))
