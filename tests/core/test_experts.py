"""Tucker experts: what they stand for, how they are applied, and that they are a value."""

import copy
import dataclasses
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tucka
from support.array_backends import PRECISION
from support.close import assert_close, largest
from support.strategies import arrays, factors, few_specs, leads, seeds, specs, tucker_parts
from tucka import reference
from tucka.arrays import cast


def experts_of(library, parts):
    return tucka.TuckerExperts(*map(library.from_numpy, parts.all))


def dense(parts, group):
    """All experts of one group, by the reference."""
    return np.array([reference.expert(*parts.all, group, index) for index in range(parts.gate_shape[1])])


def tolerance(library, parts, *operands):
    bound = largest(parts.cores, parts.expert_factor, parts.basis, parts.basis, *operands)
    return {"eps": library.eps, "terms": parts.terms, "scale": bound}


@given(parts=tucker_parts())
def test_a_group_is_the_stack_of_the_references_experts(library, parts):
    experts = experts_of(library, parts)
    for group in range(experts.groups):
        actual = library.to_numpy(experts.to_tensor(group))
        assert_close(actual, dense(parts, group), **tolerance(library, parts))


@given(parts=tucker_parts())
def test_the_slices_of_a_group_are_its_experts(library, parts):
    experts = experts_of(library, parts)
    for group in range(experts.groups):
        tensor = library.to_numpy(experts.to_tensor(group))
        slices = [library.to_numpy(experts.expert(group, index)) for index in range(experts.experts_per_group)]
        assert_close(np.array(slices), tensor, **tolerance(library, parts))


@given(parts=tucker_parts())
def test_the_last_group_and_expert_are_minus_one(library, parts):
    experts = experts_of(library, parts)
    by_sign = library.to_numpy(experts.expert(-1, -1))
    by_count = library.to_numpy(experts.expert(experts.groups - 1, experts.experts_per_group - 1))
    np.testing.assert_array_equal(by_sign, by_count)


@given(parts=tucker_parts(), data=st.data(), alpha=factors)
def test_applying_equals_the_dense_product_for_every_alignment_of_gates(library, parts, data, alpha):
    rows = data.draw(leads)
    gates = data.draw(arrays(*rows[: data.draw(st.integers(0, len(rows)))], *parts.gate_shape))
    x = data.draw(arrays(*rows, parts.width))
    applied = experts_of(library, parts).apply(library.from_numpy(x), library.from_numpy(gates), alpha=alpha)
    desired = reference.adapt(x, gates, *parts.all, alpha=alpha)
    assert_close(library.to_numpy(applied), desired, **tolerance(library, parts, x, gates, np.array(alpha)))


@given(parts=tucker_parts(), data=st.data(), alpha=factors)
def test_the_scale_may_be_an_array_without_axes(library, parts, data, alpha):
    x, gates = data.draw(arrays(2, parts.width)), data.draw(arrays(*parts.gate_shape))
    experts, scale = experts_of(library, parts), library.from_numpy(np.array(alpha, dtype=x.dtype))
    applied = experts.apply(library.from_numpy(x), library.from_numpy(gates), alpha=scale)
    desired = reference.adapt(x, gates, *parts.all, alpha=alpha)
    assert_close(library.to_numpy(applied), desired, **tolerance(library, parts, x, gates, np.array(alpha)))


@given(parts=tucker_parts(), data=st.data())
def test_repeating_gates_over_the_axes_of_x_changes_nothing(library, parts, data):
    experts, x = experts_of(library, parts), data.draw(arrays(2, 3, parts.width))
    gates = data.draw(arrays(*parts.gate_shape))
    to = library.from_numpy
    alignments = [gates, np.tile(gates, (2, 1, 1)), np.tile(gates, (2, 3, 1, 1))]
    batch, sample, token = (library.to_numpy(experts.apply(to(x), to(aligned))) for aligned in alignments)
    assert_close(sample, batch, **tolerance(library, parts, x, gates))
    assert_close(token, batch, **tolerance(library, parts, x, gates))


