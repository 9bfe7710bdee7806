"""Merging pinned adapters into base weights: exact, reversible, all layers or none."""

import copy
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from support.bases import BASES, make_base, run
from support.close import assert_close
from support.strategies import arrays, tucker_parts
from tucka import reference
from tucka.errors import RouteError, TuckaError
from tucka.peft import TuckAConfig, pin_route
from tucka.peft.merging import thin_update

GATES = [[0.7, 0.2], [0.0, 0.0]]
kinds = pytest.mark.parametrize("kind", BASES)
already_merged = pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning")


def adapted(kind, *, dtype=torch.float64, **options):
    base, targets, inputs = make_base(kind, dtype=dtype)
    before = copy.deepcopy(base)
    config = TuckAConfig(r=2, target_modules=targets, init_weights=False, **{"alpha": 0.5, **options})
    return get_peft_model(base, config).eval(), before, inputs


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model, state):
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[key], value) for key, value in state.items())


def close(one, other, tolerance=1e-10):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, float(other.abs().max())))


@kinds
@torch.no_grad()
def test_merged_and_unmerged_models_give_the_adapters_outputs(kind):
    model, before, inputs = adapted(kind, pinned_gates=GATES)
    output, state = run(model, inputs), snapshot(model)
    assert not torch.allclose(output, run(before, inputs), atol=1e-3)
    model.merge_adapter(safe_merge=True)
    close(run(model, inputs), output)
    with model.disable_adapter():
        close(run(model, inputs), run(before, inputs))
    model.merge_adapter()
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        close(value.double(), state[key].double())


@pytest.mark.parametrize("norm", [None, "columns", "rotation"])
@given(data=st.data())
def test_the_merged_weight_is_the_papers(norm, data):
    parts = data.draw(tucker_parts())
    gates = data.draw(arrays(*parts.gate_shape)) / 8
    k, p, r, _ = parts.cores.shape
    width = parts.basis.shape[0]
    layer = nn.Linear(width, 3).double()
    weight = layer.weight.detach().numpy().copy()
    config = TuckAConfig(
        r=r,
        k=k,
        t=parts.gate_shape[1],
        p=p,
        alpha=0.5,
        pinned_gates=gates.tolist(),
        factor_norm=norm,
        target_modules=["0"],
    )
    model = get_peft_model(nn.Sequential(layer), config)
    experts = model.base_model.model[0].experts("default")
    for name, values in zip(("cores", "expert_factor", "basis"), parts.all, strict=True):
        getattr(experts, name).data.copy_(torch.from_numpy(values))
    model.merge_adapter()
    merged = model.base_model.model[0].base_layer.weight.detach().numpy()
    # (I + αT) W in the paper's layout, row by row of the identity.
    basis = reference.soft_unit_columns(parts.basis) if norm == "columns" else parts.basis
    cores = parts.cores / r if norm == "rotation" else parts.cores
    adapted = reference.adapt(np.eye(width), gates, cores, parts.expert_factor, basis, alpha=0.5)
    eps = 2.0**-52
    if norm == "rotation":
        adapted += 0.5 * gates.sum() * (reference.rotation(basis, float(experts.strength)) - np.eye(width))
        eps *= (1.0 + 6.0 * np.square(basis).sum()) ** 2  # the products UᵀU are what the rotation is solved from
    assert_close(merged.T, adapted @ weight.T, eps=eps, terms=width * r * p * k)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
@pytest.mark.parametrize("kind", ["bert", "gpt2", "conv2d_square"])
@torch.no_grad()
def test_several_adapters_merge_one_after_another_as_at_once(kind):
    model, before, inputs = adapted(kind, pinned_gates=GATES)
    other = TuckAConfig(
        r=3, k=3, t=1, p=1, target_modules=make_base(kind)[1][:1], init_weights=False, pinned_gates=[[0.0], [0.4], [0]]
    )
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    output, state = run(model, inputs), snapshot(model)
    model.merge_adapter()
    close(run(model, inputs), output)
    at_once = snapshot(model)
    model.unmerge_adapter()
    close(run(model, inputs), output)
    for names in (["default", "other"], ["other", "default"]):
        for name in names:
            model.merge_adapter([name])
        for key, value in model.state_dict().items():
            close(value.double(), at_once[key].double())
        model.unmerge_adapter()
    for key, value in model.state_dict().items():
        close(value.double(), state[key].double())
    close(run(model.unload(), inputs), run(before, inputs))


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_safe_merge_finds_broken_numbers_before_any_layer_is_written(way, value):
    model, _, _ = adapted("bert", pinned_gates=GATES)
    layers = [module for module in model.modules() if hasattr(module, "tucka_experts")]
    layers[-1].experts("default").cores.data.view(-1)[0] = value
    state = {key: tensor for key, tensor in snapshot(model).items() if "base_layer" in key}
    message = "NaNs detected in the merged weights. The adapter default seems to be broken"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(model, way)(safe_merge=True)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())
    assert not any(layer.merged for layer in layers)


