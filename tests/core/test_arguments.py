"""Wrong arguments: which error, and that it names the argument, the rule and the value."""

import numpy as np
import pytest

import tucka
from support.refusals import refused
from tucka import ArrayError, ConfigError, ShapeError


def ones(*shape, of=np.ones):
    return of(shape)


def torch_ones(*shape):
    return pytest.importorskip("torch").ones(*shape)


def jax_ones(shape):
    return pytest.importorskip("jax.numpy").ones(shape)


def experts(of=np.ones):
    """k = 2, t = 3, p = 4, r = 2, d = 5."""
    return tucka.TuckerExperts(of((2, 4, 2, 2)), of((3, 4)), of((5, 2)))


CENTROIDS = ones(2, 3, 5)
FEATURES = ones(4, 5)
SIZES = {"groups": 2, "experts_per_group": 2, "seed": 0}

WRONG_SHAPES = {
    "mode_product, no modes": (
        lambda: tucka.mode_product(np.array(1.0), ones(2, 2), mode=0),
        "tensor",
        "at least one mode | mode_product | shape ()",
    ),
    "mode_product, a NumPy scalar": (
        lambda: tucka.mode_product(np.float64(1.0), ones(2, 2), mode=0),
        "tensor",
        "at least one mode | shape ()",
    ),
    "mode_product, no matrix": (
        lambda: tucka.mode_product(ones(2, 3), ones(3), mode=1),
        "matrix",
        "axes | (J, I) | mode_product | shape (3,)",
    ),
    "mode_product, another size": (
        lambda: tucka.mode_product(ones(2, 3), ones(5, 4), mode=1),
        "matrix",
        "size 3 | mode 1 of tensor | mode_product | shape (5, 4)",
    ),
    "multi_mode_product, another size": (
        lambda: tucka.multi_mode_product(ones(2, 3), [ones(5, 2), ones(5, 4)]),
        "matrices[1]",
        "size 3 | mode 1 of tensor | shape (5, 4)",
    ),
    "experts, cores of too few axes": (
        lambda: tucka.TuckerExperts(ones(4, 2, 2), ones(3, 4), ones(5, 2)),
        "cores",
        "axes | (k, p, r, r) | TuckerExperts | shape (4, 2, 2)",
    ),
    "experts, cores not square": (
        lambda: tucka.TuckerExperts(ones(2, 4, 2, 3), ones(3, 4), ones(5, 2)),
        "cores",
        "size 2 | axis 2 of cores | shape (2, 4, 2, 3)",
    ),
    "experts, another expert rank": (
        lambda: tucka.TuckerExperts(ones(2, 4, 2, 2), ones(3, 5), ones(5, 2)),
        "expert_factor",
        "size 4 | axis 1 of cores | shape (3, 5)",
    ),
    "experts, another rank": (
        lambda: tucka.TuckerExperts(ones(2, 4, 2, 2), ones(3, 4), ones(5, 3)),
        "basis",
        "size 2 | axis 2 of cores | shape (5, 3)",
    ),
    "experts, no groups": (
        lambda: tucka.TuckerExperts(ones(0, 4, 2, 2), ones(3, 4), ones(5, 2)),
        "cores",
        "at least | shape (0, 4, 2, 2)",
    ),
    "mix, gates of another size": (
        lambda: experts().mix(ones(3, 2)),
        "gates",
        "size 2 | axis 0 of cores | TuckerExperts.mix | shape (3, 2)",
    ),
    "mix, a scalar": (
        lambda: experts().mix(np.float64(1.0)),
        "gates",
        "axes | (..., k, t) | TuckerExperts.mix | shape ()",
    ),
    "apply, x of another width": (
        lambda: experts().apply(ones(7, 4), ones(2, 3)),
        "x",
        "size 5 | axis 0 of basis | TuckerExperts.apply | shape (7, 4)",
    ),
    "apply, a scalar": (lambda: experts().apply(np.float64(1.0), ones(2, 3)), "x", "axes | (..., d) | shape ()"),
    "apply, gates for another batch": (
        lambda: experts().apply(ones(7, 5), ones(6, 2, 3)),
        "gates",
        "leading axes | (7,) | shape (6, 2, 3)",
    ),
    "apply, more leading axes than x": (
        lambda: experts().apply(ones(5), ones(1, 2, 3)),
        "gates",
        "leading axes | () | shape (1, 2, 3)",
    ),
    "inner, another width": (
        lambda: experts().inner(tucka.TuckerExperts(ones(1, 1, 1, 1), ones(3, 1), ones(6, 1)), 0, 0),
        "other.basis",
        "size 5 | axis 0 of basis | shape (6, 1)",
    ),
    "inner, other experts": (
        lambda: experts().inner(tucka.TuckerExperts(ones(1, 1, 1, 1), ones(2, 1), ones(5, 1)), 0, 0),
        "other.expert_factor",
        "size 3 | axis 0 of expert_factor | shape (2, 1)",
    ),
    "householder_gamma, a vector": (
        lambda: tucka.householder_gamma(ones(3)),
        "vectors",
        "axes | (d, r) | householder_gamma | shape (3,)",
    ),
    "householder_product, more columns than rows": (
        lambda: tucka.householder_product(ones(2, 3)),
        "vectors",
        "at most 2 | householder_product | shape (2, 3)",
    ),
    "householder_experts, no columns": (
        lambda: tucka.householder_experts(ones(2, 0)),
        "vectors",
        "at least | shape (2, 0)",
    ),
    "routing_feature, a vector": (
        lambda: tucka.routing_feature(ones(3)),
        "hidden",
        "axes | (B, d) | routing_feature | shape (3,)",
    ),
    "routing_feature, an empty batch": (
        lambda: tucka.routing_feature(ones(0, 4, 5)),
        "hidden",
        "at least | shape (0, 4, 5)",
    ),
    "routing_feature, no tokens": (
        lambda: tucka.routing_feature(ones(2, 0, 5)),
        "hidden",
        "at least | shape (2, 0, 5)",
    ),
    "routing_feature, a mask of another shape": (
        lambda: tucka.routing_feature(ones(2, 4, 5), mask=ones(2, 3)),
        "mask",
        "match | (2, 4) | shape (2, 3)",
    ),
    "affinity_logits, another width": (
        lambda: tucka.affinity_logits(ones(7, 4), CENTROIDS),
        "centroids",
        "size 4 | axis 1 of feature | shape (2, 3, 5)",
    ),
    "affinity_logits, centroids of too few axes": (
        lambda: tucka.affinity_logits(ones(5), CENTROIDS[0]),
        "centroids",
        "axes | (k, t, d) | affinity_logits | shape (3, 5)",
    ),
    "affinity_logits, another centre": (
        lambda: tucka.affinity_logits(ones(5), CENTROIDS, affinity="centered", center=ones(4)),
        "center",
        "size 5 | axis 0 of feature | shape (4,)",
    ),
    "select_gates, a vector": (
        lambda: tucka.select_gates(ones(3)),
        "logits",
        "axes | (..., k, t) | select_gates | shape (3,)",
    ),
    "select_gates, no groups": (lambda: tucka.select_gates(ones(0, 2)), "logits", "at least | shape (0, 2)"),
    "kaiming_centroids, two sizes": (
        lambda: tucka.kaiming_centroids((2, 3), seed=0),
        "shape",
        "three sizes | (k, t, d) | kaiming_centroids | (2, 3)",
    ),
    "kaiming_centroids, one number": (
        lambda: tucka.kaiming_centroids(8, seed=0),
        "shape",
        "three sizes | (k, t, d) | 8",
    ),
    "data_aware_centroids, no features": (
        lambda: tucka.data_aware_centroids(FEATURES[:0], scale=1.0, **SIZES),
        "features",
        "at least | data_aware_centroids | shape (0, 5)",
    ),
    "balanced_centroids, one feature": (
        lambda: tucka.balanced_centroids(FEATURES[0], **SIZES),
        "features",
        "axes | (n, d) | balanced_centroids | shape (5,)",
    ),
    "load_entropy, a number": (
        lambda: tucka.load_entropy(np.float64(3)),
        "load",
        "axes | (k) | load_entropy | shape ()",
    ),
    "load_entropy, nothing": (lambda: tucka.load_entropy([]), "load", "axes | (k) | shape (0,)"),
}

