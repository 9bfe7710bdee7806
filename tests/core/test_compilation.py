"""Compilers and transformations see through every function of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tucka
from support.functions_of_arrays import CASES, GATES, PARTS
from support.subprocesses import output_of

every_function = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def close(actual, desired):
    desired = np.asarray(desired)
    np.testing.assert_allclose(np.asarray(actual), desired, rtol=0, atol=1e-5 * max(1.0, np.abs(desired).max()))


@every_function
def test_jit_gives_the_same_values(case):
    inputs = [jnp.asarray(values, jnp.float32) for values in case.values()]
    close(jax.jit(case.function)(*inputs), case.function(*case.values()))


@every_function
def test_vmap_gives_the_values_of_each(case):
    inputs = [jnp.asarray(values, jnp.float32) for values in case.values()]
    batched = [jnp.stack([values, values[::-1]]) for values in inputs]
    each = [case.function(*inputs), case.function(*(values[::-1] for values in inputs))]
    close(jax.jit(jax.vmap(case.function))(*batched), np.stack(each))


@every_function
def test_torchs_vmap_gives_the_values_of_each(case):
    inputs = [torch.tensor(values) for values in case.values()]
    batched = [torch.stack([values, values.flip(0)]) for values in inputs]
    each = [case.function(*inputs), case.function(*(values.flip(0) for values in inputs))]
    close(torch.func.vmap(case.function)(*batched), torch.stack(each))


@every_function
def test_torch_compiles_it_as_one_graph(case):
    torch.compiler.reset()
    inputs = [torch.tensor(values) for values in case.values()]
    compiled = torch.compile(case.function, backend="eager", fullgraph=True)
    close(compiled(*inputs), case.function(*inputs))


def test_torch_compiles_one_graph_for_changing_sizes_and_scales():
    torch.compiler.reset()
    parts = [torch.rand(shape) for shape in PARTS]

    def adapt(x, gates, alpha):
        return tucka.TuckerExperts(*parts).apply(x, gates, alpha=alpha)

    compiled = torch.compile(adapt, backend="eager", fullgraph=True)
    for rows, alpha in [(2, 0.5), (3, 2.0), (7, 1.5)]:
        x, gates = torch.rand(rows, 5, 4), torch.rand(rows, *GATES)
        close(compiled(x, gates, alpha), adapt(x, gates, alpha))


def test_torch_compiles_gradients_ahead_of_time():
    torch.compiler.reset()
    case = next(case for case in CASES if case.name == "apply-token")
    inputs = [torch.tensor(values, requires_grad=True) for values in case.values()]
    compiled = torch.compile(case.function, backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    desired = torch.autograd.grad(case.function(*inputs).square().sum(), inputs)
    for gradient, other in zip(actual, desired, strict=True):
        close(gradient, other)


def test_experts_can_be_an_argument_of_a_compiled_function():
    torch.compiler.reset()
    experts = tucka.TuckerExperts(*(torch.rand(shape) for shape in PARTS))
    x, gates = torch.rand(3, 4), torch.rand(GATES)
    compiled = torch.compile(lambda experts, x, gates: experts.apply(x, gates), backend="eager", fullgraph=True)
    close(compiled(experts, x, gates), experts.apply(x, gates))


FIRST_CALL = {
    "torch": """
import torch, tucka
def run(cores, factor, basis, x, gates):
    return tucka.TuckerExperts(cores, factor, basis).apply(x, gates)
inputs = [torch.ones(shape) for shape in ((1, 1, 2, 2), (1, 1), (3, 2), (4, 3), (1, 1))]
compiled = torch.compile(run, backend="eager", fullgraph=True)
compiled(*inputs)
compiled(*inputs)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
print(compiled(*inputs).sum().item())
""",
    "jax": """
import jax, jax.numpy as jnp, tucka
@jax.jit
def run(cores, factor, basis, x, gates):
    return tucka.TuckerExperts(cores, factor, basis).apply(x, gates)
print(run(*(jnp.ones(shape) for shape in ((1, 1, 2, 2), (1, 1), (3, 2), (4, 3), (1, 1)))).sum().item())
""",
}


# In torch, such a process takes long.
@pytest.mark.parametrize(
    "library", [pytest.param(name, marks=pytest.mark.slow if name == "torch" else ()) for name in FIRST_CALL]
)
def test_the_first_call_of_a_process_may_be_compiled(library):
    assert output_of(FIRST_CALL[library]) == "156.0\n"
