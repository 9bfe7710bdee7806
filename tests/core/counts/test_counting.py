"""Counts of parameters, multiply-adds and bytes: the laws they obey, and what they refuse."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tucka
from support.refusals import refused
from support.strategies import specs
from tucka.core.counts.table import METHODS

LAYERS = [(16, 8), (16, 32), (32, 16)]
SIZES = {
    "tucka": {},
    "lora": {"r": 3},
    "dora": {"r": 3},
    "vera": {"r": 3},
    "oft": {"block_size": 4},
    "boft": {"block_size": 4},
    "hra": {"r": 3},
    "full": {},
}
COUNTS = {
    "count_parameters": tucka.count_parameters,
    "count_flops": lambda *args, **sizes: tucka.count_flops(*args, tokens=5, **sizes),
    "count_file_bytes": tucka.count_file_bytes,
    "count_activation_bytes": lambda *args, **sizes: tucka.count_activation_bytes(*args, tokens=5, **sizes),
}
methods = pytest.mark.parametrize("method", METHODS)
counts = pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
layer_lists = st.lists(st.tuples(st.integers(1, 4096), st.integers(1, 4096)), min_size=1, max_size=5)
numbers = st.integers(1, 64)


def letters(spec):
    return {"r": spec.rank, "k": spec.groups, "t": spec.experts_per_group, "p": spec.expert_rank}


def test_every_method_has_sizes_to_test_with():
    assert SIZES.keys() == METHODS.keys()


@given(spec=specs(), layers=layer_lists)
def test_parameters_are_the_numbers_that_the_experts_hold_and_the_centroids(spec, layers):
    shared = (spec.groups, spec.expert_rank, spec.rank, spec.rank), (spec.experts_per_group, spec.expert_rank)
    experts = [tucka.TuckerExperts(*map(np.zeros, shared), np.zeros((width, spec.rank))) for width, _ in layers]
    held = sum(layer.n_parameters for layer in experts)
    centroids = spec.num_experts * layers[0][0]
    assert tucka.count_parameters("tucka", layers, **letters(spec)) == held + centroids
    assert tucka.count_parameters("tucka", layers, pinned=True, **letters(spec)) == held


@given(layer=st.tuples(numbers, numbers), r=numbers, k=numbers, t=numbers, p=numbers)
def test_parameters_of_a_layer_grow_as_the_paper_says(layer, r, k, t, p):
    def count(r=r, k=k, t=t, p=p, layer=layer):
        return tucka.count_parameters("tucka", [layer], r=r, k=k, t=t, p=p, pinned=True)

    width, out = layer
    experts = k * t
    # (p/k)·M: experts are added at fixed k, p and r by a larger t.
    assert k * (count(t=t + 1) - count()) == p * (k * (t + 1) - experts)
    # k·p·r²: one more group.
    assert count(k=k + 1) - count() == p * r**2
    # d·r: one more input.
    assert count(layer=(width + 1, out)) - count() == r
    # Second differences in r leave the square alone, and nothing else is left at r = 0, p·t apart.
    assert count(r=r + 2) - 2 * count(r=r + 1) + count() == 2 * k * p
    assert count() - k * p * r**2 - width * r == p * t


@given(spec=specs(), width=numbers, outs=st.tuples(numbers, numbers), routing=st.sampled_from(["batch", "token"]))
def test_nothing_depends_on_the_output_width(spec, width, outs, routing):
    sizes = {**letters(spec), "routing": routing}
    for count in COUNTS.values():
        assert len({count("tucka", [(width, out)] * 2, **sizes) for out in outs}) == 1


@given(spec=specs(), layers=layer_lists, more=layer_lists)
def test_the_router_costs_the_same_whatever_the_number_of_layers(spec, layers, more):
    def router(layers, count, **options):
        sizes = letters(spec)
        return count("tucka", layers, **sizes, **options) - count("tucka", layers, pinned=True, **sizes, **options)

    for count in (COUNTS["count_parameters"], COUNTS["count_flops"], COUNTS["count_file_bytes"]):
        assert router(layers, count) == router(layers + more, count)
    assert router(layers, tucka.count_parameters) == spec.num_experts * layers[0][0]
    assert router(layers, COUNTS["count_flops"]) == spec.num_experts * layers[0][0]


@methods
@given(layers=layer_lists, more=layer_lists)
def test_layers_add_up_but_for_what_they_share(method, layers, more):
    layers, more = ([(4 * width, out) for width, out in pairs] for pairs in (layers, more))
    sizes = {**SIZES[method], **({"pinned": True} if method == "tucka" else {})}
    for name, count in COUNTS.items():
        if (method, name) != ("vera", "count_file_bytes"):
            assert count(method, layers + more, **sizes) == count(method, layers, **sizes) + count(
                method, more, **sizes
            )


@methods
@pytest.mark.parametrize("backward", [False, True])
def test_multiply_adds_are_a_fixed_part_and_an_equal_one_for_each_token(method, backward):
    at = [tucka.count_flops(method, LAYERS, tokens=n, backward=backward, **SIZES[method]) for n in (1, 2, 3)]
    assert at[2] - at[1] == at[1] - at[0] >= 0


@given(spec=specs(), samples=st.integers(1, 8), length=st.integers(1, 8))
def test_one_sample_of_sample_routing_is_a_batch(spec, samples, length):
    sizes, tokens = letters(spec), samples * length
    batch = tucka.count_flops("tucka", LAYERS, tokens=tokens, **sizes)
    each = [
        tucka.count_flops("tucka", LAYERS, tokens=tokens, samples=n, routing="sample", **sizes) for n in (1, samples)
    ]
    assert each[0] == batch
    mixing = tucka.count_flops("tucka", LAYERS, tokens=tokens, **sizes) - sum(
        tokens * (2 * width * spec.rank + spec.rank**2) for width, _ in LAYERS
    )
    assert each[1] == batch + (samples - 1) * mixing


@methods
def test_bytes_are_the_numbers_times_their_size(method):
    sizes = SIZES[method]
    four, two, flag = (tucka.count_file_bytes(method, LAYERS, itemsize=size, **sizes) for size in (4, 2, 1))
    assert four - two == 2 * (two - flag) >= 2 * tucka.count_parameters(method, LAYERS, **sizes)
    four, two = (tucka.count_activation_bytes(method, LAYERS, tokens=3, itemsize=size, **sizes) for size in (4, 2))
    assert four == 2 * two


@pytest.mark.parametrize("numpy_int", [np.int64, np.int32])
def test_numpy_integers_count_as_whole_numbers_and_do_not_overflow(numpy_int):
    width = 2**20
    layers = [(numpy_int(width), numpy_int(width))] * 2
    assert tucka.count_parameters("full", layers) == 2 * width**2
    assert type(tucka.count_parameters("lora", layers, r=numpy_int(4))) is int


@counts
@pytest.mark.parametrize(
    ("method", "layers", "sizes", "name", "words"),
    [
        ("adapter", LAYERS, {}, "method", "'tucka' | 'adapter'"),
        ("lora", LAYERS, {}, "r", "at least 1 | 'lora' | nothing"),
        ("lora", LAYERS, {"r": 0}, "r", "at least 1 | 0"),
        ("lora", LAYERS, {"r": True}, "r", "whole number | True"),
        ("lora", LAYERS, {"r": 2.0}, "r", "whole number | 2.0"),
        ("lora", LAYERS, {"r": 2, "k": 3}, "k", "'lora' | unexpected | Use one of r"),
        ("full", LAYERS, {"r": 2}, "r", "'full' | unexpected"),
        ("tucka", LAYERS, {"rank": 2}, "rank", "'tucka' | unexpected | is r"),
        ("tucka", LAYERS, {"experts_per_group": 2}, "experts_per_group", "unexpected | is t"),
        ("tucka", LAYERS, {"routng": "token"}, "routng", "unexpected | is routing"),
        ("tucka", LAYERS, {"routing": "layer"}, "routing", "'batch' | 'token' | 'layer'"),
        ("tucka", LAYERS, {"pinned": "no"}, "pinned", "False | True | 'no'"),
        ("oft", LAYERS, {"block_size": 4, "variant": "old"}, "variant", "'peft' | 'paper' | 'old'"),
        ("oft", LAYERS, {"block_size": 32}, "block_size", "divisor | 16 | layers[0]"),
        ("boft", [(4, 4), (6, 4)], {"block_size": 4}, "block_size", "divisor | 6 | layers[1] | 4"),
        ("full", [], {}, "layers", "pairs | at least one | none"),
        ("full", "4x4", {}, "layers", "pairs | '4x4'"),
        ("full", 4, {}, "layers", "pairs | 4"),
        ("full", [(4, 4), (4,)], {}, "layers[1]", "pair | (4,)"),
        ("full", ["44"], {}, "layers[0]", "pair | '44'"),
        ("full", [(4, 4), (4, 0)], {}, "layers[1][1]", "at least 1 | 0"),
        ("full", [("4", 4)], {}, "layers[0][0]", "whole number | '4'"),
    ],
)
def test_a_wrong_method_layer_or_size_is_refused_by_name(count, method, layers, sizes, name, words):
    with refused(tucka.ConfigError, name, words):
        count(method, layers, **sizes)


@pytest.mark.parametrize("count", [tucka.count_flops, tucka.count_activation_bytes])
@pytest.mark.parametrize(
    ("numbers", "name", "words"),
    [
        ({"tokens": 0}, "tokens", "at least 1 | 0"),
        ({"tokens": 4, "samples": 0}, "samples", "at least 1 | 0"),
        ({"tokens": 4, "samples": 5}, "samples", "at most the 4 tokens | 5"),
        ({"tokens": 4, "routing": "sample"}, "samples", "'sample' | None"),
    ],
)
def test_a_wrong_number_of_tokens_or_samples_is_refused(count, numbers, name, words):
    with refused(tucka.ConfigError, name, words):
        count("tucka", LAYERS, **numbers)


def test_a_wrong_item_size_or_direction_is_refused():
    with refused(tucka.ConfigError, "itemsize"):
        tucka.count_file_bytes("full", LAYERS, itemsize=0)
    with refused(tucka.ConfigError, "itemsize"):
        tucka.count_activation_bytes("full", LAYERS, tokens=1, itemsize=0.5)
    with refused(tucka.ConfigError, "backward"):
        tucka.count_flops("full", LAYERS, tokens=1, backward="yes")


def test_the_counts_themselves_need_no_array_library():
    # The package's own __init__ is kept out, since the rest of the mathematics needs NumPy.
    code = (
        "import sys, types, pathlib\n"
        f"package = types.ModuleType('tucka'); package.__path__ = {tucka.__path__!r}; sys.modules['tucka'] = package\n"
        "sys.modules['numpy'] = sys.modules['torch'] = None\n"
        "from tucka.core.counts import count_parameters\n"
        "from tucka.core.counts.paper_tables import paper_counts\n"
        "assert count_parameters('lora', [(3, 4)], r=2) == 14 and paper_counts()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