@already_merged
def test_merging_twice_changes_nothing():
    model, _, _ = adapted("gpt2", pinned_gates=GATES)
    model.merge_adapter()
    state = snapshot(model)
    model.merge_adapter()
    model.merge_adapter(safe_merge=True)
    assert same(model, state)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@already_merged
@pytest.mark.parametrize("merge_first", [False, True])
@kinds
@torch.no_grad()
def test_merge_and_unload_leaves_a_clean_base_model(kind, merge_first):
    model, before, inputs = adapted(kind, pinned_gates=GATES)
    output = run(model, inputs)
    if merge_first:
        model.merge_adapter()
    clean = model.merge_and_unload()
    close(run(clean, inputs), output)
    assert type(clean) is type(before)
    assert list(clean.state_dict()) == list(before.state_dict())
    for (name, module), (known, original) in zip(clean.named_modules(), before.named_modules(), strict=True):
        assert (name, type(module)) == (known, type(original))
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    leftover = [key for module in clean.modules() for key in vars(module) if "tucka" in key or "peft" in key]
    assert not leftover


@torch.no_grad()
def test_unload_gives_the_base_back():
    model, before, inputs = adapted("bert")
    run(model, inputs)
    clean = model.unload()
    assert same(clean, before.state_dict())
    assert not clean._forward_hooks
    assert torch.equal(run(clean, inputs), run(before, inputs))


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_a_routed_adapter_is_not_merged_and_the_error_says_how_it_can_be(way):
    model, _, inputs = adapted("bert")
    state, output = snapshot(model), run(model, inputs)
    with pytest.raises(RouteError, match=r"merge: expected .*pin_route"):
        getattr(model, way)()
    assert same(model, state)
    assert torch.equal(run(model, inputs), output)


@torch.no_grad()
def test_merging_beside_a_routed_adapter_warns_that_this_one_is_off():
    model, _, inputs = adapted("bert", pinned_gates=GATES)
    alone = run(model, inputs)
    model.add_adapter("routed", TuckAConfig(r=2, target_modules=["query"], init_weights=False))
    model.base_model.set_adapter(["default", "routed"])
    both = run(model, inputs)
    with pytest.warns(UserWarning, match=r"routed.*unmerge"):
        model.merge_adapter(["default"])
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query
    assert query.merged_adapters == ["default"]
    assert not torch.allclose(run(model, inputs), both)
    model.unmerge_adapter()
    close(run(model, inputs), both)
    model.set_adapter("default")
    model.merge_adapter()  # nothing else is active: no warning
    close(run(model, inputs), alone)


@torch.no_grad()
def test_a_pinned_route_merges_and_can_be_routed_again_after_unmerging():
    model, _, inputs = adapted("bert")
    pin_route(model, batches=[inputs])
    output = run(model, inputs)
    model.merge_adapter()
    close(run(model, inputs), output)


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_a_weight_that_is_no_ordinary_matrix_is_found_before_any_layer_is_written(way):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features = 4
            self.codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return x @ self.codes.to(x.dtype)

    base = nn.Sequential(nn.Linear(4, 4), Hidden())
    config = TuckAConfig(r=2, target_modules=["0", "1"], init_weights=False, pinned_gates=GATES)
    model = get_peft_model(base, config)
    state = snapshot(model)
    with pytest.raises(TuckaError, match=r"export_lora"):
        getattr(model, way)()
    assert same(model, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_weights_are_rounded_once(dtype):
    model, _, _ = adapted("bert", dtype=dtype, pinned_gates=GATES)
    layer = next(module for module in model.modules() if hasattr(module, "tucka_experts"))
    left, right = thin_update(layer, "default", torch.tensor(GATES))
    weight = layer.base_layer.weight.data.clone()
    desired = (weight.float() + left @ right).to(dtype)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight.data, desired)
    model.unmerge_adapter()
    largest = float(torch.maximum(weight.abs(), desired.abs()).max())
    torch.testing.assert_close(layer.base_layer.weight.data, weight, rtol=0, atol=2 * torch.finfo(dtype).eps * largest)


@torch.no_grad()
def test_the_authors_variant_merges_too():
    options = {"affinity": "group_norm", "factor_norm": "frobenius", "gate_norm": False, "alpha": 2.0}
    model, _, inputs = adapted("bert", pinned_gates=GATES, **options)
    output = run(model, inputs)
    model.merge_adapter()
    close(run(model, inputs), output)


@torch.no_grad()
def test_a_merged_model_can_be_copied_and_unmerged_on_its_own():
    model, _, inputs = adapted("gpt2", pinned_gates=GATES)
    output = run(model, inputs)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    close(run(twin, inputs), output)
    assert not twin.base_model.model.transformer.h[0].attn.c_attn.merged
    assert model.base_model.model.transformer.h[0].attn.c_attn.merged
