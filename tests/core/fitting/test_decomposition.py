"""Fitting Tucker experts to given matrices, and compressing them."""

import copy
import pickle
import threading

import numpy as np
import pytest
import tensorly
from hypothesis import given, settings
from hypothesis import strategies as st

import tucka
from support.array_backends import PRECISION, dtype_name
from support.close import assert_close
from support.refusals import refused
from support.strategies import arrays, few_specs, seeds, sizes, tucker_parts
from tucka import reference

stack_shapes = st.sampled_from([(1, 1, 1, 1), (1, 2, 3, 3), (2, 2, 3, 3), (3, 1, 4, 4), (1, 4, 2, 2), (2, 3, 5, 5)])


# The arithmetic is NumPy's for all libraries: what differs between them needs few examples.
few = settings(max_examples=8)
small_shapes = st.sampled_from([(1, 2, 3, 3), (2, 2, 3, 3), (2, 1, 4, 4), (1, 3, 2, 2)])


@st.composite
def stacks(draw, shapes=stack_shapes):
    """Stacks of matrices: structured ones with ties and zeros, and random ones without."""
    shape = draw(shapes)
    if draw(st.booleans()):
        return draw(arrays(*shape))
    return np.random.default_rng(draw(seeds)).standard_normal(shape)


def tensors(library, experts):
    # In NumPy whatever the library, since JAX would compile for every shape.
    parts = map(library.to_numpy, (experts.cores, experts.expert_factor, experts.basis))
    return numpy_tensors(tucka.TuckerExperts(*parts))


def numpy_tensors(experts):
    return np.array([experts.to_tensor(group) for group in range(experts.groups)])


def dense(parts):
    groups, experts = parts.gate_shape
    return np.array([[reference.expert(*parts.all, i, j) for j in range(experts)] for i in range(groups)])


def residuals(stack):
    """The relative residual of every pair of ranks, and of one expert rank too many."""
    _, experts, width, _ = stack.shape
    pairs = [[(r, p) for p in range(1, experts + 2)] for r in range(1, width + 1)]
    return np.array(
        [[tucka.fit_experts(stack, rank=r, expert_rank=p).relative_residual for r, p in row] for row in pairs]
    )


def assert_falling(table, eps):
    for axis in (0, 1):
        assert np.diff(table, axis=axis).max(initial=0.0) <= 256 * eps


@given(stack=stacks(), data=st.data())
@few
def test_the_residual_is_the_distance_from_the_stack(library, stack, data):
    rank = data.draw(st.integers(1, stack.shape[-1]))
    fit = tucka.fit_experts(library.from_numpy(stack), rank=rank, expert_rank=data.draw(sizes))
    distance, norm = np.linalg.norm(stack - tensors(library, fit)), np.linalg.norm(stack)
    assert_close(fit.residual, distance, eps=library.eps, terms=64, scale=max(norm, 1.0))
    assert_close(fit.relative_residual * norm, distance, eps=library.eps, terms=64, scale=max(norm, 1.0))


@given(parts=tucker_parts())
@few
def test_tucker_experts_are_recovered_from_their_matrices(library, parts):
    stack = dense(parts)
    rank, expert_rank = parts.basis.shape[1], parts.cores.shape[1]
    fit = tucka.fit_experts(library.from_numpy(stack), rank=rank, expert_rank=expert_rank)
    assert (fit.cores.shape, fit.expert_factor.shape) == (parts.cores.shape, parts.expert_factor.shape)
    assert_close(tensors(library, fit), stack, eps=library.eps, terms=16)
    assert fit.relative_residual <= 64 * library.eps


@given(stack=stacks())
@few
def test_full_ranks_reproduce_any_stack(library, stack):
    _, experts, width, _ = stack.shape
    fit = tucka.fit_experts(library.from_numpy(stack), rank=width, expert_rank=experts)
    assert_close(tensors(library, fit), stack, eps=library.eps, terms=16)