@given(parts=tucker_parts(), data=st.data(), a=factors, b=factors)
def test_mixing_is_linear_in_gates_cores_and_expert_factor(library, parts, data, a, b):
    gates = data.draw(arrays(*parts.gate_shape))
    operands = [gates, parts.cores, parts.expert_factor]

    def mixture(gates, cores, expert_factor):
        experts = tucka.TuckerExperts(*map(library.from_numpy, (cores, expert_factor, parts.basis)))
        return library.to_numpy(experts.mix(library.from_numpy(gates)))

    for place, operand in enumerate(operands):
        other = data.draw(arrays(*operand.shape))
        combined = mixture(*operands[:place], a * operand + b * other, *operands[place + 1 :])
        separate = a * mixture(*operands) + b * mixture(*operands[:place], other, *operands[place + 1 :])
        assert_close(combined, separate, eps=library.eps, terms=parts.terms, scale=6 * 4**3)


@given(parts=tucker_parts(), data=st.data())
def test_one_hot_gates_pick_one_expert(library, parts, data):
    group, index = (data.draw(st.integers(0, size - 1)) for size in parts.gate_shape)
    gates = np.zeros(parts.gate_shape)
    gates[group, index] = 1.0
    x, experts = data.draw(arrays(3, parts.width)), experts_of(library, parts)
    applied = library.to_numpy(experts.apply(library.from_numpy(x), library.from_numpy(gates)))
    desired = x + x @ library.to_numpy(experts.expert(group, index))
    assert_close(applied, desired, **tolerance(library, parts, x))


@given(parts=tucker_parts(), data=st.data())
def test_renaming_groups_and_experts_changes_nothing(library, parts, data):
    groups, experts = (data.draw(st.permutations(range(size))) for size in parts.gate_shape)
    gates, x = data.draw(arrays(2, *parts.gate_shape)), data.draw(arrays(2, 3, parts.width))
    renamed = dataclasses.replace(parts, cores=parts.cores[groups], expert_factor=parts.expert_factor[experts])
    to = library.from_numpy
    before = experts_of(library, parts).apply(to(x), to(gates))
    after = experts_of(library, renamed).apply(to(x), to(gates[:, groups][:, :, experts]))
    assert_close(library.to_numpy(after), library.to_numpy(before), **tolerance(library, parts, x, gates))


@given(parts=tucker_parts(), seed=seeds)
def test_turning_the_basis_and_the_cores_together_changes_nothing(library, parts, seed):
    rank = parts.basis.shape[1]
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((rank, rank)))[0]
    turned = dataclasses.replace(parts, cores=turn.T @ parts.cores @ turn, basis=parts.basis @ turn)
    before, after = (library.to_numpy(experts_of(library, each).to_tensor(0)) for each in (parts, turned))
    close = tolerance(library, parts)
    assert_close(after, before, **(close | {"scale": close["scale"] * rank**2}))


@given(parts=tucker_parts())
def test_the_parameters_are_counted_by_the_sizes_of_the_arrays(library, parts):
    assert experts_of(library, parts).n_parameters == sum(part.size for part in parts.all)


@given(parts=tucker_parts())
def test_zero_cores_leave_activations_bit_for_bit(library, parts):
    x = library.from_numpy(np.linspace(-3, 3, 2 * parts.width).reshape(2, parts.width))
    experts = experts_of(library, dataclasses.replace(parts, cores=parts.cores * 0))
    applied = experts.apply(x, library.from_numpy(np.ones(parts.gate_shape)))
    np.testing.assert_array_equal(library.to_numpy(applied), library.to_numpy(x))


@given(parts=tucker_parts())
def test_the_norm_is_that_of_the_dense_tensor(library, parts):
    experts = experts_of(library, parts)
    for group in range(experts.groups):
        desired = np.linalg.norm(dense(parts, group))
        assert_close(library.to_numpy(experts.norm(group)), desired, **tolerance(library, parts))