WRONG_NUMBERS = {
    "mode_product, no such mode": (
        lambda: tucka.mode_product(ones(2, 3), ones(2, 2), mode=2),
        "mode",
        "whole number | -2 to 1 | mode_product | 2",
    ),
    "mode_product, half a mode": (
        lambda: tucka.mode_product(ones(2, 3), ones(2, 2), mode=0.5),
        "mode",
        "whole number | -2 to 1 | 0.5",
    ),
    "mode_product, true": (
        lambda: tucka.mode_product(ones(2, 3), ones(2, 2), mode=True),
        "mode",
        "whole number | -2 to 1 | True",
    ),
    "multi_mode_product, a mode twice": (
        lambda: tucka.multi_mode_product(ones(2, 2), [ones(2, 2)] * 2, modes=[1, -1]),
        "modes",
        "different | multi_mode_product | [1, -1]",
    ),
    "multi_mode_product, too few modes": (
        lambda: tucka.multi_mode_product(ones(2, 2), [ones(2, 2)] * 2, modes=[1]),
        "modes",
        "one mode for each | [1]",
    ),
    "multi_mode_product, more matrices than modes": (
        lambda: tucka.multi_mode_product(ones(2), [ones(2, 2)] * 2),
        "modes[1]",
        "whole number | -1 to 0 | 1",
    ),
    "to_tensor, no such group": (
        lambda: experts().to_tensor(2),
        "group",
        "whole number | -2 to 1 | TuckerExperts.to_tensor | 2",
    ),
    "expert, no such expert": (
        lambda: experts().expert(0, 3),
        "index",
        "whole number | -3 to 2 | TuckerExperts.expert | 3",
    ),
    "norm, no such group": (lambda: experts().norm(-3), "group", "whole number | -2 to 1 | -3"),
    "inner, no such group": (lambda: experts().inner(experts(), 0, 2), "other_group", "whole number | -2 to 1 | 2"),
    "group, no such group": (lambda: experts().group(2), "index", "whole number | -2 to 1 | 2"),
    "apply, an infinite scale": (
        lambda: experts().apply(ones(5), ones(2, 3), alpha=float("inf")),
        "alpha",
        "finite | TuckerExperts.apply | inf",
    ),
    "routing_feature, no such routing": (
        lambda: tucka.routing_feature(ones(2, 3), routing="word"),
        "routing",
        "one of | 'batch' | routing_feature | 'word'",
    ),
    "affinity_logits, no such affinity": (
        lambda: tucka.affinity_logits(ones(5), CENTROIDS, affinity="cosine"),
        "affinity",
        "one of | 'dot' | affinity_logits | 'cosine'",
    ),
    "affinity_logits, a centre for an affinity without one": (
        lambda: tucka.affinity_logits(ones(5), CENTROIDS, center=ones(5)),
        "center",
        "None | 'dot' | an array",
    ),
    "affinity_logits, no temperature": (
        lambda: tucka.affinity_logits(ones(5), CENTROIDS, temperature=0.0),
        "temperature",
        "positive | 0.0",
    ),
    "select_gates, another rule": (
        lambda: tucka.select_gates(ones(2, 2), gate_norm="softmax"),
        "gate_norm",
        "one of | select_gates | 'softmax'",
    ),
    "kaiming_centroids, no groups": (
        lambda: tucka.kaiming_centroids((0, 2, 3), seed=0),
        "shape[0]",
        "at least 1 | whole number | kaiming_centroids | 0",
    ),
    "kaiming_centroids, a negative seed": (
        lambda: tucka.kaiming_centroids((1, 2, 3), seed=-1),
        "seed",
        "at least 0 | whole number | -1",
    ),
    "data_aware_centroids, a negative scale": (
        lambda: tucka.data_aware_centroids(FEATURES, scale=-1.0, **SIZES),
        "scale",
        "negative | data_aware_centroids | -1.0",
    ),
    "data_aware_centroids, NaN": (
        lambda: tucka.data_aware_centroids(FEATURES * np.nan, scale=1.0, **SIZES),
        "features",
        "finite | NaN or infinity",
    ),
    "balanced_centroids, no experts": (
        lambda: tucka.balanced_centroids(FEATURES, groups=2, experts_per_group=0, seed=0),
        "experts_per_group",
        "at least 1 | whole number | balanced_centroids | 0",
    ),
    "load_entropy, a negative count": (
        lambda: tucka.load_entropy([1, -1]),
        "load",
        "negative | not all zero | load_entropy | [1.0, -1.0]",
    ),
    "load_entropy, nothing counted": (
        lambda: tucka.load_entropy([0, 0]),
        "load",
        "negative | not all zero | [0.0, 0.0]",
    ),
    "load_entropy, NaN": (lambda: tucka.load_entropy([1.0, float("nan")]), "load", "finite"),
}

