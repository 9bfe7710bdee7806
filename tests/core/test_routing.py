"""From hidden states to gates: features, logits, the choice of a group."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tucka
from support.close import assert_close
from support.refusals import refused
from support.strategies import arrays, features_and_centroids, gate_shapes, hidden_and_mask, logits, numbers
from tucka import reference

ROUTINGS = ["batch", "sample", "token"]
AFFINITIES = ["dot", "group_norm", "centered", "directional"]
WITH_CENTER = ["centered", "directional"]


# --- routing_feature


def feature_of(library, hidden, mask=None, routing="batch"):
    mask = None if mask is None else library.from_numpy(mask)
    return library.to_numpy(tucka.routing_feature(library.from_numpy(hidden), mask=mask, routing=routing))


@pytest.mark.each_value
@pytest.mark.parametrize("routing", ROUTINGS)
@given(case=hidden_and_mask())
def test_a_feature_equals_the_reference(library, routing, case):
    hidden, mask = case
    desired = reference.routing_feature(hidden, mask, routing)
    assert_close(feature_of(library, hidden, mask, routing), desired, eps=library.eps, terms=hidden.size)


@given(case=hidden_and_mask())
def test_the_batchs_feature_is_the_mean_of_the_samples_that_have_tokens(library, case):
    hidden, mask = case
    samples = feature_of(library, hidden, mask, "sample")
    present = np.ones(len(hidden), bool) if mask is None else mask.any(axis=1)
    desired = samples[present].mean(axis=0) if present.any() else np.zeros(hidden.shape[-1])
    assert_close(feature_of(library, hidden, mask), desired, eps=library.eps, terms=hidden.size)


@given(case=hidden_and_mask(masked=True), junk=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_what_masked_places_hold_has_no_influence(library, case, junk):
    hidden, mask = case
    dirty = np.where(mask[..., None] == 0, junk, hidden)
    for routing in ("batch", "sample"):
        clean = feature_of(library, hidden, mask, routing)
        np.testing.assert_array_equal(feature_of(library, dirty, mask, routing), clean)


@given(data=st.data())
def test_padding_on_either_side_has_no_influence(library, data):
    hidden, mask = data.draw(arrays(3, 2, 2)), np.array([[1, 1], [0, 1], [0, 0]])
    left, right = ((0, 0), (2, 0)), ((0, 0), (0, 2))
    plain = feature_of(library, hidden, mask)
    for padding in (left, right):
        padded = feature_of(library, np.pad(hidden, (*padding, (0, 0)), constant_values=9.0), np.pad(mask, padding))
        assert_close(padded, plain, eps=library.eps, terms=hidden.size)


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
def test_a_mask_may_be_of_any_kind_of_number(library, dtype):
    hidden = np.arange(12.0).reshape(2, 3, 2)
    mask = np.array([[0, 1, 1], [1, 0, 0]])
    desired = reference.routing_feature(hidden, mask, "batch")
    assert_close(feature_of(library, hidden, mask.astype(dtype)), desired, eps=library.eps, scale=12)


@given(case=hidden_and_mask(), data=st.data())
def test_the_order_of_samples_and_tokens_has_no_influence(library, case, data):
    hidden, mask = case
    rows, places = (data.draw(st.permutations(range(size))) for size in hidden.shape[:2])
    shuffled = feature_of(library, hidden[rows][:, places], None if mask is None else mask[rows][:, places])
    assert_close(shuffled, feature_of(library, hidden, mask), eps=library.eps, terms=hidden.size)


def test_a_long_text_counts_as_much_as_a_short_one(library):
    hidden, mask = np.array([[[0.0], [0.0], [0.0]], [[1.0], [9.0], [9.0]]]), np.array([[1, 1, 1], [1, 0, 0]])
    np.testing.assert_array_equal(feature_of(library, hidden, mask), [0.5])


@given(data=st.data())
def test_plain_vectors_are_samples_of_one_token(library, data):
    vectors = data.draw(arrays(3, 4))
    np.testing.assert_array_equal(feature_of(library, vectors, routing="sample"), vectors)
    np.testing.assert_array_equal(feature_of(library, vectors), feature_of(library, vectors[:, None]))


@given(data=st.data())
def test_all_axes_between_sample_and_width_are_tokens(library, data):
    images = data.draw(arrays(2, 2, 3, 4))
    by_axes, by_tokens = (feature_of(library, hidden) for hidden in (images, images.reshape(2, 6, 4)))
    np.testing.assert_array_equal(by_axes, by_tokens)


def test_a_batch_without_tokens_has_the_feature_zero(library):
    for routing in ("batch", "sample"):
        feature = feature_of(library, np.ones((2, 3, 4)), np.zeros((2, 3)), routing)
        np.testing.assert_array_equal(feature, np.zeros_like(feature))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_in_unmasked_places_propagate(library, value):
    hidden = np.ones((2, 2, 3))
    hidden[0, 1, 2] = value
    np.testing.assert_array_equal(feature_of(library, hidden), [1, 1, value])
    np.testing.assert_array_equal(feature_of(library, hidden, np.ones((2, 2))), [1, 1, value])


# --- affinity_logits


def logits_of(library, feature, centroids, affinity="dot", center=None, **options):
    to = library.from_numpy
    center = None if center is None else to(center)
    return library.to_numpy(
        tucka.affinity_logits(to(feature), to(centroids), affinity=affinity, center=center, **options)
    )


@pytest.mark.each_value
@pytest.mark.parametrize("affinity", AFFINITIES)
@given(case=features_and_centroids(), temperature=st.sampled_from([1.0, 0.7, 5.0]))
def test_logits_equal_the_reference(library, affinity, case, temperature):
    feature, centroids, center = case
    center = center if affinity in WITH_CENTER else None
    desired = reference.affinity_logits(feature, centroids, affinity, center, temperature)
    actual = logits_of(library, feature, centroids, affinity, center, temperature=temperature)
    assert_close(actual, desired, eps=library.eps, terms=4, scale=64)


@pytest.mark.each_value
@pytest.mark.parametrize("affinity", AFFINITIES)
@given(case=features_and_centroids(), data=st.data())
def test_logits_of_many_features_are_those_of_each(library, affinity, case, data):
    _, centroids, _ = case
    features = data.draw(arrays(2, 2, centroids.shape[-1]))
    together = logits_of(library, features, centroids, affinity)
    assert together.shape == (2, 2, *centroids.shape[:2])
    each = [[logits_of(library, feature, centroids, affinity) for feature in row] for row in features]
    assert_close(together, np.array(each), eps=library.eps, terms=4, scale=16)


@pytest.mark.each_value
@pytest.mark.parametrize("affinity", AFFINITIES)
@given(case=features_and_centroids(), data=st.data())
def test_renaming_groups_and_experts_renames_the_logits(library, affinity, case, data):
    feature, centroids, _ = case
    groups, experts = (data.draw(st.permutations(range(size))) for size in centroids.shape[:2])
    renamed = logits_of(library, feature, centroids[groups][:, experts], affinity)
    desired = logits_of(library, feature, centroids, affinity)[groups][:, experts]
    assert_close(renamed, desired, eps=library.eps, terms=4, scale=16)


scales = st.sampled_from([2.0**-20, 0.3, 7.0, 2.0**20])
# Squares of such features are outside of float32, in which JAX computes.
far_scales = st.sampled_from([2.0**-83, 1e-25, 1e-19, 1e19, 1e25, 2.0**83])


@pytest.mark.each_value
@pytest.mark.parametrize("affinity", ["group_norm", "directional"])
@given(case=features_and_centroids(), scale=scales)
def test_normalised_logits_do_not_depend_on_the_scale_of_the_features(library, affinity, case, scale):
    feature, centroids, _ = case
    scaled, plain = (logits_of(library, factor * feature, centroids, affinity) for factor in (scale, 1.0))
    # Near a dot product of zero only rounding is left, so the tolerance grows where the products cancel.
    dot = reference.affinity_logits(feature, centroids, "dot")
    norm = np.linalg.norm(dot, axis=-1)[np.linalg.norm(dot, axis=-1) > 0].min(initial=1.0)
    assert_close(scaled, plain, eps=library.eps, terms=4, scale=64 / min(norm, 1.0))


@pytest.mark.each_value
@pytest.mark.parametrize("affinity", ["group_norm", "directional"])
@given(case=features_and_centroids(), feature_scale=far_scales, centroid_scale=st.sampled_from([1e-10, 1.0, 1e10]))
def test_normalised_logits_of_very_small_or_large_features_equal_the_reference(
    library, affinity, case, feature_scale, centroid_scale
):
    feature, centroids, center = case
    center = center if affinity in WITH_CENTER else None
    # Both sides see the same float32 numbers.
    single = [None if each is None else np.float32(each) for each in (feature, centroids, center)]
    scaled = [None if each is None else each * np.float32(feature_scale) for each in single]
    scaled[1] = single[1] * np.float32(centroid_scale)
    wide = [None if each is None else each.astype(np.float64) for each in scaled]
    desired = reference.affinity_logits(wide[0], wide[1], affinity, wide[2])
    actual = logits_of(library, *scaled[:2], affinity, scaled[2])
    # Where products cancel, only their rounding is left.
    dot = reference.affinity_logits(feature, centroids, "dot")
    norm = np.linalg.norm(dot, axis=-1)[np.linalg.norm(dot, axis=-1) > 0].min(initial=1.0)
    size = centroid_scale if affinity == "directional" else 1.0
    assert_close(actual / size, desired / size, eps=2.0**-23, terms=4, scale=64 / min(norm, 1.0))


@pytest.mark.parametrize("affinity", ["dot", "centered"])
@given(case=features_and_centroids(), scale=scales)
def test_other_logits_grow_with_the_features(library, affinity, case, scale):
    feature, centroids, _ = case
    scaled, plain = (logits_of(library, factor * feature, centroids, affinity) for factor in (scale, 1.0))
    assert_close(scaled / scale, plain, eps=library.eps, terms=4, scale=64)


@pytest.mark.each_value
@pytest.mark.parametrize("affinity", WITH_CENTER)
@given(case=features_and_centroids(), data=st.data())
def test_moving_features_and_center_together_changes_nothing(library, affinity, case, data):
    feature, centroids, center = case
    shift = data.draw(arrays(*center.shape))
    moved = logits_of(library, feature + shift, centroids, affinity, center + shift)
    # The numbers are multiples of a power of two: sums are exact, so nothing at all may change.
    np.testing.assert_array_equal(moved, logits_of(library, feature, centroids, affinity, center))


@given(case=features_and_centroids(), data=st.data())
def test_moving_all_centroids_adds_the_same_to_every_dot_product(library, case, data):
    feature, centroids, _ = case
    shift = data.draw(arrays(*feature.shape))
    moved = logits_of(library, feature, centroids + shift)
    desired = logits_of(library, feature, centroids) + feature @ shift
    assert_close(moved, desired, eps=library.eps, terms=8, scale=64)


@pytest.mark.each_value
@pytest.mark.parametrize("affinity", AFFINITIES)
@given(case=features_and_centroids())
def test_the_temperature_divides_the_logits(library, affinity, case):
    feature, centroids, _ = case
    hot, plain = (logits_of(library, feature, centroids, affinity, temperature=each) for each in (4.0, 1.0))
    np.testing.assert_array_equal(hot * 4.0, plain)


@pytest.mark.parametrize("affinity", WITH_CENTER)
@given(case=features_and_centroids(), scale=st.sampled_from([2.0**-10, 0.5, 2.0**10]))
def test_scaling_features_and_center_together_scales_centred_logits_and_leaves_directional_ones(
    library, affinity, case, scale
):
    feature, centroids, center = case
    scaled = logits_of(library, scale * feature, centroids, affinity, scale * center)
    plain = logits_of(library, feature, centroids, affinity, center)
    # A power of two scales all of the arithmetic exactly; a square root may round differently.
    factor = scale if affinity == "centered" else 1.0
    assert_close(scaled / factor, plain, eps=library.eps, terms=4, scale=64)


@pytest.mark.each_value
@pytest.mark.parametrize("affinity", AFFINITIES)
@given(case=features_and_centroids(), temperature=st.sampled_from([0.01, 3.0, 100.0]))
def test_the_temperature_changes_gates_and_never_the_choice(library, affinity, case, temperature):
    feature, centroids, _ = case
    logits = logits_of(library, feature, centroids, affinity)
    at = logits_of(library, feature, centroids, affinity, temperature=temperature)
    best = np.sort(logits.max(axis=1))[::-1]
    if len(best) == 1 or best[0] - best[1] > 1e-4 * max(1, abs(best[0])):
        plain, changed = (gates_of(library, np.asarray(values, np.float64)) for values in (logits, at))
        assert plain.any(axis=1).argmax() == changed.any(axis=1).argmax()


@pytest.mark.parametrize("affinity", ["dot", "group_norm"])
def test_without_a_centre_a_shift_of_the_features_can_change_the_choice(library, affinity):
    centroids = np.array([[[1.0, 0.0], [0.5, 0.5]], [[-1.0, 0.0], [-0.2, 0.5]]])
    chosen = []
    for shift in (0.0, -4.0):
        logits = logits_of(library, np.array([1.0 + shift, 0.0]), centroids, affinity)
        chosen.append(int(logits.max(axis=1).argmax()))
    assert chosen == [0, 1]


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_a_feature_of_zero_has_logits_of_zero(library, affinity):
    np.testing.assert_array_equal(logits_of(library, np.zeros(3), np.ones((2, 2, 3)), affinity), np.zeros((2, 2)))


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_a_nan_in_a_feature_reaches_every_logit(library, affinity):
    assert np.isnan(logits_of(library, np.array([1.0, np.nan]), np.ones((2, 2, 2)), affinity)).all()


# --- select_gates


def gates_of(library, values, **options):
    return library.to_numpy(tucka.select_gates(library.from_numpy(values), **options))


@pytest.mark.each_value
@pytest.mark.parametrize("gate_norm", [True, False])
@given(values=logits())
def test_gates_equal_the_reference(library, gate_norm, values):
    desired = reference.select_gates(values, gate_norm)
    assert_close(gates_of(library, values, gate_norm=gate_norm), desired, eps=library.eps, terms=8)


@pytest.mark.each_value
@pytest.mark.parametrize("gate_norm", [True, False])
@given(values=logits(), data=st.data())
def test_gates_with_a_bias_equal_the_reference(library, gate_norm, values, data):
    bias = data.draw(arrays(len(values)))
    desired = reference.select_gates(values, gate_norm, bias)
    actual = gates_of(library, values, gate_norm=gate_norm, bias=library.from_numpy(bias))
    assert_close(actual, desired, eps=library.eps, terms=8)


@given(values=logits(), group=st.integers(0, 2))
def test_a_bias_moves_the_choice_and_leaves_the_gates_of_the_chosen_group(library, values, group):
    group %= len(values)
    bias = np.zeros(len(values))
    bias[group] = 100.0
    gates = gates_of(library, values, bias=library.from_numpy(bias))
    alone = gates_of(library, values[group : group + 1])
    assert_close(gates[group], alone[0], eps=library.eps, terms=8)
    np.testing.assert_array_equal(np.delete(gates, group, axis=0), 0)


def test_a_bias_needs_one_number_for_each_group(library):
    with refused(tucka.ShapeError, "bias", "size 3 | (2,)"):
        gates_of(library, np.zeros((3, 2)), bias=library.from_numpy(np.zeros(2)))


@given(values=arrays(2, 2, 3, 2))
def test_gates_of_many_decisions_are_those_of_each(library, values):
    together = gates_of(library, values)
    each = np.array([[reference.select_gates(decision) for decision in row] for row in values])
    assert_close(together, each, eps=library.eps, terms=8)


@given(values=logits())
def test_gates_sum_to_one_and_vanish_outside_the_group_with_the_highest_logit(library, values):
    gates = gates_of(library, values)
    chosen = int(values.max(axis=1).argmax())  # NumPy's argmax takes the first of several
    assert_close(gates[chosen].sum(), np.ones(()), eps=library.eps, terms=8)
    assert np.all(gates[chosen] > 0)
    np.testing.assert_array_equal(np.delete(gates, chosen, axis=0), 0)


@given(values=logits())
def test_raw_gates_are_the_sigmoids_of_the_chosen_group(library, values):
    gates = gates_of(library, values, gate_norm=False)
    chosen = int(values.max(axis=1).argmax())
    assert_close(gates[chosen], 1 / (1 + np.exp(-values[chosen])), eps=library.eps)


@given(values=logits(ties=False), data=st.data())
def test_renaming_groups_and_experts_renames_the_gates(library, values, data):
    groups, experts = (data.draw(st.permutations(range(size))) for size in values.shape)
    renamed = gates_of(library, values[groups][:, experts])
    assert_close(renamed, gates_of(library, values)[groups][:, experts], eps=library.eps, terms=8)


@given(value=numbers, shape=gate_shapes)
def test_of_equal_logits_the_first_group_wins(library, value, shape):
    desired = np.zeros(shape)
    desired[0] = 1 / shape[1]
    assert_close(gates_of(library, np.full(shape, value)), desired, eps=library.eps)


@given(values=arrays(3, 1))
def test_one_expert_in_a_group_gets_all(library, values):
    np.testing.assert_array_equal(np.sort(gates_of(library, values), axis=None), [0.0, 0.0, 1.0])


@pytest.mark.each_value
@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("gate_norm", [True, False])
@given(values=logits(ties=False))
def test_saturating_logits_still_choose_right_and_stay_finite(library, size, gate_norm, values):
    chosen = int(values.max(axis=1).argmax())
    gates = gates_of(library, values * size, gate_norm=gate_norm)
    assert np.isfinite(gates).all()
    np.testing.assert_array_equal(np.delete(gates, chosen, axis=0), 0)
    if gate_norm:
        assert_close(gates[chosen].sum(), np.ones(()), eps=library.eps, terms=8)


def test_scores_that_round_to_one_do_not_hide_the_highest_logit(library):
    # In float32 both sigmoids are exactly 1.
    np.testing.assert_array_equal(gates_of(library, np.array([[40.0], [41.0], [0.0]])), [[0.0], [1.0], [0.0]])


def test_a_logit_of_minus_infinity_excludes_an_expert(library):
    values = np.array([[-np.inf, 1.0], [-np.inf, -np.inf], [0.0, 0.0]])
    np.testing.assert_array_equal(gates_of(library, values), [[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])


@pytest.mark.parametrize(("gate_norm", "rest"), [(True, np.nan), (False, 0.5)])
def test_the_first_group_with_a_nan_is_chosen_and_shows_it(library, gate_norm, rest):
    gates = gates_of(library, np.array([[9.0, 9.0], [0.0, np.nan], [np.nan, 0.0]]), gate_norm=gate_norm)
    np.testing.assert_array_equal(gates, [[0.0, 0.0], [rest, np.nan], [0.0, 0.0]])


def test_no_decisions_give_no_gates(library):
    assert gates_of(library, np.zeros((0, 2, 3))).shape == (0, 2, 3)