@given(stack=stacks(small_shapes))
def test_the_residual_never_rises_with_either_rank(stack):
    table = residuals(stack)
    assert_falling(table, PRECISION["float64"])
    assert table[-1, -1] <= 256 * PRECISION["float64"]


@pytest.mark.parametrize("seed", [8, 14, 71])
def test_ranks_that_are_in_the_wrong_order_when_fitted_on_their_own_are_put_right(seed):
    # Without the fit of (1, 1) as a start, that of (1, 2) ends in a worse local optimum on these stacks.
    stack = np.random.default_rng(seed).standard_normal((2, 2, 5, 5))
    smaller, larger = (tucka.fit_experts(stack, rank=1, expert_rank=p).residual for p in (1, 2))
    assert larger <= smaller


@pytest.mark.parametrize(
    "noise", [1e-4, *(pytest.param(each, marks=pytest.mark.heavy) for each in (1e-8, 1e-11)), 1e-15]
)
@given(seed=seeds)
@settings(max_examples=5)
def test_the_residual_never_rises_near_an_exact_fit_either(seed, noise):
    rng = np.random.default_rng(seed)
    basis, cores = rng.standard_normal((4, 2)), rng.standard_normal((2, 2, 2, 2))
    table = residuals(basis @ cores @ basis.T + noise * rng.standard_normal((2, 2, 4, 4)))
    assert_falling(table, PRECISION["float64"])


@given(stack=stacks(), data=st.data())
def test_a_fit_is_no_worse_than_a_truncated_higher_order_svd(stack, data):
    _, experts, width, _ = stack.shape
    rank, expert_rank = data.draw(st.integers(1, width)), data.draw(st.integers(1, experts))
    sides = np.concatenate([np.moveaxis(stack, axis, 0).reshape(width, -1) for axis in (2, 3)], axis=1)
    basis = np.linalg.svd(sides)[0][:, :rank]
    outer = np.linalg.svd(np.moveaxis(stack, 1, 0).reshape(experts, -1))[0][:, :expert_rank]
    projected = np.einsum("jl,ilab,ac,bd->ijcd", outer @ outer.T, stack, basis @ basis.T, basis @ basis.T)
    fit = tucka.fit_experts(stack, rank=rank, expert_rank=expert_rank)
    # Where singular values are equal, the truncation is a matter of taste; any of them is beaten or met on average.
    singular = np.linalg.svd(sides)[1]
    if rank == width or singular[rank - 1] - singular[rank] > 1e-6 * singular[0]:
        assert fit.residual <= np.linalg.norm(stack - projected) + 1e-12 * (1 + np.linalg.norm(stack))


@pytest.mark.parametrize("shape", [(1, 1, 5, 5), (2, 3, 6, 6)])
@pytest.mark.parametrize("seed", range(3))
def test_no_small_turn_of_the_basis_fits_better(shape, seed):
    stack = np.random.default_rng(seed).standard_normal(shape)
    fit = tucka.fit_experts(stack, rank=3, expert_rank=1)
    mixed = np.einsum("tp,ktab->kpab", fit.expert_factor, stack).reshape(-1, *shape[2:])
    inside = fit.basis @ fit.basis.T
    slope = sum(each @ inside @ each.T @ fit.basis + each.T @ inside @ each @ fit.basis for each in mixed)
    assert np.linalg.norm(slope - inside @ slope) < 2e-3 * np.linalg.norm(slope)


@given(data=st.data(), width=sizes)
@few
def test_one_symmetric_matrix_keeps_its_largest_eigenvalues(library, data, width):
    square = data.draw(arrays(width, width))
    symmetric = square + square.T
    lost = np.sort(np.abs(np.linalg.eigvalsh(symmetric)))[::-1]
    for rank in range(1, width + 1):
        fit = tucka.fit_experts(library.from_numpy(symmetric[None]), rank=rank, expert_rank=1)
        desired = np.linalg.norm(lost[rank:])
        assert_close(fit.residual, desired, eps=library.eps, terms=width, scale=1 + lost.sum())