WRONG_TYPES = {
    "mode_product, a list": (
        lambda: tucka.mode_product([[1.0]], ones(1, 1), mode=0),
        "tensor",
        "registered | builtins.list",
    ),
    "multi_mode_product, a list": (
        lambda: tucka.multi_mode_product(ones(1, 1), [ones(1, 1), [[1.0]]]),
        "matrices[1]",
        "registered | builtins.list",
    ),
    "experts, a list": (
        lambda: tucka.TuckerExperts(ones(2, 4, 2, 2), [[1.0]], ones(5, 2)),
        "expert_factor",
        "registered | builtins.list",
    ),
    "mix, a list": (lambda: experts().mix([[1.0]]), "gates", "registered | builtins.list"),
    "apply, a number": (lambda: experts().apply(1.0, ones(2, 3)), "x", "registered | builtins.float"),
    "soft_unit_columns, a list": (lambda: tucka.soft_unit_columns([[1.0]]), "basis", "registered | builtins.list"),
    "householder_gamma, a list": (lambda: tucka.householder_gamma([[1.0]]), "vectors", "registered | builtins.list"),
    "routing_feature, a list": (lambda: tucka.routing_feature([[1.0]]), "hidden", "registered | builtins.list"),
    "routing_feature, a list as a mask": (
        lambda: tucka.routing_feature(ones(1, 2, 3), mask=[[1, 1]]),
        "mask",
        "registered | builtins.list",
    ),
    "affinity_logits, none": (
        lambda: tucka.affinity_logits(ones(5), None),
        "centroids",
        "registered | builtins.NoneType",
    ),
    "select_gates, a list": (lambda: tucka.select_gates([[1.0]]), "logits", "registered | builtins.list"),
    "kaiming_centroids, like a list": (
        lambda: tucka.kaiming_centroids((1, 1, 1), seed=0, like=[1.0]),
        "like",
        "registered | builtins.list",
    ),
    "data_aware_centroids, a list": (
        lambda: tucka.data_aware_centroids([[1.0]], scale=1.0, **SIZES),
        "features",
        "registered | builtins.list",
    ),
    "load_entropy, text": (lambda: tucka.load_entropy("abc"), "load", "registered | builtins.str"),
    "load_entropy, a list of text": (
        lambda: tucka.load_entropy(["a", "b"]),
        "load",
        "of numbers | load_entropy | ['a', 'b']",
    ),
    "inner, another object": (
        lambda: experts().inner(ones(2), 0, 0),
        "other",
        "TuckerExperts | TuckerExperts.inner | ndarray",
    ),
    "experts, two backends": (
        lambda: tucka.TuckerExperts(ones(2, 4, 2, 2), ones(3, 4), torch_ones(5, 2)),
        "basis",
        "same backend | (numpy) | one of pytorch",
    ),
    "apply, another backend": (
        lambda: experts(torch_ones).apply(jax_ones((7, 5)), torch_ones(2, 3)),
        "x",
        "same backend | (pytorch) | one of jax",
    ),
    "inner, another backend": (
        lambda: experts().inner(experts(torch_ones), 0, 0),
        "other.expert_factor",
        "same backend | (numpy) | one of pytorch",
    ),
    "routing_feature, a mask of another backend": (
        lambda: tucka.routing_feature(torch_ones(2, 3, 4), mask=ones(2, 3)),
        "mask",
        "same backend | (pytorch) | one of numpy",
    ),
    "affinity_logits, a centre of another backend": (
        lambda: tucka.affinity_logits(ones(5), CENTROIDS, affinity="centered", center=torch_ones(5)),
        "center",
        "same backend | (numpy) | one of pytorch",
    ),
    "mode_product, another dtype": (
        lambda: tucka.mode_product(ones(2, 3), ones(3, 3).astype(np.float32), mode=0),
        "matrix",
        "match | dtype | mode_product | dtype float32",
    ),
    "mode_product, booleans": (
        lambda: tucka.mode_product(ones(2, 3) > 0, ones(2, 2) > 0, mode=0),
        "tensor",
        "of numbers | mode_product | dtype bool",
    ),
    "multi_mode_product, another dtype": (
        lambda: tucka.multi_mode_product(ones(2, 3), [ones(3, 2), ones(3, 3).astype(np.float32)]),
        "matrices[1]",
        "match | dtype | dtype float32",
    ),
    "experts, whole numbers": (
        lambda: experts(lambda shape: np.ones(shape, dtype=int)),
        "cores",
        "floating | TuckerExperts | dtype int64",
    ),
    "experts, complex numbers": (
        lambda: experts(lambda shape: np.ones(shape, dtype=complex)),
        "cores",
        "floating | dtype complex128",
    ),
    "experts, two dtypes": (
        lambda: tucka.TuckerExperts(ones(2, 4, 2, 2), ones(3, 4), ones(5, 2).astype(np.float32)),
        "basis",
        "match | dtype | dtype float32",
    ),
    "apply, another dtype": (
        lambda: experts(torch_ones).apply(torch_ones(7, 5).half(), torch_ones(2, 3)),
        "x",
        "match | dtype | TuckerExperts.apply | dtype torch.float16",
    ),
    "householder_experts, whole numbers": (
        lambda: tucka.householder_experts(np.eye(2, dtype=int)),
        "vectors",
        "floating | dtype int64",
    ),
    "routing_feature, whole numbers": (
        lambda: tucka.routing_feature(torch_ones(2, 3).int()),
        "hidden",
        "floating | routing_feature | dtype torch.int32",
    ),
    "affinity_logits, whole numbers": (
        lambda: tucka.affinity_logits(ones(5), CENTROIDS.astype(int)),
        "centroids",
        "floating | dtype int64",
    ),
    "select_gates, whole numbers": (
        lambda: tucka.select_gates(jax_ones((2, 2)).astype(int)),
        "logits",
        "floating | select_gates | dtype int32",
    ),
    "kaiming_centroids, like whole numbers": (
        lambda: tucka.kaiming_centroids((1, 1, 1), seed=0, like=np.arange(3)),
        "like",
        "floating | kaiming_centroids | dtype int64",
    ),
    "balanced_centroids, whole numbers": (
        lambda: tucka.balanced_centroids(FEATURES.astype(int), **SIZES),
        "features",
        "floating | dtype int64",
    ),
}