@given(spec=few_specs, data=st.data())
def test_the_inner_product_is_that_of_the_dense_tensors_also_where_ranks_and_bases_differ(library, spec, data):
    parts = data.draw(tucker_parts(spec))
    width, experts = parts.width, parts.gate_shape[1]
    other = dataclasses.replace(
        parts,
        cores=data.draw(arrays(2, 3, 2, 2)),
        expert_factor=data.draw(arrays(experts, 3)),
        basis=data.draw(arrays(width, 2)),
    )
    actual = experts_of(library, parts).inner(experts_of(library, other), 0, 1)
    close = tolerance(library, parts, *other.all, other.basis)
    close["terms"] *= other.terms
    assert_close(library.to_numpy(actual), np.sum(dense(parts, 0) * dense(other, 1)), **close)


@given(parts=tucker_parts())
def test_the_inner_product_of_a_group_with_itself_is_its_squared_norm(library, parts):
    experts = experts_of(library, parts)
    norm = library.to_numpy(experts.norm(-1))
    close = tolerance(library, parts, *parts.all, parts.basis)
    close["terms"] *= parts.terms
    assert_close(library.to_numpy(experts.inner(experts, -1, -1)), norm**2, **close)


def test_a_norm_that_vanishes_by_cancellation_vanishes_to_rounding(library):
    # Two equal columns and a core that cancels them: the root of an inner product is off by the root of eps.
    column = np.linspace(0.1, 0.7, 5)
    core = np.diag([1.0, -1.0])
    parts = (core[None, None], np.ones((1, 1)), np.stack([column, column], axis=1))
    experts = tucka.TuckerExperts(*map(library.from_numpy, parts))
    assert float(library.to_numpy(experts.norm(0))) < 8 * library.eps


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_norm_neither_overflows_nor_vanishes_on_its_way(library, size):
    parts = (np.full((1, 1, 2, 2), size), np.ones((2, 1)), np.eye(3)[:, :2])
    experts = tucka.TuckerExperts(*map(library.from_numpy, parts))
    np.testing.assert_allclose(float(library.to_numpy(experts.norm(0))), size * 8**0.5, rtol=1e-6)


@given(parts=tucker_parts())
def test_a_group_handed_to_tensorly_stands_for_the_same_tensor(library, parts):
    group = experts_of(library, parts).group(-1)
    assert group.rank == parts.cores.shape[1:]
    assert group.shape == (parts.gate_shape[1], parts.width, parts.width)
    core, factors = group
    product = library.to_numpy(tucka.multi_mode_product(core, factors))
    assert_close(product, dense(parts, -1), **tolerance(library, parts))


def test_a_group_of_numpy_arrays_is_reconstructed_by_tensorly():
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal(shape) for shape in ((2, 3, 4, 4), (5, 3), (6, 4))]
    experts = tucka.TuckerExperts(*parts)
    np.testing.assert_allclose(experts.group(1).to_tensor(), experts.to_tensor(1), atol=1e-12)


