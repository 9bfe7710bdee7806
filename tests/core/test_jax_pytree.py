"""JAX looks inside Tucker experts: they are a pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tucka
from support.subprocesses import output_of


def experts_of(seed=0):
    rng = np.random.default_rng(seed)
    return tucka.TuckerExperts(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 2, 2), (2, 3), (4, 2))))


def assert_same(actual, desired):
    assert type(actual) is tucka.TuckerExperts
    for array, other in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        np.testing.assert_array_equal(array, other)


X, GATES = jnp.ones((3, 4)), jnp.full((2, 2), 0.25)


def test_flattening_and_unflattening_gives_the_same_experts():
    experts = experts_of()
    leaves, structure = jax.tree.flatten(experts)
    assert [leaf.shape for leaf in leaves] == [(2, 3, 2, 2), (2, 3), (4, 2)]
    assert_same(jax.tree.unflatten(structure, leaves), experts)


def test_leaves_are_found_under_the_names_of_the_parts():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(experts_of())]
    assert paths == [".cores", ".expert_factor", ".basis"]


@pytest.mark.parametrize("placeholder", [None, 0, "a name", object()], ids=lambda value: type(value).__name__)
def test_a_tree_may_hold_what_is_no_array(placeholder):
    structure = jax.tree.structure(experts_of())
    held = jax.tree.unflatten(structure, [placeholder] * 3)
    assert (held.cores, held.expert_factor, held.basis) == (placeholder,) * 3
    assert repr(held) == "TuckerExperts(cores=(), expert_factor=(), basis=())"


def test_mapping_over_the_tree_maps_every_part():
    experts = experts_of()
    doubled = jax.tree.map(lambda part: 2 * part, experts)
    np.testing.assert_allclose(doubled.to_tensor(0), 16 * experts.to_tensor(0), rtol=1e-6)


def test_jit_takes_and_returns_experts():
    experts = experts_of()
    assert_same(jax.jit(lambda experts: experts)(experts), experts)
    compiled = jax.jit(lambda experts, x, gates: experts.apply(x, gates))(experts, X, GATES)
    np.testing.assert_allclose(compiled, experts.apply(X, GATES), rtol=1e-5)


def test_jit_makes_experts_out_of_arrays():
    vectors = jnp.eye(4)[:, :2]
    assert_same(jax.jit(tucka.householder_experts)(vectors), tucka.householder_experts(vectors))


def test_vmap_runs_over_a_stack_of_experts():
    each = [experts_of(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *each)
    applied = jax.vmap(lambda experts: experts.apply(X, GATES))(stacked)
    np.testing.assert_allclose(applied, jnp.stack([experts.apply(X, GATES) for experts in each]), rtol=1e-5)


def test_the_gradient_with_respect_to_experts_is_experts():
    experts = experts_of()

    def loss(experts):
        return jnp.sum(experts.apply(X, GATES) ** 2)

    gradient = jax.grad(loss)(experts)
    assert type(gradient) is tucka.TuckerExperts
    step = jax.tree.map(lambda part, slope: part - 1e-3 * slope, experts, gradient)
    assert loss(step) < loss(experts)


def test_experts_of_numpy_arrays_are_a_tree_too():
    experts = tucka.TuckerExperts(*map(np.asarray, jax.tree.leaves(experts_of())))
    compiled = jax.jit(lambda experts: experts.apply(X, GATES))(experts)
    np.testing.assert_allclose(compiled, experts.apply(np.asarray(X), np.asarray(GATES)), rtol=1e-5)


HERE = "made by eight threads at once"  # the others are slow: each is a process of its own
FIRST_USES = {
    "experts of JAX arrays": """
import tucka, jax, jax.numpy as jnp
experts = tucka.TuckerExperts(jnp.ones((1, 1, 1, 1)), jnp.ones((1, 1)), jnp.ones((2, 1)))
print(len(jax.tree_util.tree_flatten(experts)[0]))
""",
    "experts from a file": """
import pickle, numpy as np, tucka
raw = pickle.dumps(tucka.TuckerExperts(np.ones((1, 1, 1, 1)), np.ones((1, 1)), np.ones((2, 1))))
import jax
print(len(jax.tree_util.tree_flatten(pickle.loads(raw))[0]))
""",
    "made by eight threads at once": """
import threading, tucka, jax, jax.numpy as jnp
parts = jnp.ones((1, 1, 1, 1)), jnp.ones((1, 1)), jnp.ones((2, 1))
start, made = threading.Barrier(8), []
def make():
    start.wait()
    made.append(tucka.TuckerExperts(*parts))
threads = [threading.Thread(target=make) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print({len(jax.tree_util.tree_leaves(experts)) for experts in made if len(made) == 8}.pop())
""",
}


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, marks=() if name == HERE else pytest.mark.slow, id=name)
        for name, script in FIRST_USES.items()
    ],
)
def test_the_first_use_of_a_process_may_be_to_flatten(script):
    assert output_of(script) == "3\n"


def test_a_traced_scale_has_its_gradient():
    experts = experts_of()

    def total(alpha):
        return experts.apply(X, GATES, alpha=alpha).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(total))(2.0), total(1.0) - total(0.0), rtol=1e-5)