FROM_SPEC = tucka.TuckerExperts.from_spec
SPEC = tucka.TuckerSpec(rank=4)

WRONG_NUMBERS |= {
    "from_spec, too narrow": (lambda: FROM_SPEC(SPEC, 3, seed=0), "in_features", "rank | 4 | 3"),
    "from_spec, no width": (lambda: FROM_SPEC(SPEC, 0, seed=0), "in_features", "at least 1 | 0"),
    "from_spec, a negative seed": (lambda: FROM_SPEC(SPEC, 8, seed=-1), "seed", "at least 0 | -1"),
}
WRONG_TYPES |= {
    "from_spec, like a list": (lambda: FROM_SPEC(SPEC, 8, seed=0, like=[1.0]), "like", "registered | list"),
    "from_spec, like whole numbers": (
        lambda: FROM_SPEC(SPEC, 8, seed=0, like=np.arange(3)),
        "like",
        "floating | int64 | TuckerExperts.from_spec",
    ),
}


@pytest.mark.parametrize(("call", "name", "words"), WRONG_SHAPES.values(), ids=list(WRONG_SHAPES))
def test_a_wrong_shape_is_a_shape_error(call, name, words):
    with refused(ShapeError, name, words):
        call()


@pytest.mark.parametrize(("call", "name", "words"), WRONG_NUMBERS.values(), ids=list(WRONG_NUMBERS))
def test_a_wrong_number_or_option_is_a_config_error(call, name, words):
    with refused(ConfigError, name, words):
        call()


@pytest.mark.parametrize(("call", "name", "words"), WRONG_TYPES.values(), ids=list(WRONG_TYPES))
def test_a_wrong_kind_of_array_is_an_array_error_and_a_type_error(call, name, words):
    with refused(ArrayError, name, words):
        call()
    with pytest.raises(TypeError):
        call()