@given(stack=stacks(), data=st.data())
@few
def test_a_fit_has_orthonormal_or_zero_columns_and_the_shapes_asked_for(library, stack, data):
    groups, experts, width, _ = stack.shape
    rank, expert_rank = data.draw(st.integers(1, width)), data.draw(st.integers(1, experts + 2))
    fit = tucka.fit_experts(library.from_numpy(stack), rank=rank, expert_rank=expert_rank)
    assert tuple(fit.cores.shape) == (groups, expert_rank, rank, rank)
    basis, factor = library.to_numpy(fit.basis), library.to_numpy(fit.expert_factor)
    assert_close(basis.T @ basis, np.eye(rank), eps=library.eps, terms=width)
    gram = factor.T @ factor
    assert_close(gram, np.diag(np.diag(gram).round()), eps=library.eps, terms=experts)


@given(stack=stacks(), data=st.data())
@few
def test_all_libraries_get_the_same_numbers(library, stack, data):
    stack = stack.astype(np.float32).astype(np.float64)
    ranks = {"rank": data.draw(st.integers(1, stack.shape[-1])), "expert_rank": data.draw(sizes)}
    here, there = tucka.fit_experts(stack, **ranks), tucka.fit_experts(library.from_numpy(stack), **ranks)
    if library.default == "float64":
        np.testing.assert_array_equal(library.to_numpy(there.cores), here.cores)
    assert_close(there.residual, here.residual, eps=2.0**-20, scale=1 + np.linalg.norm(stack))


def test_every_dtype_is_kept_and_half_precision_fitted_in_a_wider_one(library):
    values = np.round(np.random.default_rng(0).standard_normal((2, 2, 4, 4)) * 8) / 8
    for name, dtype in library.dtypes.items():
        stack = tucka.arrays.cast(library.from_numpy(values.astype(np.float32)), dtype)
        fit = tucka.fit_experts(stack, rank=4, expert_rank=2)
        smaller = tucka.compress(fit, rank=2, expert_rank=1)
        arrays_made = [fit.cores, fit.expert_factor, fit.basis, smaller.cores, smaller.expert_factor, smaller.basis]
        assert {dtype_name(array) for array in arrays_made} == {name}
        assert fit.relative_residual < 1e-6
        assert_close(tensors(library, fit), values, eps=PRECISION[name], terms=4)


@pytest.mark.parametrize("seed", range(3))
def test_what_float32_rounds_away_is_not_fitted(seed):
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.standard_normal((6, 2)))[0]
    stack = (basis @ generator.standard_normal((2, 2, 2, 2)) @ basis.T).astype(np.float32)
    exact, wider = (tucka.fit_experts(stack, rank=rank, expert_rank=2) for rank in (2, 4))
    assert wider.iterations == exact.iterations


@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 2, 3, 3)])
def test_a_zero_stack_is_fitted_exactly(library, shape):
    fit = tucka.fit_experts(library.from_numpy(np.zeros(shape)), rank=2, expert_rank=3)
    assert (fit.residual, fit.relative_residual, fit.iterations) == (0.0, 0.0, 0)
    np.testing.assert_array_equal(tensors(library, fit), np.zeros((1, *shape)[-4:]))


@given(stack=stacks())
def test_one_group_may_come_without_its_axis(stack):
    group = stack[0]
    with_axis, without = (tucka.fit_experts(each, rank=1, expert_rank=1) for each in (group[None], group))
    np.testing.assert_array_equal(with_axis.cores, without.cores)


