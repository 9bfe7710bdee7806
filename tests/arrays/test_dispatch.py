"""Finding a backend from arrays: nothing global is changed, from any thread."""

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import tensorly
import torch
from tensorly.backend import BackendManager

import tucka
from support.array_backends import LIBRARIES
from support.plugged_backend import PluggedArray, PluggedBackend
from support.subprocesses import output_of
from tucka.arrays import backend_of, register


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("numpy", "numpy"),
        ("plugged", "plugged"),
        ("torch", "pytorch"),
        ("jax", "jax"),
    ],
)
def test_the_backend_is_found_from_the_type_of_the_arrays(name, backend):
    (library,) = (library for library in LIBRARIES if library.name == name)
    assert backend_of(x=library.from_numpy(np.ones(2))).backend_name == backend


def test_the_same_handle_is_found_every_time(library):
    first, second = (backend_of(x=library.from_numpy(np.ones(size))) for size in (1, 2))
    assert first is second


def test_subclasses_of_an_array_type_have_its_backend():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert backend_of(x=parameter, y=torch.ones(2)).backend_name == "pytorch"
    assert backend_of(x=np.float64(1.0)).backend_name == "numpy"


def test_no_array_is_computed_with_by_the_wrong_backend():
    with pytest.raises(tucka.ArrayError, match=r"^y: .*same backend as x \(numpy\), got .*plugged"):
        backend_of(x=np.ones(2), y=np.ones(2).view(PluggedArray))


# --- plugging in


class Reregistered(np.ndarray):
    """An array type that changes its backend."""


def test_a_later_registration_goes_before_an_earlier_one():
    array = np.ones(2).view(Reregistered)
    assert backend_of(x=array).backend_name == "numpy"
    register(Reregistered, PluggedBackend)
    assert backend_of(x=array).backend_name == "plugged"
    register(Reregistered, lambda: BackendManager.load_backend("numpy"))
    assert backend_of(x=array).backend_name == "numpy"
    assert backend_of(x=np.ones(2).view(PluggedArray)).backend_name == "plugged"


def test_a_backend_is_loaded_once_and_only_when_its_first_array_is_seen():
    class Lazy(np.ndarray):
        pass

    loaded = []
    register(Lazy, lambda: loaded.append("once") or PluggedBackend())
    assert loaded == []
    for _ in range(2):
        backend_of(x=np.ones(2).view(Lazy))
    assert loaded == ["once"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ndarray", PluggedBackend), "^array_type: .*class.*'ndarray'"),
        ((PluggedArray, "numpy"), "^loader: .*callable.*'numpy'"),
    ],
)
def test_what_cannot_be_registered_is_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        tucka.backends.register(*arguments)


# --- nothing global


def work_with(library):
    """Route and adapt: a bit of everything."""
    to, rng = library.from_numpy, np.random.default_rng(0)
    experts = tucka.TuckerExperts(*(to(rng.normal(size=shape)) for shape in ((2, 2, 2, 2), (2, 2), (4, 2))))
    hidden, centroids = to(rng.normal(size=(3, 5, 4))), to(rng.normal(size=(2, 2, 4)))
    gates = tucka.select_gates(tucka.affinity_logits(tucka.routing_feature(hidden), centroids))
    tucka.householder_gamma(to(rng.normal(size=(4, 2))))
    tucka.balanced_centroids(to(rng.normal(size=(9, 4))), groups=2, experts_per_group=1, seed=0)
    return library.to_numpy(experts.apply(hidden, gates))


def test_eight_threads_may_use_all_backends_at_once():
    desired = work_with(LIBRARIES[0])
    before = tensorly.get_backend(), jax.config.jax_enable_x64
    libraries = LIBRARIES * 8

    def run(library):
        return work_with(library), (tensorly.get_backend(), jax.config.jax_enable_x64)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, libraries))
    for library, (applied, switches) in zip(libraries, results, strict=True):
        np.testing.assert_allclose(applied, desired, atol=1e4 * library.eps)
        assert switches == before
    assert (tensorly.get_backend(), jax.config.jax_enable_x64) == before


@pytest.mark.parametrize("selected", ["numpy", "pytorch"])
def test_tensorlys_own_choice_of_backend_has_no_influence(library, selected):
    desired = work_with(library)
    before = tensorly.get_backend()
    tensorly.set_backend(selected)
    try:
        np.testing.assert_array_equal(work_with(library), desired)
        parts = (np.ones(shape) for shape in ((1, 1, 1, 1), (1, 1), (1, 1)))
        core, _ = tucka.TuckerExperts(*map(library.from_numpy, parts)).group(0)
        assert type(core) in library.array_types
        assert tensorly.get_backend() == selected
    finally:
        tensorly.set_backend(before)


FIRST_IMPORT = """
import sys, threading
import jax, numpy as np, torch, jax.numpy as jnp
import tucka
assert not any(name.split(".")[0] == "tensorly" for name in sys.modules)

start, results = threading.Barrier(8), []
def work(ones):
    start.wait()
    experts = tucka.TuckerExperts(ones((1, 1, 2, 2)), ones((1, 1)), ones((3, 2)))
    gates = tucka.select_gates(tucka.affinity_logits(tucka.routing_feature(ones((2, 3))), ones((1, 1, 3))))
    results.append(float(experts.apply(ones((4, 3)), gates).sum()))

makers = [np.ones, torch.ones, jnp.ones]
threads = [threading.Thread(target=work, args=(makers[index % 3],)) for index in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]

import tensorly
print(results == [156.0] * 8, tensorly.get_backend(), jax.config.jax_enable_x64, jnp.ones(1).dtype)
"""


@pytest.mark.slow  # a process that imports all libraries
def test_eight_threads_may_make_the_first_import():
    assert output_of(FIRST_IMPORT) == "True numpy False float32\n"
