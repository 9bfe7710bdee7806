"""Theorem 1 in simulation: when routing collapses, and when it does not."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tucka
from support.close import assert_close
from support.refusals import refused
from support.strategies import seeds, sizes
from tucka import reference
from tucka.core.collapse import RoutingTrace, follow_routing, gaussian_features, simulate_routing, starting_centroids

AFFINITIES = ["dot", "group_norm", "centered", "directional"]
CENTERED = ("centered", "directional")
WIDTH = 32
# One expert in a group of four and a mean of norm √d, so 1/σ is the ratio of mean to spread.
SETTING = {"groups": 4, "seeds": 60, "steps": 60, "mean": np.ones(WIDTH)}


def slow_run(features, centroids, affinity, center, rate):
    """One run, one step and one group after the other."""
    centroids, chosen = [list(map(float, centroid)) for centroid in centroids], []
    for h in features:
        if center is not None:
            h = [a - b for a, b in zip(h, center, strict=True)]
        if affinity == "directional":
            length = math.sqrt(sum(a * a for a in h))
            h = [a / length for a in h]
        logits = [sum(a * b for a, b in zip(h, centroid, strict=True)) for centroid in centroids]
        if affinity == "group_norm":
            logits = [logit / abs(logit) if logit else 0.0 for logit in logits]
        best = max(range(len(logits)), key=lambda i: logits[i])
        chosen.append(best)
        if affinity != "group_norm":
            score = 1 / (1 + math.exp(-logits[best]))
            centroids[best] = [e + rate * score * (1 - score) * a for e, a in zip(centroids[best], h, strict=True)]
    return chosen, centroids


@given(
    seed=seeds, runs=sizes, steps=sizes, groups=sizes, affinity=st.sampled_from(AFFINITIES), with_center=st.booleans()
)
def test_all_runs_at_once_are_each_run_step_by_step(seed, runs, steps, groups, affinity, with_center):
    rng = np.random.default_rng(seed)
    features, start = rng.standard_normal((runs, 4 * steps, 3)), rng.standard_normal((runs, groups, 3))
    center = rng.standard_normal(3) if with_center and affinity in CENTERED else None
    trace = follow_routing(features, start, affinity=affinity, center=center, learning_rate=1.5)
    for run in range(runs):
        chosen, centroids = slow_run(features[run], start[run], affinity, center, 1.5)
        assert trace.chosen[run].tolist() == chosen
        assert_close(trace.centroids[run], centroids, eps=2.0**-52, terms=8 * steps)


@given(seed=seeds, affinity=st.sampled_from(["dot", *CENTERED]))
def test_a_step_is_the_gradient_of_the_score_of_the_one_chosen_by_the_reference(seed, affinity):
    rng = np.random.default_rng(seed)
    feature, centroids, center = rng.standard_normal(3), rng.standard_normal((4, 3)), rng.standard_normal(3)
    center = center if affinity in CENTERED else None

    def score(group, centroid):
        moved = centroids.copy()
        moved[group] = centroid
        logit = reference.affinity_logits(feature, moved[:, None], affinity, center)[group, 0]
        return 1 / (1 + np.exp(-logit))

    logits = reference.affinity_logits(feature, centroids[:, None], affinity, center)[:, 0]
    best, h = int(logits.argmax()), 1e-5
    gradient = [(score(best, centroids[best] + e) - score(best, centroids[best] - e)) / (2 * h) for e in h * np.eye(3)]
    trace = follow_routing(feature[None, None], centroids[None], affinity=affinity, center=center, learning_rate=1.0)
    desired = centroids.copy()
    desired[best] += gradient
    assert trace.chosen.tolist() == [[best]]
    np.testing.assert_allclose(trace.centroids[0], desired, atol=1e-8)


# -- The theorem -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("covariance", [1e-2, 1e-3])
def test_a_large_mean_and_kaiming_centroids_give_nearly_everything_to_the_first_choice(covariance, seed):
    trace = simulate_routing("kaiming", covariance=covariance, seed=seed, **SETTING)
    assert np.mean(trace.share_of_first() > 0.95) > 0.95
    assert trace.entropy().mean() < 0.05


def test_a_compact_covariance_of_any_shape_collapses_too():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    covariance = 0.02 * (axes * rng.random(WIDTH)) @ axes.T
    trace = simulate_routing("kaiming", covariance=covariance, **SETTING)
    assert np.mean(trace.share_of_first() > 0.95) > 0.95


def test_the_feedback_collapses_what_would_not_collapse_without_it():
    frozen, trained = (
        simulate_routing("kaiming", covariance=0.25, learning_rate=rate, **SETTING).entropy().mean() for rate in (0, 1)
    )
    assert trained < 0.1 < 0.15 < frozen


def test_without_a_mean_the_load_stays_balanced():
    trace = simulate_routing("kaiming", covariance=1.0, **(SETTING | {"mean": np.zeros(WIDTH)}))
    assert trace.share_of_first().mean() < 0.4
    assert trace.entropy().mean() > 0.9


@pytest.mark.parametrize("covariance", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("affinity", CENTERED)
@pytest.mark.parametrize("start", ["balanced", "kaiming"])
def test_without_the_mean_in_the_logits_the_load_stays_balanced(start, affinity, covariance):
    trace = simulate_routing(start, affinity=affinity, covariance=covariance, **SETTING)
    assert trace.share_of_first().mean() < 0.4
    assert trace.entropy().mean() > 0.9


def test_data_aware_centroids_collapse_under_the_dot_product_too():
    assert simulate_routing("dai", covariance=1e-2, **SETTING).entropy().mean() < 0.15
    assert simulate_routing("dai", covariance=1e-3, **SETTING).entropy().mean() < 0.05


@pytest.mark.parametrize("covariance", [1.0, 1e-2])
def test_the_spread_of_data_aware_centroids_does_not_matter_to_the_dot_product(covariance):
    # h·e is common to all groups, and a scale of what is left does not change which is the largest.
    chosen = [
        simulate_routing("dai", covariance=covariance, scale=scale, learning_rate=0.0, **SETTING).chosen
        for scale in (0.125, 1.0, 16.0)
    ]
    np.testing.assert_array_equal(chosen[1], chosen[0])
    np.testing.assert_array_equal(chosen[2], chosen[0])


@given(seed=seeds)
def test_signs_move_nothing_and_choose_the_first_positive_product(seed):
    rng = np.random.default_rng(seed)
    features, start = rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 4, 3))
    trace = follow_routing(features, start, affinity="group_norm")
    np.testing.assert_array_equal(trace.centroids, start)
    positive = np.einsum("nsd,nkd->nsk", features, start) > 0
    np.testing.assert_array_equal(trace.chosen, positive.argmax(axis=2))


# -- What goes in and comes out ----------------------------------------------------------------------------------------


@given(seed=seeds, runs=sizes, steps=st.integers(1, 9), groups=sizes, window=st.integers(1, 10))
def test_loads_count_every_step_once(seed, runs, steps, groups, window):
    chosen = np.random.default_rng(seed).integers(0, groups, size=(runs, steps))
    trace = RoutingTrace(chosen, groups=groups, centroids=np.zeros((runs, groups, 1)))
    load = trace.load(window)
    assert load.shape == (runs, math.ceil(steps / window), groups)
    np.testing.assert_array_equal(load.sum(axis=1), [np.bincount(run, minlength=groups) for run in chosen])
    np.testing.assert_array_equal(load[:, 0].sum(axis=1), min(window, steps))
    np.testing.assert_array_equal(trace.load(1).argmax(axis=2), chosen)
    entropy = trace.entropy(window)
    assert entropy.shape == load.shape[:2]
    assert entropy[0, 0] == tucka.load_entropy(load[0, 0])
    assert ((trace.share_of_first() >= 0) & (trace.share_of_first() <= 1)).all()


def test_a_variance_may_be_one_number_one_for_each_component_or_a_matrix():
    sizes_of_draw = {"seeds": 2, "steps": 3, "seed": 0}
    draws = [
        gaussian_features(np.arange(3.0), covariance, **sizes_of_draw)
        for covariance in (4.0, np.full(3, 4.0), 4.0 * np.eye(3))
    ]
    np.testing.assert_allclose(draws[1], draws[0], rtol=1e-12)
    np.testing.assert_allclose(draws[2], draws[0], rtol=1e-12)


def test_features_have_the_mean_and_the_covariance_asked_for():
    covariance = np.array([[2.0, 1.0], [1.0, 1.0]])
    features = gaussian_features(np.array([3.0, -1.0]), covariance, seeds=40, steps=1000, seed=1).reshape(-1, 2)
    np.testing.assert_allclose(features.mean(axis=0), [3.0, -1.0], atol=0.05)
    np.testing.assert_allclose(np.cov(features.T), covariance, atol=0.05)


@pytest.mark.parametrize("start", ["kaiming", "dai", "balanced"])
def test_every_run_has_its_own_start_and_the_same_seed_the_same_runs(start):
    sample = gaussian_features(np.ones(4), 1.0, seeds=3, steps=8, seed=0)
    first, again = (starting_centroids(start, sample, groups=2, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (3, 2, 4)
    assert not np.isclose(first[0, 1], first[1, 1]).any()


def test_centroids_of_any_library_can_be_the_start(library):
    start = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    here = simulate_routing(start.astype(np.float64), mean=np.ones(4), steps=5)
    there = simulate_routing(library.from_numpy(start), mean=library.from_numpy(np.ones(4)), steps=5)
    np.testing.assert_array_equal(there.chosen, here.chosen)
    np.testing.assert_array_equal(there.centroids, here.centroids)


@pytest.mark.parametrize("affinity", CENTERED)
def test_a_simulation_subtracts_its_mean_where_the_affinity_has_a_centre(affinity):
    mean, start = np.array([3.0, -1.0, 2.0]), np.random.default_rng(0).standard_normal((2, 3, 3))
    simulated = simulate_routing(start, mean=mean, steps=5, affinity=affinity, seed=4)
    features = gaussian_features(mean, 1.0, seeds=2, steps=5, seed=4)
    followed = follow_routing(features, start, affinity=affinity, center=mean)
    np.testing.assert_array_equal(simulated.centroids, followed.centroids)


_START = np.zeros((2, 3, 4))
_WIDER = {"start": _START[..., :3], "seeds": 2, "groups": 3}


@pytest.mark.parametrize(
    ("changes", "error", "name", "words"),
    [
        ({"start": "uniform"}, tucka.ConfigError, "start", "'kaiming' | 'balanced' | 'uniform'"),
        ({"groups": None}, tucka.ConfigError, "groups", "at least 1 | None"),
        ({"seeds": 0}, tucka.ConfigError, "seeds", "at least 1 | 0"),
        ({"steps": 0}, tucka.ConfigError, "steps", "at least 1 | 0"),
        ({"seed": -1}, tucka.ConfigError, "seed", "at least 0 | -1"),
        ({"affinity": "cosine"}, tucka.ConfigError, "affinity", "'dot' | 'cosine'"),
        ({"learning_rate": -1.0}, tucka.ConfigError, "learning_rate", "negative | -1.0"),
        ({"learning_rate": math.nan}, tucka.ConfigError, "learning_rate", "finite | nan"),
        ({"mean": np.ones((2, 4))}, tucka.ShapeError, "mean", "(d) | (2, 4)"),
        ({"mean": np.full(4, np.nan)}, tucka.ConfigError, "mean", "finite"),
        ({"mean": "large"}, tucka.ArrayError, "mean", "array | str"),
        ({"covariance": -1.0}, tucka.ConfigError, "covariance", "negative | -1"),
        ({"covariance": np.ones(3)}, tucka.ShapeError, "covariance", "size 4 | mean | (3,)"),
        ({"covariance": np.triu(np.ones((4, 4)))}, tucka.ConfigError, "covariance", "symmetric"),
        ({"covariance": -np.eye(4)}, tucka.ConfigError, "covariance", "negative | -1"),
        ({"start": _START[0]}, tucka.ShapeError, "start", "(seeds, k, d) | (3, 4)"),
        ({"start": _START}, tucka.ShapeError, "start", "size 5 | seeds"),
        ({"start": _START, "seeds": 2}, tucka.ShapeError, "start", "size 7 | groups"),
        (_WIDER, tucka.ShapeError, "start", "size 4 | mean"),
    ],
)
def test_a_simulation_that_cannot_be_names_argument_rule_and_value(changes, error, name, words):
    setting = {"start": "kaiming", "mean": np.ones(4), "groups": 7, "seeds": 5, "steps": 3} | changes
    with refused(error, name, words):
        simulate_routing(setting.pop("start"), **setting)


@pytest.mark.parametrize(
    ("changes", "error", "name", "words"),
    [
        ({"centroids": np.ones((3, 3, 4))}, tucka.ShapeError, "centroids", "size 2 | features | (3, 3, 4)"),
        ({"center": np.ones(4)}, tucka.ConfigError, "center", "None | 'dot'"),
        ({"center": np.ones(3), "affinity": "centered"}, tucka.ShapeError, "center", "size 4 | features"),
    ],
)
def test_features_centroids_and_centre_must_fit_each_other(changes, error, name, words):
    given = {"features": np.ones((2, 3, 4)), "centroids": np.ones((2, 3, 4))} | changes
    with refused(error, name, words):
        follow_routing(given.pop("features"), given.pop("centroids"), **given)


def test_a_window_must_be_a_number_of_steps():
    trace = simulate_routing("kaiming", mean=np.ones(4), groups=2, seeds=1, steps=3)
    with refused(tucka.ConfigError, "window", "at least 1 | 0"):
        trace.entropy(0)