@given(stack=stacks(), power=st.sampled_from([-900, -300, 300, 900]))
def test_a_scale_of_the_stack_is_a_scale_of_the_fit(stack, power):
    plain, scaled = (tucka.fit_experts(each, rank=1, expert_rank=1) for each in (stack, stack * 2.0**power))
    np.testing.assert_array_equal(scaled.cores, plain.cores * 2.0**power)
    np.testing.assert_array_equal(scaled.basis, plain.basis)
    assert (scaled.residual, scaled.relative_residual) == (plain.residual * 2.0**power, plain.relative_residual)


def test_cores_beyond_the_range_of_the_dtype_are_an_error_with_a_cure():
    with refused(tucka.ConfigError, "cores", "float16 | overflow | wider dtype"):
        tucka.fit_experts(np.full((4, 8, 8), 60000, np.float16), rank=1, expert_rank=1)


def test_the_same_arguments_give_the_same_bits():
    stack = np.random.default_rng(3).standard_normal((2, 3, 6, 6))
    first, second = (tucka.fit_experts(stack, rank=3, expert_rank=2) for _ in range(2))
    for name in ("cores", "expert_factor", "basis", "residual", "iterations"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


# -- Compression -------------------------------------------------------------------------------------------------------


@st.composite
def random_experts(draw):
    """Experts without ties, so that the full tensor and the small one lead to the same optimum."""
    spec, rng = draw(few_specs), np.random.default_rng(draw(seeds))
    k, p, r, t = spec.groups, spec.expert_rank, spec.rank, spec.experts_per_group
    width = r + draw(st.sampled_from([0, 3]))
    return tucka.TuckerExperts(*map(rng.standard_normal, [(k, p, r, r), (t, p), (width, r)]))


@given(experts=random_experts(), data=st.data())
def test_compression_finds_what_fitting_the_full_tensors_finds(experts, data):
    rank = data.draw(st.integers(1, experts.cores.shape[-1]))
    expert_rank = data.draw(st.integers(1, experts.cores.shape[1]))
    stack = numpy_tensors(experts)
    small = tucka.compress(experts, rank=rank, expert_rank=expert_rank)
    full = tucka.fit_experts(stack, rank=rank, expert_rank=expert_rank)
    np.testing.assert_allclose(small.relative_residual, full.relative_residual, rtol=1e-4, atol=1e-13)
    assert_close(numpy_tensors(small), numpy_tensors(full), eps=1e-4, scale=np.abs(stack).max())


@given(parts=tucker_parts(), data=st.data())
@few
def test_the_residual_of_a_compression_is_the_distance_from_the_experts(library, parts, data):
    experts = tucka.TuckerExperts(*map(library.from_numpy, parts.all))
    rank = data.draw(st.integers(1, parts.basis.shape[1]))
    small = tucka.compress(experts, rank=rank, expert_rank=data.draw(st.integers(1, parts.cores.shape[1])))
    stack = dense(parts)
    distance, norm = np.linalg.norm(stack - tensors(library, small)), np.linalg.norm(stack)
    assert_close(small.residual, distance, eps=library.eps, terms=64, scale=max(norm, 1.0))
    assert_close(small.relative_residual * norm, distance, eps=library.eps, terms=64, scale=max(norm, 1.0))


@given(parts=tucker_parts())
@few
def test_compression_to_sufficient_ranks_changes_nothing(library, parts):
    experts = tucka.TuckerExperts(*map(library.from_numpy, parts.all))
    same = tucka.compress(experts, rank=parts.basis.shape[1], expert_rank=parts.cores.shape[1])
    stack = dense(parts)
    assert_close(tensors(library, same), stack, eps=library.eps, terms=parts.terms)
    # Sums of rank one, written with more ranks than they need.
    doubled = tucka.TuckerExperts(
        *map(library.from_numpy, [parts.cores[:, :1, :1, :1], parts.expert_factor[:, :1], parts.basis[:, :1]])
    )
    assert tucka.compress(doubled, rank=1, expert_rank=1).relative_residual <= 64 * library.eps


@given(parts=tucker_parts())
def test_the_residual_of_a_compression_never_rises_with_either_rank(parts):
    experts = tucka.TuckerExperts(*parts.all)
    ranks, expert_ranks = range(1, parts.basis.shape[1] + 1), range(1, parts.cores.shape[1] + 1)
    table = [[tucka.compress(experts, rank=r, expert_rank=p).relative_residual for p in expert_ranks] for r in ranks]
    assert_falling(np.array(table), PRECISION["float64"])


def test_a_million_wide_experts_are_compressed_without_a_full_tensor(library):
    rng = np.random.default_rng(0)
    width = 1_000_000 if library.name == "numpy" else 2_000
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    cores = rng.standard_normal((2, 2, 3, 3))
    cores[..., 2], cores[:, :, 2] = 0.0, 0.0
    basis = rng.standard_normal((width, 3)) / width**0.5
    # The third direction of the cores is empty, but no column of the basis is.
    parts = [turn.T @ cores @ turn, rng.standard_normal((2, 2)), basis @ turn]
    experts = tucka.TuckerExperts(*map(library.from_numpy, parts))
    small = tucka.compress(experts, rank=2, expert_rank=2)
    assert small.relative_residual < 64 * library.eps
    x, gates = rng.standard_normal((2, width)), np.array([[0.3, 0.7], [0.0, 0.0]])
    before, after = (library.to_numpy(each.apply(*map(library.from_numpy, (x, gates)))) for each in (experts, small))
    assert_close(after, before, eps=library.eps, terms=256)


# -- The result --------------------------------------------------------------------------------------------------------


def test_a_fit_can_be_used_copied_and_stored_like_any_experts():
    fit = tucka.fit_experts(np.random.default_rng(0).standard_normal((2, 4, 4)), rank=2, expert_rank=1)
    assert isinstance(fit, tucka.TuckerExperts)
    for copied in (copy.deepcopy(fit), pickle.loads(pickle.dumps(fit))):
        assert (copied.residual, copied.iterations) == (fit.residual, fit.iterations)
        np.testing.assert_array_equal(copied.to_tensor(0), fit.to_tensor(0))
    assert f"relative_residual={fit.relative_residual:.3g}" in repr(fit)


def test_a_copy_that_jax_changes_no_longer_claims_a_residual():
    jax = pytest.importorskip("jax")
    fit = tucka.fit_experts(jax.numpy.eye(3)[None], rank=2, expert_rank=1)
    doubled = jax.tree_util.tree_map(lambda array: 2 * array, fit)
    assert isinstance(doubled, tucka.FittedExperts)
    assert np.isnan(doubled.residual)
    assert np.isnan(doubled.relative_residual)


def test_a_fit_of_tensors_with_gradients_is_not_connected_to_them():
    torch = pytest.importorskip("torch")
    stack = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1).requires_grad_()
    fit = tucka.fit_experts(stack, rank=2, expert_rank=1)
    assert not any(part.requires_grad for part in (fit.cores, fit.expert_factor, fit.basis))


