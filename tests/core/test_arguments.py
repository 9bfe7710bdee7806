"""Wrong arguments: which error, and that it names the argument, the rule and the value."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tucka
from tucka import ConfigError, ShapeError


def ones(*shape, of=np.ones):
    return of(shape)


def experts(of=np.ones):
    """k = 2, t = 3, p = 4, r = 2, d = 5."""
    return tucka.TuckerExperts(of((2, 4, 2, 2)), of((3, 4)), of((5, 2)))


CENTROIDS = ones(2, 3, 5)
FEATURES = ones(4, 5)
SIZES = {"groups": 2, "experts_per_group": 2, "seed": 0}

WRONG_SHAPES = {
    "mode_product, no modes": (
        lambda: tucka.mode_product(np.array(1.0), ones(2, 2), mode=0),
        r"tensor: expected at least one mode, got shape \(\) \(mode_product\)",
    ),
    "mode_product, a NumPy scalar": (
        lambda: tucka.mode_product(np.float64(1.0), ones(2, 2), mode=0),
        r"tensor: expected at least one mode, got shape \(\)",
    ),
    "mode_product, no matrix": (
        lambda: tucka.mode_product(ones(2, 3), ones(3), mode=1),
        r"matrix: expected axes \(J, I\), got shape \(3,\) \(mode_product\)",
    ),
    "mode_product, another size": (
        lambda: tucka.mode_product(ones(2, 3), ones(5, 4), mode=1),
        r"matrix: expected size 3 along axis 1 to match mode 1 of tensor, got shape \(5, 4\) \(mode_product\)",
    ),
    "multi_mode_product, another size": (
        lambda: tucka.multi_mode_product(ones(2, 3), [ones(5, 2), ones(5, 4)]),
        r"matrices\[1\]: expected size 3 along axis 1 to match mode 1 of tensor, got shape \(5, 4\)",
    ),
    "experts, cores of too few axes": (
        lambda: tucka.TuckerExperts(ones(4, 2, 2), ones(3, 4), ones(5, 2)),
        r"cores: expected axes \(k, p, r, r\), got shape \(4, 2, 2\) \(TuckerExperts\)",
    ),
    "experts, cores not square": (
        lambda: tucka.TuckerExperts(ones(2, 4, 2, 3), ones(3, 4), ones(5, 2)),
        r"cores: expected size 2 along axis 3 to match axis 2 of cores, got shape \(2, 4, 2, 3\)",
    ),
    "experts, another expert rank": (
        lambda: tucka.TuckerExperts(ones(2, 4, 2, 2), ones(3, 5), ones(5, 2)),
        r"expert_factor: expected size 4 along axis 1 to match axis 1 of cores, got shape \(3, 5\)",
    ),
    "experts, another rank": (
        lambda: tucka.TuckerExperts(ones(2, 4, 2, 2), ones(3, 4), ones(5, 3)),
        r"basis: expected size 2 along axis 1 to match axis 2 of cores, got shape \(5, 3\)",
    ),
    "experts, no groups": (
        lambda: tucka.TuckerExperts(ones(0, 4, 2, 2), ones(3, 4), ones(5, 2)),
        r"cores: expected at least one entry along k, got shape \(0, 4, 2, 2\)",
    ),
    "mix, gates of another size": (
        lambda: experts().mix(ones(3, 2)),
        r"gates: expected size 2 along axis 0 to match axis 0 of cores, got shape \(3, 2\) \(TuckerExperts.mix\)",
    ),
    "mix, a scalar": (
        lambda: experts().mix(np.float64(1.0)),
        r"gates: expected axes \(..., k, t\), got shape \(\) \(TuckerExperts.mix\)",
    ),
    "apply, x of another width": (
        lambda: experts().apply(ones(7, 4), ones(2, 3)),
        r"x: expected size 5 along axis 1 to match axis 0 of basis, got shape \(7, 4\) \(TuckerExperts.apply\)",
    ),
    "apply, a scalar": (
        lambda: experts().apply(np.float64(1.0), ones(2, 3)),
        r"x: expected axes \(..., d\), got shape \(\)",
    ),
    "apply, gates for another batch": (
        lambda: experts().apply(ones(7, 5), ones(6, 2, 3)),
        r"gates: expected leading axes that are the first of x's \(7,\), got shape \(6, 2, 3\)",
    ),
    "apply, more leading axes than x": (
        lambda: experts().apply(ones(5), ones(1, 2, 3)),
        r"gates: expected leading axes that are the first of x's \(\), got shape \(1, 2, 3\)",
    ),
    "inner, another width": (
        lambda: experts().inner(tucka.TuckerExperts(ones(1, 1, 1, 1), ones(3, 1), ones(6, 1)), 0, 0),
        r"other.basis: expected size 5 along axis 0 to match axis 0 of basis, got shape \(6, 1\)",
    ),
    "inner, other experts": (
        lambda: experts().inner(tucka.TuckerExperts(ones(1, 1, 1, 1), ones(2, 1), ones(5, 1)), 0, 0),
        r"other.expert_factor: expected size 3 along axis 0 to match axis 0 of expert_factor, got shape \(2, 1\)",
    ),
    "householder_gamma, a vector": (
        lambda: tucka.householder_gamma(ones(3)),
        r"vectors: expected axes \(d, r\), got shape \(3,\) \(householder_gamma\)",
    ),
    "householder_product, more columns than rows": (
        lambda: tucka.householder_product(ones(2, 3)),
        r"vectors: expected at most 2 columns, got shape \(2, 3\) \(householder_product\)",
    ),
    "householder_experts, no columns": (
        lambda: tucka.householder_experts(ones(2, 0)),
        r"vectors: expected at least one entry along r, got shape \(2, 0\)",
    ),
    "routing_feature, a vector": (
        lambda: tucka.routing_feature(ones(3)),
        r"hidden: expected axes \(B, d\), got shape \(3,\) \(routing_feature\)",
    ),
    "routing_feature, an empty batch": (
        lambda: tucka.routing_feature(ones(0, 4, 5)),
        r"hidden: expected at least one entry along B, got shape \(0, 4, 5\)",
    ),
    "routing_feature, no tokens": (
        lambda: tucka.routing_feature(ones(2, 0, 5)),
        r"hidden: expected at least one entry along S0, got shape \(2, 0, 5\)",
    ),
    "routing_feature, a mask of another shape": (
        lambda: tucka.routing_feature(ones(2, 4, 5), mask=ones(2, 3)),
        r"mask: expected shape \(2, 4\) to match hidden, got shape \(2, 3\)",
    ),
    "affinity_logits, another width": (
        lambda: tucka.affinity_logits(ones(7, 4), CENTROIDS),
        r"centroids: expected size 4 along axis 2 to match axis 1 of feature, got shape \(2, 3, 5\)",
    ),
    "affinity_logits, centroids of too few axes": (
        lambda: tucka.affinity_logits(ones(5), CENTROIDS[0]),
        r"centroids: expected axes \(k, t, d\), got shape \(3, 5\) \(affinity_logits\)",
    ),
    "affinity_logits, another centre": (
        lambda: tucka.affinity_logits(ones(5), CENTROIDS, kind="centered", center=ones(4)),
        r"center: expected size 5 along axis 0 to match axis 0 of feature, got shape \(4,\)",
    ),
    "select_gates, a vector": (
        lambda: tucka.select_gates(ones(3)),
        r"logits: expected axes \(..., k, t\), got shape \(3,\) \(select_gates\)",
    ),
    "select_gates, no groups": (
        lambda: tucka.select_gates(ones(0, 2)),
        r"logits: expected at least one entry along k, got shape \(0, 2\)",
    ),
    "kaiming_centroids, two sizes": (
        lambda: tucka.kaiming_centroids((2, 3), seed=0),
        r"shape: expected three sizes \(k, t, d\), got \(2, 3\) \(kaiming_centroids\)",
    ),
    "kaiming_centroids, one number": (
        lambda: tucka.kaiming_centroids(8, seed=0),
        r"shape: expected three sizes \(k, t, d\), got 8",
    ),
    "data_aware_centroids, no features": (
        lambda: tucka.data_aware_centroids(FEATURES[:0], scale=1.0, **SIZES),
        r"features: expected at least one entry along n, got shape \(0, 5\) \(data_aware_centroids\)",
    ),
    "balanced_centroids, one feature": (
        lambda: tucka.balanced_centroids(FEATURES[0], **SIZES),
        r"features: expected axes \(n, d\), got shape \(5,\) \(balanced_centroids\)",
    ),
    "load_entropy, a number": (
        lambda: tucka.load_entropy(np.float64(3)),
        r"load: expected axes \(k\), got shape \(\) \(load_entropy\)",
    ),
    "load_entropy, nothing": (lambda: tucka.load_entropy([]), r"load: expected axes \(k\), got shape \(0,\)"),
}

WRONG_NUMBERS = {
    "mode_product, no such mode": (
        lambda: tucka.mode_product(ones(2, 3), ones(2, 2), mode=2),
        r"mode: expected a whole number from -2 to 1, got 2 \(mode_product\)",
    ),
    "mode_product, half a mode": (
        lambda: tucka.mode_product(ones(2, 3), ones(2, 2), mode=0.5),
        r"mode: expected a whole number from -2 to 1, got 0.5",
    ),
    "mode_product, true": (
        lambda: tucka.mode_product(ones(2, 3), ones(2, 2), mode=True),
        r"mode: expected a whole number from -2 to 1, got True",
    ),
    "multi_mode_product, a mode twice": (
        lambda: tucka.multi_mode_product(ones(2, 2), [ones(2, 2)] * 2, modes=[1, -1]),
        r"modes: expected different modes, got \[1, -1\] \(multi_mode_product\)",
    ),
    "multi_mode_product, too few modes": (
        lambda: tucka.multi_mode_product(ones(2, 2), [ones(2, 2)] * 2, modes=[1]),
        r"modes: expected one mode for each of 2 matrices, got \[1\]",
    ),
    "multi_mode_product, more matrices than modes": (
        lambda: tucka.multi_mode_product(ones(2), [ones(2, 2)] * 2),
        r"modes\[1\]: expected a whole number from -1 to 0, got 1",
    ),
    "to_tensor, no such group": (
        lambda: experts().to_tensor(2),
        r"group: expected a whole number from -2 to 1, got 2 \(TuckerExperts.to_tensor\)",
    ),
    "expert, no such expert": (
        lambda: experts().expert(0, 3),
        r"index: expected a whole number from -3 to 2, got 3 \(TuckerExperts.expert\)",
    ),
    "norm, no such group": (lambda: experts().norm(-3), r"group: expected a whole number from -2 to 1, got -3"),
    "inner, no such group": (
        lambda: experts().inner(experts(), 0, 2),
        r"other_group: expected a whole number from -2 to 1, got 2",
    ),
    "group, no such group": (lambda: experts().group(2), r"index: expected a whole number from -2 to 1, got 2"),
    "apply, an infinite scale": (
        lambda: experts().apply(ones(5), ones(2, 3), alpha=float("inf")),
        r"alpha: expected a finite number, got inf \(TuckerExperts.apply\)",
    ),
    "householder_gamma, no such method": (
        lambda: tucka.householder_gamma(np.eye(2), method="guess"),
        r"method: expected one of 'solve', 'recursion', got 'guess' \(householder_gamma\)",
    ),
    "routing_feature, no such granularity": (
        lambda: tucka.routing_feature(ones(2, 3), granularity="word"),
        r"granularity: expected one of 'batch', 'sample', 'token', got 'word' \(routing_feature\)",
    ),
    "affinity_logits, no such kind": (
        lambda: tucka.affinity_logits(ones(5), CENTROIDS, kind="cosine"),
        r"kind: expected one of 'dot', 'group_norm', 'centered', 'directional', got 'cosine' \(affinity_logits\)",
    ),
    "affinity_logits, a centre for a kind without one": (
        lambda: tucka.affinity_logits(ones(5), CENTROIDS, center=ones(5)),
        r"center: expected None with kind='dot', got an array",
    ),
    "affinity_logits, no temperature": (
        lambda: tucka.affinity_logits(ones(5), CENTROIDS, temperature=0.0),
        r"temperature: expected a positive number, got 0.0",
    ),
    "select_gates, another rule": (
        lambda: tucka.select_gates(ones(2, 2), normalize="softmax"),
        r"normalize: expected one of True, False, got 'softmax' \(select_gates\)",
    ),
    "kaiming_centroids, no groups": (
        lambda: tucka.kaiming_centroids((0, 2, 3), seed=0),
        r"shape\[0\]: expected a whole number of at least 1, got 0 \(kaiming_centroids\)",
    ),
    "kaiming_centroids, a negative seed": (
        lambda: tucka.kaiming_centroids((1, 2, 3), seed=-1),
        r"seed: expected a whole number of at least 0, got -1",
    ),
    "data_aware_centroids, a negative scale": (
        lambda: tucka.data_aware_centroids(FEATURES, scale=-1.0, **SIZES),
        r"scale: expected a number that is not negative, got -1.0 \(data_aware_centroids\)",
    ),
    "data_aware_centroids, NaN": (
        lambda: tucka.data_aware_centroids(FEATURES * np.nan, scale=1.0, **SIZES),
        r"features: expected finite numbers, got NaN or infinity",
    ),
    "balanced_centroids, no experts": (
        lambda: tucka.balanced_centroids(FEATURES, groups=2, experts_per_group=0, seed=0),
        r"experts_per_group: expected a whole number of at least 1, got 0 \(balanced_centroids\)",
    ),
    "load_entropy, a negative count": (
        lambda: tucka.load_entropy([1, -1]),
        r"load: expected finite counts, none negative, not all zero, got \[1.0, -1.0\] \(load_entropy\)",
    ),
    "load_entropy, nothing counted": (
        lambda: tucka.load_entropy([0, 0]),
        r"load: expected finite counts, none negative, not all zero, got \[0.0, 0.0\]",
    ),
    "load_entropy, NaN": (lambda: tucka.load_entropy([1.0, float("nan")]), r"load: expected finite counts"),
}

NO_ARRAY = r": expected an array of NumPy, PyTorch, JAX, CuPy or a registered backend, got builtins\."

WRONG_TYPES = {
    "mode_product, a list": (
        lambda: tucka.mode_product([[1.0]], ones(1, 1), mode=0),
        "^tensor" + NO_ARRAY + r"list. Convert it first, or see tucka.backends.register$",
    ),
    "multi_mode_product, a list": (
        lambda: tucka.multi_mode_product(ones(1, 1), [ones(1, 1), [[1.0]]]),
        r"^matrices\[1\]" + NO_ARRAY + "list",
    ),
    "experts, a list": (
        lambda: tucka.TuckerExperts(ones(2, 4, 2, 2), [[1.0]], ones(5, 2)),
        "^expert_factor" + NO_ARRAY + "list",
    ),
    "mix, a list": (lambda: experts().mix([[1.0]]), "^gates" + NO_ARRAY + "list"),
    "apply, a number": (lambda: experts().apply(1.0, ones(2, 3)), "^x" + NO_ARRAY + "float"),
    "householder_gamma, a list": (lambda: tucka.householder_gamma([[1.0]]), "^vectors" + NO_ARRAY + "list"),
    "routing_feature, a list": (lambda: tucka.routing_feature([[1.0]]), "^hidden" + NO_ARRAY + "list"),
    "routing_feature, a list as a mask": (
        lambda: tucka.routing_feature(ones(1, 2, 3), mask=[[1, 1]]),
        "^mask" + NO_ARRAY + "list",
    ),
    "affinity_logits, none": (lambda: tucka.affinity_logits(ones(5), None), "^centroids" + NO_ARRAY + "NoneType"),
    "select_gates, a list": (lambda: tucka.select_gates([[1.0]]), "^logits" + NO_ARRAY + "list"),
    "kaiming_centroids, like a list": (
        lambda: tucka.kaiming_centroids((1, 1, 1), seed=0, like=[1.0]),
        "^like" + NO_ARRAY + "list",
    ),
    "data_aware_centroids, a list": (
        lambda: tucka.data_aware_centroids([[1.0]], scale=1.0, **SIZES),
        "^features" + NO_ARRAY + "list",
    ),
    "load_entropy, text": (lambda: tucka.load_entropy("abc"), "^load" + NO_ARRAY + "str"),
    "load_entropy, a list of text": (
        lambda: tucka.load_entropy(["a", "b"]),
        r"load: expected an array or a sequence of numbers, got \['a', 'b'\] \(load_entropy\)",
    ),
    "inner, another object": (
        lambda: experts().inner(ones(2), 0, 0),
        r"other: expected TuckerExperts, got ndarray \(TuckerExperts.inner\)",
    ),
    "experts, two backends": (
        lambda: tucka.TuckerExperts(ones(2, 4, 2, 2), ones(3, 4), torch.ones(5, 2)),
        r"basis: expected an array of the same backend as cores \(numpy\), got one of pytorch",
    ),
    "apply, another backend": (
        lambda: experts(torch.ones).apply(jnp.ones((7, 5)), torch.ones(2, 3)),
        r"x: expected an array of the same backend as cores \(pytorch\), got one of jax",
    ),
    "inner, another backend": (
        lambda: experts().inner(experts(torch.ones), 0, 0),
        r"other.expert_factor: expected an array of the same backend as cores \(numpy\), got one of pytorch",
    ),
    "routing_feature, a mask of another backend": (
        lambda: tucka.routing_feature(torch.ones(2, 3, 4), mask=ones(2, 3)),
        r"mask: expected an array of the same backend as hidden \(pytorch\), got one of numpy",
    ),
    "affinity_logits, a centre of another backend": (
        lambda: tucka.affinity_logits(ones(5), CENTROIDS, kind="centered", center=torch.ones(5)),
        r"center: expected an array of the same backend as feature \(numpy\), got one of pytorch",
    ),
    "mode_product, another dtype": (
        lambda: tucka.mode_product(ones(2, 3), ones(3, 3).astype(np.float32), mode=0),
        r"matrix: expected dtype float64 to match tensor, got dtype float32 \(mode_product\)",
    ),
    "mode_product, booleans": (
        lambda: tucka.mode_product(ones(2, 3) > 0, ones(2, 2) > 0, mode=0),
        r"tensor: expected an array of numbers, got dtype bool \(mode_product\)",
    ),
    "multi_mode_product, another dtype": (
        lambda: tucka.multi_mode_product(ones(2, 3), [ones(3, 2), ones(3, 3).astype(np.float32)]),
        r"matrices\[1\]: expected dtype float64 to match tensor, got dtype float32",
    ),
    "experts, whole numbers": (
        lambda: experts(lambda shape: np.ones(shape, dtype=int)),
        r"cores: expected a real floating-point array, got dtype int64 \(TuckerExperts\)",
    ),
    "experts, complex numbers": (
        lambda: experts(lambda shape: np.ones(shape, dtype=complex)),
        r"cores: expected a real floating-point array, got dtype complex128",
    ),
    "experts, two dtypes": (
        lambda: tucka.TuckerExperts(ones(2, 4, 2, 2), ones(3, 4), ones(5, 2).astype(np.float32)),
        r"basis: expected dtype float64 to match cores, got dtype float32",
    ),
    "apply, another dtype": (
        lambda: experts(torch.ones).apply(torch.ones(7, 5).half(), torch.ones(2, 3)),
        r"x: expected dtype torch.float32 to match cores, got dtype torch.float16 \(TuckerExperts.apply\)",
    ),
    "householder_experts, whole numbers": (
        lambda: tucka.householder_experts(np.eye(2, dtype=int)),
        r"vectors: expected a real floating-point array, got dtype int64",
    ),
    "routing_feature, whole numbers": (
        lambda: tucka.routing_feature(torch.ones(2, 3, dtype=torch.int32)),
        r"hidden: expected a real floating-point array, got dtype torch.int32 \(routing_feature\)",
    ),
    "affinity_logits, whole numbers": (
        lambda: tucka.affinity_logits(ones(5), CENTROIDS.astype(int)),
        r"centroids: expected a real floating-point array, got dtype int64",
    ),
    "select_gates, whole numbers": (
        lambda: tucka.select_gates(jnp.ones((2, 2), int)),
        r"logits: expected a real floating-point array, got dtype int32 \(select_gates\)",
    ),
    "kaiming_centroids, like whole numbers": (
        lambda: tucka.kaiming_centroids((1, 1, 1), seed=0, like=np.arange(3)),
        r"like: expected a real floating-point array, got dtype int64 \(kaiming_centroids\)",
    ),
    "balanced_centroids, whole numbers": (
        lambda: tucka.balanced_centroids(FEATURES.astype(int), **SIZES),
        r"features: expected a real floating-point array, got dtype int64",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG_SHAPES.values(), ids=list(WRONG_SHAPES))
def test_a_wrong_shape_is_a_shape_error(call, message):
    with pytest.raises(ShapeError, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), WRONG_NUMBERS.values(), ids=list(WRONG_NUMBERS))
def test_a_wrong_number_or_option_is_a_config_error(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), WRONG_TYPES.values(), ids=list(WRONG_TYPES))
def test_a_wrong_kind_of_array_is_a_type_error(call, message):
    with pytest.raises(TypeError, match=message):
        call()