def test_applying_never_forms_a_square_of_the_width():
    width, rank, rows = 1_000_000, 4, 3
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal(shape) for shape in ((2, 2, rank, rank), (2, 2), (width, rank))]
    experts, x, gates = tucka.TuckerExperts(*parts), rng.standard_normal((rows, width)), np.full((2, 2), 0.25)
    tracemalloc.start()
    applied, norm, inner = experts.apply(x, gates), experts.norm(0), experts.inner(experts, 0, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A few times what goes in and comes out; a d×d matrix takes 8 terabytes.
    assert peak < 4 * (x.nbytes + parts[2].nbytes)
    assert applied.shape == x.shape
    assert np.isfinite([norm, inner]).all()


def test_gates_for_each_row_form_no_core_for_each_row():
    rank, rows = 128, 500
    parts = [np.ones(shape) for shape in ((1, 1, rank, rank), (1, 1), (rank, rank))]
    experts, x, gates = tucka.TuckerExperts(*parts), np.ones((rows, rank)), np.ones((rows, 1, 1))
    tracemalloc.start()
    applied = experts.apply(x, gates)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * x.nbytes
    assert applied[0, 0] == 1 + rank**3


# --- from_spec


@given(spec=specs(), extra=st.integers(0, 3), seed=seeds)
def test_experts_of_a_spec_have_its_sizes_and_an_orthonormal_basis(spec, extra, seed):
    width = spec.rank + extra
    experts = tucka.TuckerExperts.from_spec(spec, width, seed=seed)
    assert experts.cores.shape == (spec.groups, spec.expert_rank, spec.rank, spec.rank)
    assert experts.expert_factor.shape == (spec.experts_per_group, spec.expert_rank)
    assert experts.basis.shape == (width, spec.rank)
    assert_close(experts.basis.T @ experts.basis, np.eye(spec.rank), eps=2.0**-52, terms=width)


@given(seed=seeds)
def test_a_seed_gives_the_same_experts_on_every_backend_in_its_dtype(library, seed):
    spec = tucka.TuckerSpec(rank=3, groups=2)
    plain = tucka.TuckerExperts.from_spec(spec, 5, seed=seed)
    for name, dtype in library.dtypes.items():
        like = cast(library.from_numpy(np.zeros(1)), dtype)
        made = tucka.TuckerExperts.from_spec(spec, 5, seed=seed, like=like)
        for field in dataclasses.fields(made):
            part = getattr(made, field.name)
            assert part.dtype == like.dtype
            assert_close(library.to_numpy(part), getattr(plain, field.name), eps=PRECISION[name])


def test_another_seed_gives_other_experts():
    first, second = (tucka.TuckerExperts.from_spec(tucka.TuckerSpec(), 16, seed=seed) for seed in (0, 1))
    for field in dataclasses.fields(first):
        assert not np.isclose(getattr(first, field.name), getattr(second, field.name)).any()


def test_an_expert_of_a_spec_is_about_as_large_as_a_projection_on_its_basis():
    spec = tucka.TuckerSpec(rank=64, groups=2, experts_per_group=4, expert_rank=4)
    experts = tucka.TuckerExperts.from_spec(spec, 256, seed=0)
    sizes = [np.linalg.norm(experts.expert(i, j)) for i in range(2) for j in range(4)]
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(sizes))), 64**0.5, rtol=0.25)


# --- a value


def one_set_of_experts(library):
    return tucka.TuckerExperts(*(library.from_numpy(np.ones(shape)) for shape in ((3, 2, 4, 4), (5, 2), (6, 4))))


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda experts: pickle.loads(pickle.dumps(experts)),
    "replace": dataclasses.replace,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_holds_the_same_values(library, how):
    experts = one_set_of_experts(library)
    copied = COPIES[how](experts)
    assert type(copied) is tucka.TuckerExperts
    assert copied is not experts
    for field in dataclasses.fields(experts):
        original = library.to_numpy(getattr(experts, field.name))
        np.testing.assert_array_equal(library.to_numpy(getattr(copied, field.name)), original)


def test_a_part_cannot_be_replaced_in_place(library):
    experts = one_set_of_experts(library)
    with pytest.raises(dataclasses.FrozenInstanceError):
        experts.basis = experts.basis


def test_the_repr_shows_shapes(library):
    shown = repr(one_set_of_experts(library))
    assert shown == "TuckerExperts(cores=(3, 2, 4, 4), expert_factor=(5, 2), basis=(6, 4))"


def test_rows_with_gates_of_their_own_are_adapted_in_the_order_that_writes_less(monkeypatch):
    asked = []
    monkeypatch.setattr("tucka.core.experts.mixes_each_row", lambda *sizes: asked.append(sizes))
    experts = tucka.TuckerExperts(np.ones((5, 2, 3, 3)), np.ones((4, 2)), np.ones((6, 3)))
    experts.apply(np.ones((7, 6)), np.ones((7, 5, 4)), alpha=1.0)
    assert asked == [(3, 5 * 2)]