# -- TensorLy ----------------------------------------------------------------------------------------------------------


def test_the_callers_choice_of_backend_in_tensorly_is_neither_used_nor_changed():
    pytest.importorskip("torch")
    jax = pytest.importorskip("jax")
    stack, elsewhere = np.random.default_rng(0).standard_normal((2, 4, 4)), []
    tensorly.set_backend("pytorch")
    try:
        fit = tucka.fit_experts(stack, rank=2, expert_rank=1)
        thread = threading.Thread(target=lambda: elsewhere.append(tensorly.get_backend()))
        thread.start()
        thread.join()
        assert (tensorly.get_backend(), elsewhere) == ("pytorch", ["pytorch"])
    finally:
        tensorly.set_backend("numpy")
    again = tucka.fit_experts(stack, rank=2, expert_rank=1)
    np.testing.assert_array_equal(fit.cores, again.cores)
    assert not jax.config.jax_enable_x64


def test_an_error_inside_tensorly_reaches_the_caller(monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError(threading.current_thread().name)

    monkeypatch.setattr("tensorly.decomposition.partial_tucker", fail)
    with pytest.raises(ZeroDivisionError, match="tucka-tensorly"):
        tucka.fit_experts(np.eye(3)[None], rank=1, expert_rank=1)


# -- Errors ------------------------------------------------------------------------------------------------------------

_STACK = np.zeros((2, 3, 3))
_EXPERTS = tucka.TuckerExperts(np.ones((1, 2, 3, 3)), np.ones((4, 2)), np.ones((5, 3)))
_WITH_NAN = tucka.TuckerExperts(np.full((1, 1, 1, 1), np.nan), np.ones((1, 1)), np.ones((1, 1)))


@pytest.mark.parametrize(
    ("stack", "rank", "expert_rank", "error", "name", "words"),
    [
        (_STACK, 0, 1, tucka.ConfigError, "rank", "at least 1 | 0 | fit_experts"),
        (_STACK, 4, 1, tucka.ConfigError, "rank", "1 to 3 | width | 4"),
        (_STACK, 2.0, 1, tucka.ConfigError, "rank", "whole number | 2.0"),
        (_STACK, 2, 0, tucka.ConfigError, "expert_rank", "at least 1 | 0"),
        (_STACK[0], 2, 1, tucka.ShapeError, "stack", "(t, d, d) | (k, t, d, d) | (3, 3)"),
        (_STACK[:, :2], 2, 1, tucka.ShapeError, "stack", "size 2 | axis 2"),
        (_STACK[:0], 2, 1, tucka.ShapeError, "stack", "at least one entry | t"),
        (_STACK + np.nan, 2, 1, tucka.ConfigError, "stack", "finite | NaN"),
        (_STACK + np.inf, 2, 1, tucka.ConfigError, "stack", "finite | infinity"),
        (_STACK.astype(int), 2, 1, tucka.ArrayError, "stack", "floating | int64"),
        (_STACK.tolist(), 2, 1, tucka.ArrayError, "stack", "array | list"),
    ],
)
def test_a_fit_that_cannot_be_names_argument_rule_and_value(stack, rank, expert_rank, error, name, words):
    with refused(error, name, words):
        tucka.fit_experts(stack, rank=rank, expert_rank=expert_rank)


@pytest.mark.parametrize(
    ("experts", "rank", "expert_rank", "error", "name", "words"),
    [
        (_EXPERTS, 4, 1, tucka.ConfigError, "rank", "1 to 3 | experts | 4"),
        (_EXPERTS, 3, 3, tucka.ConfigError, "expert_rank", "1 to 2 | experts | 3"),
        (_EXPERTS, 0, 1, tucka.ConfigError, "rank", "at least 1 | 0 | compress"),
        (_WITH_NAN, 1, 1, tucka.ConfigError, "cores", "finite | NaN"),
        (_STACK, 1, 1, tucka.ArrayError, "experts", "TuckerExperts | ndarray"),
    ],
)
def test_a_compression_that_cannot_be_names_argument_rule_and_value(experts, rank, expert_rank, error, name, words):
    with refused(error, name, words):
        tucka.compress(experts, rank=rank, expert_rank=expert_rank)


def test_the_progress_of_a_fit_is_told():
    seen = []
    stack = np.random.default_rng(0).normal(size=(3, 6, 6))
    with_progress = tucka.fit_experts(stack, rank=4, expert_rank=2, progress=lambda *counts: seen.append(counts))
    assert seen == [(done, 8) for done in range(1, 9)]
    np.testing.assert_array_equal(with_progress.cores, tucka.fit_experts(stack, rank=4, expert_rank=2).cores)
    with pytest.raises(tucka.ConfigError, match=r"progress: .*function.*True"):
        tucka.fit_experts(stack, rank=4, expert_rank=2, progress=True)
